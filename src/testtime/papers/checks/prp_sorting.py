"""The sorting paper's claim: with batches or a cache the classical winner, heapsort, loses."""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.ranking import Pair, Ranking, rank
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Top 10 of 100 items, first in order of score plus noise, 60 lists: quicksort with two pairs in "
    "a batch takes less than 0.65 of heapsort's inferences, bubblesort with a cache less than 0.85 "
    "of those without, and a judge without contradictions gets the same top 10 from all."
)
LISTS, ITEMS, TOP = 60, 100, 10
WAYS = {
    "heapsort": {"algorithm": "heapsort", "cache": False},
    "heapsort, cached": {"algorithm": "heapsort", "cache": True},
    "quicksort": {"algorithm": "quicksort", "cache": False},
    "quicksort, batch 2": {"algorithm": "quicksort", "batch_size": 2},
    "quicksort, batch 64": {"algorithm": "quicksort", "batch_size": 64},
    "bubblesort": {"algorithm": "bubblesort", "cache": False},
    "bubblesort, cached": {"algorithm": "bubblesort", "cache": True},
}


@register("check", paper="prp-sorting", name="prp-sorting")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Inferences of three sorting algorithms."""
    return reproduce(
        "prp-sorting", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean inferences of each way, and how often it found the true top 10."""
    draw = generator(seed, "prp-sorting")
    lists = [_list(draw) for _ in range(LISTS)]
    right: list[bool] = []
    for way, options in WAYS.items():
        found = [_rank(scores, options) for scores in lists]
        yield way, fmean(each.inferences for each in found)
        right += [
            list(each.order) == sorted(range(ITEMS), key=scores.__getitem__, reverse=True)[:TOP]
            for each, scores in zip(found, lists, strict=True)
        ]
    yield "same top 10", fmean(right)


def _list(draw: torch.Generator) -> list[float]:
    scores = torch.randn(ITEMS, generator=draw)
    first = (scores + torch.randn(ITEMS, generator=draw)).argsort(descending=True)
    return scores[first].tolist()


def _rank(scores: list[float], options: dict[str, object]) -> Ranking:
    def judge(pairs: Sequence[Pair]) -> list[int]:
        return [(scores[a] > scores[b]) - (scores[a] < scores[b]) for a, b in pairs]

    return rank(judge, ITEMS, k=TOP, **options)  # pyright: ignore[reportArgumentType]


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["quicksort, batch 2"] < 0.65 * found["heapsort"]
        and found["bubblesort, cached"] < 0.85 * found["bubblesort"]
        and found["same top 10"] == 1
    )
