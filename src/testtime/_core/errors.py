"""The errors of the library: each says what was given, what was expected and the way out."""

import difflib
from collections.abc import Iterable


class TesttimeError(Exception):
    """Parent of every error that testtime raises on purpose."""


class InputError(TesttimeError, ValueError):
    """The data handed in cannot be used: empty, not finite, of the wrong shape or type."""


class OptionError(TesttimeError, TypeError):
    """An option that does not exist, or a value that it cannot take."""


class UnknownName(TesttimeError, LookupError):  # noqa: N818  (the field's word, not an action)
    """No method, corruption, data set or paper has this name."""


class ScopeError(TesttimeError, ValueError):
    """The model has none of the tensors or layers that a method works on."""


class StateError(TesttimeError, ValueError):
    """A saved state is truncated, or belongs to another model or method."""


class NeedsSource(TesttimeError, ValueError):  # noqa: N818
    """A method needs something computed on source data that was not given."""


class RunError(TesttimeError, RuntimeError):
    """A benchmark run is empty, half-written, or was started with other settings."""


class WorkFailed(TesttimeError, RuntimeError):  # noqa: N818
    """Work that was rightly asked for came to no end: a worker died, or a method failed on a model."""


class MissingExtra(TesttimeError, ImportError):  # noqa: N818
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs {package}, which is not installed. "
            f"Install it with: pip install 'testtime[{extra}]'"
        )


class TesttimeWarning(UserWarning):
    """Something that is allowed, and rarely what one wants."""


LISTED = 30
"""Names that an error lists; a longer list would hide the sentence before it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that nothing has, with the nearest names that exist.

    Example:
        >>> unknown("method", "tnet", ["tent", "sar"])
        UnknownName("no method is called 'tnet'; did you mean tent? Known: sar, tent")
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    listed = f"Known: {', '.join(known)}" if len(known) <= LISTED else f"{len(known)} are known."
    return UnknownName(f"no {kind} is called {name!r}{hint} {listed}")
