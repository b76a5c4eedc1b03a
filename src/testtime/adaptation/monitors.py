"""What gates and guards have in common: verbs, and a memory that lies in the state of a stream."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor

from testtime._core.errors import OptionError, StateError, TesttimeError
from testtime.adaptation.outputs import map_tensors

VERBS = ("update", "reset", "state_dict", "load_state_dict")
ASIDE = "raised by the"
"""Begins the note of an error that is a monitor's own."""
_asking = threading.RLock()
"""One asks at a time: two streams that share a monitor must not mix its memories."""


def check_monitor(what: str, given: Any, update: str) -> None:
    """Refuses what cannot be one.

    Args:
        what: "gate" or "guard".
        given: by the caller.
        update: its first verb with arguments, in words.

    Example:
        >>> check_monitor("gate", 3, "update(values) -> alarm")
        Traceback (most recent call last):
        testtime._core.errors.OptionError: gate is of type int, which has no update; expected True...
    """
    if isinstance(given, type):
        raise OptionError(f"{what} is the class {given.__name__}; expected an instance of it.")
    for name in VERBS:
        if not callable(getattr(given, name, None)):
            raise OptionError(
                f"{what} is of type {type(given).__name__}, which has no {name}; expected True, or a "
                f"{what}: {update}, reset, state_dict and load_state_dict."
            )


def check_memory(what: str, monitor: Any, memory: Any, state: str) -> None:
    """Refuses the memory of another kind of monitor.

    Args:
        what: "gate" or "guard".
        monitor: that would go on.
        memory: to go on from; None where nothing was seen.
        state: whose it is, in words.
    """
    try:
        if memory is not None:
            with _asking:
                monitor.load_state_dict(_apart(monitor, memory))
    except Exception as error:
        raise StateError(
            f"{state} was made with another {what}: {type(monitor).__name__} does not take its memory "
            f"({type(error).__name__}: {error}). Give tt.adapt the {what} that made it."
        ) from error


def asked(what: str, monitor: Any, memory: Any, *values: Tensor) -> tuple[bool | None, Any]:
    """What a monitor says of a batch, None where it does not know, and what it remembers then.

    Args:
        what: "gate" or "guard".
        monitor: asked from `memory` on; from the beginning where that is None.
        memory: of the stream.
        values: of the batch.

    Raises:
        OptionError: it says what is neither true nor false.
    """
    with _asking, _noted(what, monitor):
        if memory is None:
            monitor.reset()
        else:
            monitor.load_state_dict(_apart(monitor, memory))
        said = monitor.update(*values)
        return _word(what, monitor, said), _apart(monitor, monitor.state_dict())


def is_aside(error: BaseException) -> bool:
    """Whether a monitor raised an error, so that it says nothing of the model."""
    return any(note.startswith(ASIDE) for note in getattr(error, "__notes__", ()))


@contextmanager
def _noted(what: str, monitor: Any) -> Iterator[None]:
    """An error that is raised within stays what it is, with a note of whose it is."""
    try:
        yield
    except TesttimeError:
        raise
    except Exception as error:
        error.add_note(f"{ASIDE} {what}, a {type(monitor).__name__}; the adapter is as it was")
        raise


def _word(what: str, monitor: Any, said: Any) -> bool | None:
    if said is None:
        return None
    try:
        return bool(said)
    except Exception as error:
        raise OptionError(
            f"the {what}, a {type(monitor).__name__}, said {said!r:.100} of a batch; expected one "
            "truth value, or None where it does not know."
        ) from error


def _apart(monitor: Any, memory: Any) -> Any:
    """A copy of a memory, since a state is never written to; of this library's no monitor does."""
    if type(monitor).__module__.startswith("testtime."):
        return memory
    return deepcopy(map_tensors(Tensor.detach, memory))
