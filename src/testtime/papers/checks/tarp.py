"""TARP's claim: samples that are too narrow, too wide or shifted show in the expected coverage.

The thresholds were set for 500 simulations, which are too few for them: by the Kolmogorov-Smirnov law
an exact sampler then deviates by more than 0.06 in one run of twenty. With 5,000 it does so with a
chance below 1e-15. The shift by one sigma has a deviation of 0.10 with any number of simulations; 5,000
(standard error 0.006) keep the chance that it is found below 0.08 under 1e-3.
"""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.guard.tarp import tarp
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five parameters, 5,000 simulations (with 500, chance alone exceeds 0.06 in one run of twenty), "
    "500 samples: the largest deviation of the coverage from the level is below 0.06 for exact "
    "samples and above 0.08 for half the width, twice the width and a shift by one sigma; samples of "
    "the prior stay below 0.06 with references that do not depend on the data, and above 0.08 with "
    "references near them."
)
SIMULATIONS, SAMPLES, PARAMETERS = 5000, 500, 5
FAULTS = ("half width", "double width", "shifted", "prior, references near the data")


@register("check", paper="tarp", name="tarp")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Largest deviation of the coverage, for exact and faulty samplers."""
    return reproduce(
        "tarp", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Largest |coverage - level|."""
    chance = generator(seed, "tarp")
    shape, kind = (SIMULATIONS, PARAMETERS), {"generator": chance, "dtype": torch.float64}
    mean = 10 * torch.rand(shape, **kind) - 5
    sigma = (-1 - 4 * torch.rand(shape, **kind)).exp()
    truth = mean + sigma * torch.randn(shape, **kind)
    noise = torch.randn(SAMPLES, *shape, **kind)
    for name, samples in (
        ("exact", mean + sigma * noise),
        ("half width", mean + 0.5 * sigma * noise),
        ("double width", mean + 2 * sigma * noise),
        ("shifted", mean + sigma * (noise + 1)),
    ):
        yield name, tarp(samples, truth, seed=seed).deviation
    prior = 10 * torch.rand(SAMPLES, *shape, **kind) - 5
    yield "prior", tarp(prior, truth, seed=seed).deviation
    near = mean + sigma * torch.randn(shape, **kind)
    yield "prior, references near the data", tarp(prior, truth, references=near).deviation


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    exact = found["exact"] < 0.06 and found["prior"] < 0.06
    return exact and all(found[name] > 0.08 for name in FAULTS)
