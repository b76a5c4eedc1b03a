"""SMILE's claim: the variance of NWJ and DV grows with e^I, clipping the density ratio bounds it."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.information.bounds import donsker_varadhan, infonce, nwj, smile_bound
from testtime.measures.information.laws import gaussian
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Twenty-dimensional Gaussians with the best possible critic, 400 batches of 64: at 6 and 10 nats "
    "the standard deviations order NWJ > DV > SMILE (tau 5) > SMILE (tau 1); that of NWJ grows more "
    "than fivefold from 2 to 10 nats; InfoNCE never exceeds ln 64."
)
BOUNDS = {
    "NWJ": lambda scores: nwj(scores + 1),  # its best critic is 1 + the log ratio
    "DV": donsker_varadhan,
    "SMILE 5": smile_bound,
    "SMILE 1": partial(smile_bound, clip=1.0),
    "InfoNCE": infonce,
}
TRUTHS = (2, 6, 10)
DIMS, BATCH, ROUNDS = 20, 64, 400


@register("check", paper="smile", name="smile")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Means and spreads over batches, nothing trained."""
    return reproduce(
        "smile", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean and standard deviation of each estimate, largest value of InfoNCE, in nats."""
    for truth in TRUTHS:
        values: dict[str, list[float]] = {name: [] for name in BOUNDS}
        random = generator(seed, "smile", "bench", truth)
        for _ in range(ROUNDS):
            scores = best_scores(truth, random)
            for name, bound in BOUNDS.items():
                values[name].append(float(bound(scores)))
        for name, found in values.items():
            tensor = torch.tensor(found, dtype=torch.float64)
            yield f"{name}, mean at {truth} nats", float(tensor.mean())
            yield f"{name}, deviation at {truth} nats", float(tensor.std())
        yield f"InfoNCE, largest at {truth} nats", max(values["InfoNCE"])


def best_scores(truth: float, random: torch.Generator) -> torch.Tensor:
    """The true log density ratio of every x of a batch with every y."""
    x, y, _ = gaussian(BATCH, dims=DIMS, information=truth, generator=random)
    left = math.exp(-2 * truth / DIMS)
    rho = math.sqrt(1 - left)
    gap = (y[None] - rho * x[:, None]) ** 2 / left
    return ((y[None] ** 2 - gap - math.log(left)) / 2).sum(-1)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    order = ("NWJ", "DV", "SMILE 5", "SMILE 1")
    spreads = [[found[f"{name}, deviation at {t} nats"] for name in order] for t in TRUTHS[1:]]
    grown = found["NWJ, deviation at 10 nats"] > 5 * found["NWJ, deviation at 2 nats"]
    capped = all(found[f"InfoNCE, largest at {t} nats"] <= math.log(BATCH) for t in TRUTHS)
    return grown and capped and all(a > b > c > d for a, b, c, d in spreads)
