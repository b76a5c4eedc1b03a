"""Hashes of files: of some together, and of a Python file with all that it imports from beside it."""

import ast
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

INSTALLED = {"site-packages", "dist-packages"}
"""Folders of packages; what a file there imports from beside it is a package of its own."""


def code_hash(path: Path, root: Path) -> str:
    """SHA-256 of a Python file and of all that it imports from a folder, by whatever way.

    The `import` statements are read, nothing is run. Of an installed package only its own files
    count.

    Args:
        path: of the file.
        root: where its imports are looked for; the file lies in it, or below.
    """
    within = root
    if INSTALLED & set(root.parts):
        within = root / path.relative_to(root).parts[0]
    found, waiting = set[Path](), [path]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        packages = path.parents[: len(path.relative_to(root).parts) - 1]
        wanted = [parent / "__init__.py" for parent in packages] + list(_imports(path, root))
        waiting += [each for each in wanted if each.is_relative_to(within)]
    return files_hash(found, root)


def _imports(path: Path, root: Path) -> Iterator[Path]:
    """Files that the `import` statements of a file may mean."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # it will be told when it is run
        return
    for node in ast.walk(tree):
        names = list[tuple[Path, list[str]]]()
        if isinstance(node, ast.Import):
            names = [(root, each.name.split(".")) for each in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level < len(path.parents):
            start = path.parents[node.level - 1] if node.level else root
            base = node.module.split(".") if node.module else []
            names = [(start, [*base, each.name]) for each in node.names]
        for start, words in names:
            for end in range(1, len(words) + 1):
                place = start.joinpath(*words[:end])
                yield from (place.with_name(f"{place.name}.py"), place / "__init__.py")


def content_hash(path: Path) -> str:
    """SHA-256 of what a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(
    paths: Iterable[Path], root: Path, content: Callable[[Path], str] = content_hash
) -> str:
    """SHA-256 of the contents of files and of their names below a folder."""
    total = hashlib.sha256()
    for name, path in sorted((os.path.relpath(path, root), path) for path in paths):
        total.update(f"{name}\0{content(path)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
