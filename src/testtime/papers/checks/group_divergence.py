"""The claim on symmetric laws: an invariant divergence errs as if there were more samples."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.symmetry import (
    invariant_alpha_divergence,
    invariant_mmd,
    invariant_wasserstein,
    rotations,
    sign_flips,
)
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Two samples of one law: uniform in the cube of three dimensions, 200 and 400 points, the plain "
    "W1 is 1.6 to 2.4 times the one under the 8 changes of sign (the rate says 2), and so is the "
    "Lipschitz-regularised alpha-divergence, alpha 2, with 200 points; uniform in the disk, 200 points, kernel width 0.05, the plain MMD is 1.6 to 2.4 times the one under the 4 "
    "quarter turns. W1 under turns by 360 / k degrees falls with k = 1, 4, 16, and so "
    "does the alpha-divergence."
)
REPEATS = 6
POINTS = (200, 400)


@register("check", paper="group-divergence", name="group-divergence")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Plain and invariant divergences of equal laws."""
    return reproduce(
        "group-divergence",
        CLAIM,
        measure=measure,
        holds=holds,
        seeds=seeds,
        on_progress=on_progress,
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Ratios, and W1 in the disk."""
    random = generator(seed, "group-divergence")
    one, signs = torch.eye(3)[None], sign_flips(3)
    for count in POINTS:
        pairs = [(cube(count, random), cube(count, random)) for _ in range(REPEATS)]
        plain = fmean(invariant_wasserstein(x, y, one) for x, y in pairs)
        yield f"W1, {count} points", plain / fmean(invariant_wasserstein(*p, signs) for p in pairs)
        if count == POINTS[0]:
            plain = fmean(invariant_alpha_divergence(x, y, one) for x, y in pairs)
            invariant = fmean(invariant_alpha_divergence(x, y, signs) for x, y in pairs)
            yield f"D2, {count} points", plain / invariant
    pairs = [(disk(POINTS[0], random), disk(POINTS[0], random)) for _ in range(REPEATS)]
    for order in (1, 4, 16):
        turns = rotations(order)
        yield f"W1, {order} turns", fmean(invariant_wasserstein(*pair, turns) for pair in pairs)
        yield (
            f"D2, {order} turns",
            fmean(invariant_alpha_divergence(*pair, turns) for pair in pairs),
        )
    plain, turned = (
        fmean(invariant_mmd(*pair, rotations(order), bandwidth=0.05) for pair in pairs)
        for order in (1, 4)
    )
    yield "MMD, quarter turns", plain / turned


def cube(count: int, random: torch.Generator) -> Tensor:
    """Points in [-1, 1]^3."""
    return 2 * torch.rand(count, 3, generator=random, dtype=torch.double) - 1


def disk(count: int, random: torch.Generator) -> Tensor:
    """Points in the unit disk."""
    radius, turn = torch.rand(2, count, generator=random, dtype=torch.double)
    angle = 2 * math.pi * turn
    return radius.sqrt()[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    ratios = [found[f"W1, {count} points"] for count in POINTS] + [found["MMD, quarter turns"]]
    ratios.append(found[f"D2, {POINTS[0]} points"])
    return all(1.6 <= ratio <= 2.4 for ratio in ratios) and all(
        found[f"{name}, 1 turns"] > found[f"{name}, 4 turns"] > found[f"{name}, 16 turns"]
        for name in ("W1", "D2")
    )
