"""A page for each room of the library, and the list of symbols that must stand on them."""

from functools import cache
from pathlib import Path

import griffe

import testtime as tt

SOURCE = Path(tt.__file__).parents[1]
LEFT_OUT = ("testtime.cli",)
"""The command line has a page of its own."""


@cache
def _package() -> griffe.Module:
    package = griffe.load("testtime", search_paths=[SOURCE])
    if not isinstance(package, griffe.Module):
        raise TypeError("testtime is not a package")
    return package


def rooms() -> dict[str, griffe.Module]:
    """Path -> package, for every package below testtime."""
    found: dict[str, griffe.Module] = {}

    def walk(module: griffe.Module) -> None:
        for below in module.modules.values():
            if below.is_init_module and below.path not in LEFT_OUT:
                found[below.path] = below
                walk(below)

    walk(_package())
    return dict(sorted(found.items()))


def files(room: griffe.Module) -> list[griffe.Module]:
    """The modules that lie in a room itself."""
    return sorted((m for m in room.modules.values() if not m.is_init_module), key=lambda m: m.path)


def public_symbols() -> set[str]:
    """Paths of all public functions and classes, and of the public methods of these.

    `forward` of a torch module is left out: its class says what goes in and what comes out.
    """
    found: set[str] = set()
    for room in rooms().values():
        for module in files(room):
            for name, symbol in module.members.items():
                if symbol.is_alias or name.startswith("_"):
                    continue
                if symbol.is_function or symbol.is_class:
                    found.add(symbol.path)
                if symbol.is_class:
                    own = symbol.members.items()
                    found |= {
                        m.path
                        for n, m in own
                        if m.is_function and not n.startswith("_") and n != "forward"
                    }
    return found


def nav() -> list[dict[str, str]]:
    """Name and path of each room's page."""
    return [{_short(path): f"reference/{_short(path)}.md"} for path in rooms()]


def pages() -> dict[str, str]:
    """Path -> Markdown."""
    made = {f"reference/{_short(path)}.md": _page(room) for path, room in rooms().items()}
    return {"reference/index.md": _index(), **made}


def _short(path: str) -> str:
    return path.removeprefix("testtime.")


def _said(module: griffe.Module) -> str:
    text = module.docstring.value if module.docstring else ""
    return text.partition("\n\n")[0].partition("\n")[0]


def _page(room: griffe.Module) -> str:
    shown = "\n\n".join(f"::: {module.path}" for module in files(room))
    return f"# {room.path}\n\n{_said(room)}\n\n{shown}\n"


def _index() -> str:
    names = [
        f"| `tt.{name}` | the room [`{home}`]({name}.md) |"
        if home == f"testtime.{name}"
        else f"| `tt.{name}` | [`{home}.{name}`][{home}.{name}] |"
        if home.startswith("testtime")
        else f"| `tt.{name}` | `{home}.{name}` of Python |"
        for name, home in sorted(tt._HOMES.items())
    ]
    lines = [f"| [`{path}`]({_short(path)}.md) | {_said(room)} |" for path, room in rooms().items()]
    return "\n".join(
        [
            "# Reference\n",
            "A room imports only rooms that stand lower, so each can be used alone. Import from "
            "the file that a symbol lives in: `from testtime.measures.entropy import entropy`.\n",
            "## What `import testtime as tt` gives\n\n| name | lives in |\n|---|---|",
            *names,
            "\n## Rooms\n\n| room | what is in it |\n|---|---|",
            *lines,
        ]
    )
