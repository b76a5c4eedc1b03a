"""Tent's claim: batch statistics help, and lowering the entropy of predictions helps further."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import testtime as tt
from testtime._core.registry import register
from testtime.papers.digits import CORRUPTIONS, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five corruptions of digits, a fresh adapter for each: mean accuracy orders source < bn-adapt "
    "< tent (Adam, lr 5e-3); bn-adapt is at least 30 points above source and tent at least 0.5 "
    "above bn-adapt."
)


@register("check", paper="tent", name="tent")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Source, batch statistics and Tent on corrupted digits."""
    return reproduce(
        "tent", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean accuracy in percent of each method."""
    model, held = trained(seed), digits(seed, "test")
    methods: dict[str, dict[str, Any]] = {"source": {}, "bn-adapt": {}, "tent": {"lr": 5e-3}}
    for method, options in methods.items():
        yield (
            method,
            fmean(
                accuracy(
                    tt.adapt(model, method, seed=seed, **options),
                    stream(held, name, seed=seed, repeats=2),
                )
                for name in CORRUPTIONS
            ),
        )


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["bn-adapt"] >= found["source"] + 30 and found["tent"] >= found["bn-adapt"] + 0.5
