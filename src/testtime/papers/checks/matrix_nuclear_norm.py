"""Matrix Nuclear-Norm's claim: the nuclear norm without singular values, an order cheaper.

It follows the rank of features that lie along axes; of dense features it says nothing.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.spectra import (
    matrix_entropy,
    matrix_nuclear_norm,
    spectrum,
)
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "512 x 1024: at least 10 times faster than matrix entropy. Rows around axis-aligned centres: it "
    "grows with the number of clusters and is never below the nuclear norm. Dense features of rank "
    "1 to 256: it varies by less than 30 %, as the nuclear norm grows."
)
CLUSTERS = (4, 16, 64, 256)
RANKS = (1, 4, 16, 64, 256)
SHAPE = (512, 1024)


@register("check", paper="matrix-nuclear-norm", name="matrix-nuclear-norm")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Time, and features along axes and across them."""
    return reproduce(
        "matrix-nuclear-norm", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """The ratio of times, and both norms."""
    random = generator(seed, "matrix-nuclear-norm")
    features = torch.randn(SHAPE, generator=random)
    cheap, dear = (_seconds(f, features) for f in (matrix_nuclear_norm, matrix_entropy))
    yield "times faster than entropy", dear / cheap
    for number in CLUSTERS:
        centre = torch.randint(number, (256,), generator=random)
        rows = torch.eye(256)[centre] + 0.02 * torch.randn(256, 256, generator=random)
        yield from _both(f"{number} clusters", rows)
    for rank in RANKS:
        left, right = (torch.randn(256, rank, generator=random) for _ in range(2))
        yield from _both(f"rank {rank}", left @ right.T)


def _both(name: str, rows: Tensor) -> Iterator[tuple[str, float]]:
    found = spectrum(rows)
    yield f"{name}, matrix nuclear-norm", found.matrix_nuclear_norm
    yield f"{name}, nuclear norm", found.nuclear_norm


def _seconds(measured: Callable[[Tensor], Tensor], features: Tensor) -> float:
    """The least of three runs of this thread's own time."""
    found: list[float] = []
    for _ in range(3):
        began = time.thread_time()
        measured(features)
        found.append(time.thread_time() - began)
    return max(min(found), 1e-9)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    own = [found[f"{n} clusters, matrix nuclear-norm"] for n in CLUSTERS]
    true = [found[f"{n} clusters, nuclear norm"] for n in CLUSTERS]
    dense = [found[f"rank {r}, matrix nuclear-norm"] for r in RANKS]
    ranks = [found[f"rank {r}, nuclear norm"] for r in RANKS]
    return (
        found["times faster than entropy"] >= 10
        and own == sorted(own)
        and all(a >= b for a, b in zip(own, true, strict=True))
        and max(dense) < 1.3 * min(dense)
        and ranks == sorted(ranks)
    )
