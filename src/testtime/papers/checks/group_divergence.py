"""The claim on symmetric laws: an invariant divergence errs as if there were more samples.

W1 in the disk falls by the square root of k up to four turns, as the rate says; with 64 the wedges are
thinner than the points lie apart, and it falls by less. That it falls at all is sure, as each of these
groups holds the one before. The bound on MMD promises nothing for a kernel that is wider than the disk;
the invariant one is far smaller there all the same, which is measured and not claimed.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
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
    "Two samples of one law: uniform in the cube of three dimensions, 200 and 800 points, the plain "
    "W1 is 1.6 to 2.4 times the one under the 8 changes of sign (the rate says 2), and so is the "
    "Lipschitz-regularised alpha-divergence, alpha 2, with 200 points; uniform in the disk, 200 "
    "points, kernel width 0.05, the plain MMD is 1.6 to 2.4 times the one under the 4 quarter turns. "
    "With 400 points in the disk, W1 under turns by 360 / k degrees falls with k = 1, 4, 16, 64, and "
    "so does the alpha-divergence."
)
REPEATS = 6
CUBE = (200, 800)
DISK = 400
TURNS = (1, 4, 16, 64)
KERNEL = 200
WIDTHS = (0.05, 5.0)


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
    """Ratios in the cube, and divergences in the disk."""
    random = generator(seed, "group-divergence")
    one, signs = torch.eye(3)[None], sign_flips(3)
    for count in CUBE:
        pairs = [(cube(count, random), cube(count, random)) for _ in range(REPEATS)]
        plain = fmean(invariant_wasserstein(x, y, one) for x, y in pairs)
        yield f"W1, {count} points", plain / fmean(invariant_wasserstein(*p, signs) for p in pairs)
        if count == CUBE[0]:
            plain = fmean(invariant_alpha_divergence(x, y, one) for x, y in pairs)
            invariant = fmean(invariant_alpha_divergence(x, y, signs) for x, y in pairs)
            yield f"D2, {count} points", plain / invariant
    pairs = [(disk(DISK, random), disk(DISK, random)) for _ in range(REPEATS)]
    for order in TURNS:
        turns = rotations(order)
        yield f"W1, {order} turns", fmean(invariant_wasserstein(*pair, turns) for pair in pairs)
        yield (
            f"D2, {order} turns",
            fmean(invariant_alpha_divergence(*pair, turns) for pair in pairs),
        )
    pairs = [(disk(KERNEL, random), disk(KERNEL, random)) for _ in range(REPEATS)]
    for width in WIDTHS:
        for order in TURNS[:3]:
            found = [invariant_mmd(*pair, rotations(order), bandwidth=width) for pair in pairs]
            yield f"MMD of width {width}, {order} turns", fmean(found)


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
    ratios = [found[f"W1, {count} points"] for count in CUBE]
    ratios.append(found[f"D2, {CUBE[0]} points"])
    narrow = f"MMD of width {WIDTHS[0]}"
    ratios.append(found[f"{narrow}, 1 turns"] / found[f"{narrow}, 4 turns"])
    return all(1.6 <= ratio <= 2.4 for ratio in ratios) and all(
        found[f"{name}, {fewer} turns"] > found[f"{name}, {more} turns"]
        for name in ("W1", "D2")
        for fewer, more in pairwise(TURNS)
    )
