"""MINDE's claim: the difference of two learned scores is the mutual information."""

import math
from collections.abc import Iterator, Sequence

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.information.laws import gaussian
from testtime.measures.information.minde import minde
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Gaussians of 2 coordinates and correlation 0.8, and of 5 and 0.6: the conditional MINDE "
    "(width 64, 1500 steps) is within 15 % of the truth; of independent ones it is below 0.05."
)
CASES = {"2 coordinates": (2, 0.8), "5 coordinates": (5, 0.6), "independent": (2, 0.0)}
SAMPLES, STEPS = 5000, 1500


@register("check", paper="minde", name="minde")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """The Gaussian bench."""
    return reproduce(
        "minde", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Estimates and truths in nats."""
    for name, (dims, rho) in CASES.items():
        truth = -dims / 2 * math.log(1 - rho**2)
        random = generator(seed, "minde", "bench", name)
        x, y, _ = gaussian(SAMPLES, dims=dims, information=truth, generator=random)
        yield name, minde(x, y, steps=STEPS, seed=seed).value
        yield f"{name}, truth", abs(truth)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["independent"] < 0.05 and all(
        abs(found[name] - found[f"{name}, truth"]) < 0.15 * found[f"{name}, truth"]
        for name in ("2 coordinates", "5 coordinates")
    )
