"""One registry and one door: built-ins and outsiders enter alike, loaded when looked for."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from testtime._core.errors import OptionError, unknown
from testtime._core.options import check_types

ROOMS = {
    "method": "testtime.adaptation.methods",
    "decoding": "testtime.decode.methods",
    "check": "testtime.papers.checks",
}
"""Kind of entry -> the folder whose files register entries of that kind."""

_entries: dict[str, dict[str, "Entry"]] = {kind: {} for kind in ROOMS}
_loaded: set[str] = set()
EMPTY = inspect.Parameter.empty
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """A registered factory: its name, the paper it comes from and what it needs."""

    name: str
    paper: str
    factory: Callable[..., Any]
    needs: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """First line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Keyword-only options and their defaults."""
        return {p.name: p.default for p in inspect.signature(self.factory).parameters.values()}

    def build(self, **options: Any) -> Any:
        """Calls the factory; an option that it does not have or cannot take is an `OptionError`."""
        for option in options:
            if option not in self.options:
                raise OptionError(f"{self.name}: {unknown('option', option, self.options)}")
        known = inspect.signature(self.factory, eval_str=True).parameters
        told = {
            name: value for name, value in options.items() if known[name].annotation is not EMPTY
        }
        check_types(told, {name: known[name].annotation for name in told})
        return self.factory(**options)


@dataclass(frozen=True)
class Info:
    """What an entry says of itself: name, paper (slug of the catalogue), summary, options, needs."""

    name: str
    paper: str
    summary: str
    options: dict[str, Any]
    needs: tuple[str, ...]


def register(
    kind: str, *, paper: str = "", name: str = "", needs: tuple[str, ...] = ()
) -> Callable[[F], F]:
    """Decorator: enters a factory under its own name (underscores become hyphens) or `name`.

    Every option of the factory has a default, and its annotation, if any, is what values are checked by.
    A function that is defined anew, as in a notebook, takes the place of the old one.

    Args:
        kind: of entry: "method", "decoding" or "check".
        paper: slug of the catalogue; "" for none.
        name: where it is another than the factory's.
        needs: what a caller gives besides options. A method leaves it out: its recipe says it.

    Raises:
        UnknownName: no such kind.
        OptionError: another module has that name; the name is not letters, digits, hyphens and the
            like; or an option has no default or no name.

    Example:
        >>> from testtime.adaptation.methods.tent import tent
        >>> register("method", paper="tent")(tent) is tent  # as its file does; again changes nothing
        True
    """
    if kind not in ROOMS:
        raise unknown("kind of entry", kind, ROOMS)

    def enter(factory: F) -> F:
        own = name or getattr(factory, "__name__", repr(factory)).replace("_", "-")
        _check(kind, own, factory)
        entry = Entry(own, paper, factory, needs)
        if not factory.__module__.startswith(ROOMS[kind]):
            _load(kind)  # names of the library are taken, also those that nobody asked for yet
        owner = _entries[kind].setdefault(entry.name, entry)
        if owner.factory.__module__ != factory.__module__:
            raise OptionError(
                f"two owners of the {kind} {entry.name!r}: "
                f"{owner.factory.__module__} and {factory.__module__}. Rename one."
            )
        _entries[kind][entry.name] = entry
        return factory

    return enter


def _check(kind: str, name: str, factory: Any) -> None:
    if not callable(factory):
        raise OptionError(
            f"{factory!r} cannot be registered; expected a function that makes a {kind}"
        )
    if not re.fullmatch(r"[\w.+-]+", name):
        raise OptionError(
            f"{name!r} is no name for a {kind}; expected letters, digits, '-', '.' and '+' alone, as "
            f"register({kind!r}, name='my-{kind}')"
        )
    for option in inspect.signature(factory).parameters.values():
        if option.default is option.empty or option.kind is option.POSITIONAL_ONLY:
            raise OptionError(
                f"{name}: {option} has no default or no name; expected options as in "
                f"def {name.replace('-', '_')}(*, lr: float = 1e-3)"
            )


def entries(kind: str) -> Mapping[str, Entry]:
    """All entries of a kind: the files of its folder, then entry points `testtime.<kind>`."""
    if kind not in _loaded:
        _load(kind)
        for point in entry_points(group=f"testtime.{kind}"):
            point.load()
        _loaded.add(kind)
    return dict(sorted(_entries[kind].items()))


def _load(kind: str) -> None:
    folder = importlib.import_module(ROOMS[kind])
    for module in pkgutil.iter_modules(folder.__path__, f"{ROOMS[kind]}."):
        importlib.import_module(module.name)


def infos(kind: str) -> dict[str, Info]:
    """What all entries of a kind say of themselves, by name."""
    return {
        name: Info(name, entry.paper, entry.summary, entry.options, entry.needs)
        for name, entry in entries(kind).items()
    }


def find(kind: str, name: str) -> Entry:
    """The entry of that name; an unknown name is answered with the nearest."""
    known = entries(kind)
    if name not in known:
        raise unknown(kind, name, known)
    return known[name]
