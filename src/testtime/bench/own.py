"""Files of a user's own: what a function in one returns, which files it consists of, their hash."""

import ast
import hashlib
import os
import random
import runpy
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from testtime._core.errors import InputError
from testtime._core.seeds import global_chance

INSTALLED = {"site-packages", "dist-packages"}
"""Folders of packages; what a file there imports from beside it is a package of its own."""


_home: list[Path] = []
"""The folder whose modules are found now, if any."""


def python_file(model: str) -> Path | None:
    """The file of a model that is called `file:PATH.py@FUNCTION`; None for another name.

    Example:
        >>> python_file("file:/nets/a.py@build"), python_file("file:/nets/a.pt@timm:resnet18")
        (PosixPath('/nets/a.py'), None)
    """
    source, _, name = model.partition(":")
    path, at, _ = name.rpartition("@")
    mine = source == "file" and at and path.endswith(".py")
    return Path(path).expanduser().resolve() if mine else None


def call_function(path: str, name: str) -> Any:
    """What a function in a Python file returns, called without arguments.

    The file may import those beside it, which come before installed ones, as in a script. Random
    states are those of seed 0, and left as they were, with defaults of torch, modules and the
    current folder. What is printed goes to standard error.

    Raises:
        InputError: there is no such file or function, or it fails.
    """
    place = Path(path).expanduser().resolve()
    if not place.is_file():
        raise InputError(f"there is no file {path}; expected Python with a function {name}.")
    try:
        with (
            at_home(place.parent),
            _python_as_it_is(),
            _torch_as_it_is(),
            redirect_stdout(sys.stderr),
        ):
            sys.path.insert(0, str(place.parent))
            return runpy.run_path(str(place))[name]()
    except (Exception, SystemExit) as error:  # code of others fails in ways of its own
        raise InputError(
            f"{path}@{name} made no model: {type(error).__name__}: {error}. Expected a function "
            f"{name}() in that file, which returns a module."
        ) from error


@contextmanager
def at_home(folder: Path | None) -> Generator[None, None, None]:
    """Inside, modules of a folder are found, after installed ones; in the end they are forgotten.

    They are read again by each block, so that none is an old one, or that of another folder.
    """
    if folder is None or folder in _home:
        yield
        return
    hidden = _loaded(lambda name, module: _lies_in(folder, module) or _hides(folder, name, module))
    for name in hidden:
        del sys.modules[name]
    paths = list(sys.path)
    _home.append(folder)
    try:
        sys.path.append(str(folder))
        yield
    finally:
        _home.remove(folder)
        sys.path[:] = paths
        for name in _loaded(lambda _, module: _lies_in(folder, module)):
            del sys.modules[name]
        sys.modules.update(hidden)


@contextmanager
def _python_as_it_is() -> Generator[None, None, None]:
    """Python's own settings are put back after; random states inside are those of seed 0."""
    where, paths, cached = Path.cwd(), list(sys.path), sys.dont_write_bytecode
    chance, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    sys.dont_write_bytecode = True  # Python tells old ones by their time and size alone
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = paths, cached
        os.chdir(where)
        random.setstate(chance)
        np.random.set_state(numbers)  # noqa: NPY002


@contextmanager
def _torch_as_it_is() -> Generator[None, None, None]:
    """Defaults of torch are put back after, and so is its random state, which is that of seed 0."""
    held = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    kind, threads, grad = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
    )
    try:
        with global_chance(0, [torch.device("cpu")]):
            yield
    finally:
        torch.set_default_dtype(kind)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        if getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None) is not held:
            torch.set_default_device(None if held is None else held.device)


def _loaded(asked: Callable[[str, ModuleType], bool]) -> dict[str, ModuleType]:
    """The modules and packages, with all in them, that are a user's own and for which that holds."""
    modules = {name: module for name, module in sys.modules.items() if module is not None}
    tops = {
        name
        for name, module in modules.items()
        if "." not in name and name not in ("testtime", "torch") and asked(name, module)
        if not any(INSTALLED & set(place.parts) for place in _places(module))
    }
    return {name: module for name, module in modules.items() if name.partition(".")[0] in tops}


def _lies_in(folder: Path, module: ModuleType) -> bool:
    return any(place.resolve().parent == folder for place in _places(module))


def _hides(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether a module of a folder has the name of one from elsewhere, not of one of Python's."""
    found = (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
    return found and name not in sys.stdlib_module_names and any(_places(module))


def _places(module: ModuleType) -> Iterator[Path]:
    """Where a module lies: its folders if it is a package, else its file, if that has its name."""
    folders = getattr(module, "__path__", None)
    file = getattr(module, "__file__", None)
    if folders is not None:
        yield from map(Path, folders)
    elif file is not None and Path(file).name.partition(".")[0] == module.__name__:
        yield Path(file)


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


def files_hash(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 of the contents of files and of their names below a folder."""
    total = hashlib.sha256()
    for name, path in sorted((os.path.relpath(path, root), path) for path in paths):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
