"""The claim on Markov chains: what an estimate loses has a known constant, unless a state is rare.

A row's loss, so scaled, is half of a chi-squared variable of three degrees: the relative error of its
mean over paths is 0.82 over the root of their number. The thresholds were set for 300 paths, which take
one row of thirty beyond 10 % by chance, and so one chain of eight; with 2,000 that is below 1e-6.

The price of sequential prediction, a factor ln ln n, cannot be seen at these lengths and is not asked.
"""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.markov import (
    row_divergence,
    sample_path,
    stationary_law,
    transition_counts,
    transition_matrix,
)
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Four states, rows from Dirichlet(5), 2,000 stationary paths (with 300, chance alone takes a row "
    "beyond 10 % in one run of eight) of 8000 steps, counts plus 1/2: n pi_i times the mean divergence "
    "of row i is within 10 % of (k - 1) / 2 for KL and of k - 1 for chi-squared, for each row. Two "
    "states, of which one is left with probability 1/n and the other with 0.9: the mean KL of the "
    "other's row, which is seldom seen, stays in [0.1, 0.3] for n = 100, 1000, 10000, while that of "
    "the first falls."
)
LENGTH = 8000
PATHS = 2000
LIMITS = {"kl": 1.5, "chi-squared": 3.0}


@register("check", paper="markov-learning", name="markov-learning")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Risks of estimated transition matrices."""
    return reproduce(
        "markov-learning", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Scaled risks of a chain without rare states, then the risks of one with a rare state."""
    random = generator(seed, "markov-learning")
    matrix = torch.distributions.Dirichlet(torch.full((4, 4), 5.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = matrix.sample().double()
    law = stationary_law(rows)
    paths = sample_path(rows, steps=LENGTH, paths=PATHS, generator=random)
    estimate = transition_matrix(transition_counts(paths, states=4))
    for kind in ("kl", "chi-squared"):
        risk = row_divergence(rows, estimate, kind=kind).mean(0)
        for i, scaled in enumerate((LENGTH * law * risk).tolist(), start=1):
            yield f"{kind} of row {i}, scaled", scaled
    for length in (LENGTH // 80, LENGTH // 8, LENGTH + LENGTH // 4):
        rare = torch.tensor([[1 - 1 / length, 1 / length], [0.9, 0.1]], dtype=torch.double)
        paths = sample_path(rare, steps=length, paths=PATHS, generator=random)
        estimate = transition_matrix(transition_counts(paths, states=2))
        often, seldom = row_divergence(rare, estimate).mean(0)
        yield f"rare row, {length} steps", float(seldom)
        yield f"frequent row, {length} steps", float(often)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    rare = [value for name, value in found.items() if name.startswith("rare")]
    often = [value for name, value in found.items() if name.startswith("frequent")]
    return (
        all(
            abs(found[f"{kind} of row {i}, scaled"] / limit - 1) <= 0.1
            for kind, limit in LIMITS.items()
            for i in range(1, 5)
        )
        and all(0.1 <= value <= 0.3 for value in rare)
        and often == sorted(often, reverse=True)
    )
