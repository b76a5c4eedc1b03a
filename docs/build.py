"""The mkdocs hook: pages that are written from the code, so that they cannot lag behind it.

A new method file gets a page and a place in the navigation by itself, and so does a module of a
room and a command. The build fails when a public symbol has no place in the reference.
"""

import zlib
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from pages import commands, corruptions, methods, reference


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the sections of the navigation that are lists of generated pages."""
    generated: dict[str, list[Any]] = {
        "methods/": ["methods/index.md", *methods.nav()],
        "reference/": ["reference/index.md", *reference.nav()],
    }
    config.nav = [
        {title: generated.get(str(path), path) for title, path in entry.items()}
        for entry in config.nav or []
    ]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the generated pages and pictures."""
    made = methods.pages() | reference.pages() | {"cli.md": commands.page()}
    pictures = corruptions.strips()
    for path, content in (made | pictures).items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the contact sheet where a page asks for it."""
    return markdown.replace("<!-- contact sheet -->", corruptions.sheet())


def on_post_build(config: MkDocsConfig) -> None:
    """Fails when a public symbol of the library is not in the built reference."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    there = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    missing = sorted(reference.public_symbols() - there)
    if missing:
        raise PluginError(f"no reference for {', '.join(missing)}: give them docstrings")
