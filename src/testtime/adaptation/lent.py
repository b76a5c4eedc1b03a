"""What stands in places of a model for a while, and how it goes, though an interrupt fall in between."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from testtime.adaptation.layers import Hook

ABSENT = object()
"""Stands for what a dictionary did not hold, where None may be held."""


class Lent:
    """Notes what stood in a place before anything else is put there, so that it can be given back.

    `give_back` may be called again where it was interrupted: each of its steps may be done twice.

    Example:
        >>> holder, lent = {"a": 1}, Lent()
        >>> lent.put(holder, "a", 2)
        >>> lent.put(holder, "b", 3)
        >>> holder
        {'a': 2, 'b': 3}
        >>> lent.give_back()
        >>> holder
        {'a': 1}
    """

    def __init__(self) -> None:
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._all: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._flags: list[tuple[Any, str, Any]] = []
        self._hooks: list[Hook] = []

    def keep(self, holder: dict[str, Any], key: str) -> Any:
        """Notes what a dictionary holds, and gives it; `ABSENT` where it holds nothing."""
        value = holder.get(key, ABSENT)
        self._held.append((holder, key, value))
        return value

    def keep_all(self, holder: dict[Any, Any]) -> None:
        """Notes all that a dictionary holds."""
        self._all.append((holder, dict(holder)))

    def put(self, holder: dict[str, Any], key: str, value: Any) -> None:
        """Puts a value into a dictionary."""
        self.keep(holder, key)
        holder[key] = value

    def turn(self, owner: Any, flag: str, value: bool) -> None:
        """Sets a flag of an object."""
        self._flags.append((owner, flag, getattr(owner, flag)))
        setattr(owner, flag, value)

    def hook(self, hook: Hook) -> None:
        """Registers a hook."""
        self._hooks.append(hook)
        hook.register()

    def give_back(self) -> None:
        """All places as they were, the latest first."""
        for hook in self._hooks:
            hook.remove()
        for holder, key, value in reversed(self._held):
            if value is ABSENT:
                holder.pop(key, None)  # an interrupt may have come before it was put there
            else:
                holder[key] = value
        for holder, before in self._all:
            refilled(holder, before)
        for owner, flag, value in reversed(self._flags):
            setattr(owner, flag, value)


def refilled(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    """Makes a dictionary hold what it held; gives whether its keys were others.

    Example:
        >>> now = {"a": 1}
        >>> refilled(now, {"b": 2}), now
        (True, {'b': 2})
    """
    others = now.keys() != before.keys()
    if others:
        now.clear()
        now.update(before)
    return others


@contextmanager
def lending() -> Iterator[Lent]:
    """Gives what notes; all is given back at the end, also after an error.

    Example:
        >>> holder = {"a": 1}
        >>> with lending() as lent:
        ...     lent.put(holder, "a", 2)
        >>> holder
        {'a': 1}
    """
    lent = Lent()
    try:
        yield lent
    finally:
        try:
            lent.give_back()
        except BaseException:  # an interrupt that falls in there waits until all is given back
            lent.give_back()
            raise
