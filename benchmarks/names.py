"""Names with commas between, as a benchmark is told what to run."""

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable


def names_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Reads an option of names, and refuses those that are not known: `type=` of an argument."""
    known = list(dict.fromkeys(known))

    def names(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ArgumentTypeError(f"{', '.join(unknown)}; expected some of {','.join(known)}")
        return given

    return names
