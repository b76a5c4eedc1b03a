"""SKIT's claim: one may look after every pair, and is wrong no more often than one said."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.guard.independence import Independence
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Y = beta X + noise, 600 points, 40 streams for each beta, alpha 0.05: SKIT rejects at most "
    "10 % at beta 0 and at least 90 % at beta 0.5, after ever fewer points as beta grows; a "
    "correlation test that is looked at every 20 points rejects more than 15 % at beta 0. With the "
    "witnesses COCO and KCC it rejects at most 10 % at beta 0 and at least 90 % at beta 1."
)
BETAS = (0.0, 0.3, 0.5, 1.0)
STREAMS = 40
POINTS = 600


@register("check", paper="skit", name="skit")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Rejections and points used, by strength of dependence."""
    return reproduce(
        "skit", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Share rejected in percent, and mean number of points used."""
    for beta in BETAS:
        chance = generator(seed, "skit", beta)
        x, noise = torch.randn(2, POINTS, STREAMS, 1, generator=chance, dtype=torch.float64)
        y = beta * x + noise
        test = Independence(gamma_x=1 / 4, gamma_y=1 / (4 * (1 + beta**2)))
        used = _points_used(test, x, y)
        yield f"rejected, beta {beta}", _percent(used <= POINTS)
        yield f"points, beta {beta}", float(used.clamp(max=POINTS).double().mean())
        for witness in ("coco", "kcc") if beta in (0, 1) else ():
            used = _points_used(replace(test, witness=witness), x, y)
            yield f"rejected by {witness.upper()}, beta {beta}", _percent(used <= POINTS)
        if beta == 0:
            yield "rejected by correlation, beta 0", _peeked(x[..., 0], y[..., 0])


def _points_used(test: Independence, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Points until the wealth of each stream reaches 1 / alpha; more than there are if never."""
    state, used = test.init(), torch.full((x.shape[1],), POINTS + 1)
    for i in range(0, POINTS, 2):
        state, alarm = test.step(state, x[i : i + 2], y[i : i + 2])
        hit = alarm.parts >= -math.log(test.alpha)
        used = torch.where(hit, used.clamp(max=i + 2), used)
    return used


def _percent(hit: torch.Tensor) -> float:
    return 100 * float(hit.double().mean())


def _peeked(x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of streams whose correlation looks significant at one of the looks, by Fisher's z."""
    hit = torch.zeros(x.shape[1], dtype=torch.bool)
    for n in range(20, POINTS + 1, 20):
        a, b = (each[:n] - each[:n].mean(0) for each in (x, y))
        r = (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()
        hit |= r.atanh().abs() * math.sqrt(n - 3) > 1.96
    return _percent(hit)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    points = [found[f"points, beta {beta}"] for beta in BETAS]
    return (
        found["rejected, beta 0.0"] <= 10
        and found["rejected, beta 0.5"] >= 90
        and all(more > fewer for more, fewer in pairwise(points))
        and found["rejected by correlation, beta 0"] > 15
        and all(found[f"rejected by {each}, beta 0.0"] <= 10 for each in ("COCO", "KCC"))
        and all(found[f"rejected by {each}, beta 1.0"] >= 90 for each in ("COCO", "KCC"))
    )
