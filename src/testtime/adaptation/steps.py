"""A step on a batch, under way and ended: its answer may be known long before it ends."""

from collections.abc import Generator
from typing import Any, NamedTuple

from torch import Tensor

from testtime._core.outcomes import Outcome
from testtime.adaptation.state import State


class Step(NamedTuple):
    """What a step gives: the answer, the state after it, and what became of it."""

    output: Any
    logits: Tensor
    state: State
    outcome: Outcome
    measured: dict[str, Any]


Steps = Generator[Any, None, Step]
"""A step under way: it gives the output as soon as that is known, and ends with the whole step."""


def ended(steps: Steps) -> Step:
    """The step that is under way, brought to its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def begun(steps: Steps) -> tuple[Any, Step | None]:
    """The output of a step under way, and the whole step where nothing is left to do."""
    try:
        return next(steps), None
    except StopIteration as end:
        return end.value.output, end.value
