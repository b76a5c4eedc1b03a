"""The claim for batch statistics: those of the test batch mend a shift, if its labels are mixed."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import testtime as tt
from testtime._core.registry import register
from testtime.papers.digits import (
    CORRUPTIONS,
    Images,
    accuracy,
    correlated,
    digits,
    stream,
    trained,
)
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five corruptions of digits: mean accuracy of bn-adapt is at least 30 points above source, and "
    "with alpha 0.5 it lies between the two. On contrast, fog and invertmix with labels in "
    "Dirichlet order (0.1) bn-adapt loses more than 25 points against shuffled labels."
)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("source", {}),
    "bn-adapt, alpha 0.5": ("bn-adapt", {"alpha": 0.5}),
    "bn-adapt": ("bn-adapt", {}),
}
CORRELATED = ("contrast", "fog", "invertmix")


@register("check", paper="bn-adapt", name="bn-adapt")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Source, half and whole batch statistics; shuffled and correlated labels."""
    return reproduce(
        "bn-adapt", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean accuracy in percent over corruptions."""
    model, held = trained(seed), digits(seed, "test")

    def mean_accuracy(method: str, options: dict[str, Any], sent: list[list[Images]]) -> float:
        return fmean(accuracy(tt.adapt(model, method, **options), batches) for batches in sent)

    shuffled = {name: stream(held, name, seed=seed, repeats=2) for name in CORRUPTIONS}
    for name, (method, options) in METHODS.items():
        yield name, mean_accuracy(method, options, list(shuffled.values()))
    orders = {
        "shuffled": [shuffled[name] for name in CORRELATED],
        "correlated": [correlated(held, name, seed=seed, delta=0.1) for name in CORRELATED],
    }
    for order, sent in orders.items():
        yield f"bn-adapt, three {order}", mean_accuracy("bn-adapt", {}, sent)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["bn-adapt"] >= found["source"] + 30
        and found["source"] < found["bn-adapt, alpha 0.5"] < found["bn-adapt"]
        and found["bn-adapt, three shuffled"] - found["bn-adapt, three correlated"] > 25
    )
