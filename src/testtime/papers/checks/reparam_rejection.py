"""RSVI's claim: pathwise gradients through a rejection sampler, unbiased and of low variance."""

import math
from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.rejection_gradients import gamma, surrogate
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "d/da E (z - 3)^2 of gammas, shapes 1, 2, 5 and 20, 400,000 draws: the mean is within four "
    "standard errors of 2 a - 5 with shapes raised by 0 and by 1; raised by 1, the variance is below "
    "0.4 times that of the score function."
)
SHAPES = (1.0, 2.0, 5.0, 20.0)
SAMPLES = 400_000


@register("check", paper="reparam-rejection", name="reparam-rejection")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Gradients of a gamma's shape."""
    return reproduce(
        "reparam-rejection", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Variances, and distances of the means from the truth in standard errors."""
    for shape in SHAPES:
        for raised in (0, 1):
            random = generator(seed, "reparam-rejection", shape, raised)
            a = torch.full((SAMPLES,), shape, dtype=torch.float64, requires_grad=True)
            with torch.enable_grad():
                draw = gamma(a, generator=random, raised=raised)
                values = surrogate((draw.sample - 3) ** 2, draw)
                (found,) = torch.autograd.grad(values.sum(), a)
            error = float(found.std()) / math.sqrt(SAMPLES)
            name = f"shape {shape:g}, raised by {raised}"
            yield f"{name}, standard errors off", abs(float(found.mean()) - 2 * shape + 5) / error
            yield f"{name}, variance", float(found.var())
        z = draw.sample.detach()
        score = (z - 3) ** 2 * (z.log() - a.detach().digamma())
        yield f"shape {shape:g}, score, variance", float(score.var())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return all(
        found[f"shape {a:g}, raised by {b}, standard errors off"] <= 4
        and found[f"shape {a:g}, raised by 1, variance"]
        < 0.4 * found[f"shape {a:g}, score, variance"]
        for a in SHAPES
        for b in (0, 1)
    )
