"""TARP's claim: samples that are too narrow, too wide or shifted show in the expected coverage.

With 500 simulations an exact sampler deviates by more than 0.061 in one run of twenty, by the
Kolmogorov-Smirnov law: the threshold of 0.06 fails as often by chance. Seed 0 is such a run (0.066);
of the twenty seeds from 3 on two are, and the mean of these, 0.038, is about that of the law, 0.039.
"""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.guard.tarp import tarp
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five parameters, 500 simulations, 500 samples: the largest deviation of the coverage from the "
    "level is below 0.06 for exact samples and above 0.08 for half the width, twice the width and a "
    "shift by one sigma; samples of the prior stay below 0.06 with references that do not depend on "
    "the data, and above 0.08 with references near them."
)
SIMULATIONS, SAMPLES, PARAMETERS = 500, 500, 5
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
