"""Claims of the small checks at their edges."""

import inspect
from typing import Any

from testtime._core.registry import find

Numbers = dict[str, Any]


def assert_edge(slug: str, numbers: Numbers, changes: list[Numbers]) -> None:
    """The claim holds of the numbers, and of none of the changed ones."""
    holds = vars(inspect.getmodule(find("check", slug).factory))["holds"]
    assert holds(numbers)
    for change in changes:
        assert not holds(numbers | change), change
