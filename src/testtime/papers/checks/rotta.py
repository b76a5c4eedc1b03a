"""RoTTA's claim: robust statistics and a balanced memory survive streams of correlated labels."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import testtime as tt
from testtime._core.registry import register
from testtime.papers.digits import accuracy, correlated, digits, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Digits with labels in Dirichlet order (0.1), a fresh adapter for each of contrast, fog and "
    "invertmix: mean accuracy of rotta is at least 10 points above source, bn-adapt, tent and "
    "cotta."
)
DOMAINS = ("contrast", "fog", "invertmix")
METHODS: dict[str, dict[str, Any]] = {
    "source": {}, "bn-adapt": {}, "tent": {"lr": 5e-3}, "cotta": {"views": 4}, "rotta": {},
}  # fmt: skip


@register("check", paper="rotta", name="rotta")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Correlated labels, one domain at a time."""
    return reproduce(
        "rotta", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean accuracy in percent of each method."""
    model, held = trained(seed), digits(seed, "test")
    streams = [correlated(held, name, seed=seed, delta=0.1) for name in DOMAINS]
    for method, options in METHODS.items():
        yield (
            method,
            fmean(
                accuracy(tt.adapt(model, method, seed=seed, **options), sent) for sent in streams
            ),
        )


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return all(found["rotta"] >= found[name] + 10 for name in METHODS if name != "rotta")
