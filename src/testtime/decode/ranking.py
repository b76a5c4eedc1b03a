"""Top-k ranking by pairwise judgements, and what it costs in calls of the judge.

    compare(a, b): +1 a is better, -1 b is better, 0 undecided (counts as "not better")
    one inference: one call of the judge with up to b independent comparisons
    heapsort:   max-heap of n, pop k               every comparison waits for the one before
    bubblesort: k backward passes over neighbours  the same; many pairs return, a cache answers them
    quicksort:  pivot against all m - 1 others     ceil((m - 1) / b) inferences;
                then into the better side, and into the other only while fewer than k are known
    mergesort:  all merges of a level side by side, each cut at k   (not in the paper)

Each algorithm is a generator: it yields the comparisons that it can ask for at once, is sent the
answers, and returns the order. So the cost model stands in one place, `rank`. With a judge that
contradicts itself (a beats b beats c beats a) the algorithms return different orders.

Reference: Are Optimal Algorithms Still Optimal? Rethinking Sorting in LLM-Based Pairwise Ranking
with Batching and Caching, ACL 2025.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from testtime._core.errors import InputError, OptionError, unknown

Pair = tuple[int, int]
Sorting = Generator[list[Pair], list[int], list[int]]
"""Yields pairs of items, is sent +1, 0 or -1 for each, returns the best k items in order."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The order found, and what finding it cost.

    Attributes:
        order: the best k items, best first.
        comparisons: pairs that the algorithm asked about.
        hits: those of them that the cache answered.
        inferences: calls of the judge, each with at most `batch_size` pairs.
    """

    order: tuple[int, ...]
    comparisons: int
    hits: int
    inferences: int


def rank(
    compare: Callable[[Sequence[Pair]], Sequence[int]],
    count: int,
    *,
    k: int | None = None,
    algorithm: str = "quicksort",
    batch_size: int = 1,
    cache: bool = True,
) -> Ranking:
    """The best k of `count` items by pairwise judgements, with the calls that it took.

    Args:
        compare: the judge, given pairs (a, b) of items 0 to count - 1; for each it answers +1 (a
            is better), -1 (b is better) or 0.
        count: number of items, in their first order.
        k: how many to rank; all when None.
        algorithm: quicksort, heapsort, bubblesort or mergesort.
        batch_size: pairs that one call of the judge takes.
        cache: remember what was answered for each unordered pair.

    Raises:
        OptionError: k, batch_size or algorithm cannot be.
        InputError: the judge gave a wrong number of answers, or an answer that is not +1, 0, -1.

    Example:
        >>> scores = [3, 9, 1, 7]
        >>> def larger(pairs):
        ...     return [(scores[a] > scores[b]) - (scores[a] < scores[b]) for a, b in pairs]
        >>> rank(larger, 4, k=2, batch_size=8)
        Ranking(order=(1, 3), comparisons=6, hits=0, inferences=3)

    Reference: Are Optimal Algorithms Still Optimal?, ACL 2025.
    """
    k = count if k is None else k
    if count < 1 or not 1 <= k <= count or batch_size < 1:
        raise OptionError(
            f"count={count}, k={k}, batch_size={batch_size}: expected at least one item, "
            "1 <= k <= count and batch_size >= 1"
        )
    if algorithm not in ALGORITHMS:
        raise unknown("sorting algorithm", algorithm, ALGORITHMS)
    known: dict[Pair, int] = {}
    comparisons = hits = inferences = 0
    steps = ALGORITHMS[algorithm](count, k)
    try:
        pairs = next(steps)
        while True:
            if not cache:
                known.clear()
            asked = {(min(pair), max(pair)) for pair in pairs}
            fresh = sorted(asked - known.keys())
            for batch in batches(fresh, batch_size):
                known.update(zip(batch, _answers(compare, batch), strict=True))
                inferences += 1
            comparisons += len(pairs)
            hits += len(pairs) - len(fresh)
            pairs = steps.send([known[a, b] if a < b else -known[b, a] for a, b in pairs])
    except StopIteration as end:
        return Ranking(
            order=tuple(end.value), comparisons=comparisons, hits=hits, inferences=inferences
        )


def batches(pairs: Sequence[Pair], size: int) -> Iterable[Sequence[Pair]]:
    """Runs of at most `size` pairs.

    Example:
        >>> list(batches([(0, 1), (1, 2), (2, 3)], 2))
        [[(0, 1), (1, 2)], [(2, 3)]]
    """
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def _answers(
    compare: Callable[[Sequence[Pair]], Sequence[int]], batch: Sequence[Pair]
) -> Sequence[int]:
    answers = compare(batch)
    if len(answers) != len(batch) or any(answer not in (-1, 0, 1) for answer in answers):
        raise InputError(
            f"the judge answered {list(answers)} to {len(batch)} pairs; "
            "expected one of +1, 0, -1 for each"
        )
    return answers


def heapsort(count: int, k: int) -> Sorting:
    """Max-heap of all items, of which k are popped; one comparison at a time."""
    heap = list(range(count))

    def sift(root: int, size: int) -> Generator[list[Pair], list[int], None]:
        while (child := 2 * root + 1) < size:
            if child + 1 < size and (yield [(heap[child + 1], heap[child])])[0] > 0:
                child += 1
            if (yield [(heap[child], heap[root])])[0] <= 0:
                return
            heap[root], heap[child] = heap[child], heap[root]
            root = child

    for root in reversed(range(count // 2)):
        yield from sift(root, count)
    best: list[int] = []
    for size in range(count - 1, count - 1 - k, -1):
        heap[0], heap[size] = heap[size], heap[0]
        best.append(heap[size])
        if len(best) < k:
            yield from sift(0, size)
    return best


def bubblesort(count: int, k: int) -> Sorting:
    """k passes from the last item to the first; ends early after a pass without a swap."""
    items = list(range(count))
    for done in range(min(k, count - 1)):
        swapped = False
        for place in range(count - 1, done, -1):
            if (yield [(items[place], items[place - 1])])[0] > 0:
                items[place], items[place - 1] = items[place - 1], items[place]
                swapped = True
        if not swapped:
            break
    return items[:k]


def quicksort(count: int, k: int) -> Sorting:
    """Partial quicksort: all comparisons with a pivot, the middle item, are asked at once."""
    best: list[int] = []
    waiting = [list(range(count))]
    while len(best) < k:
        items = waiting.pop()
        if len(items) <= 1:
            best += items
            continue
        pivot = items.pop(len(items) // 2)
        answers = yield [(item, pivot) for item in items]
        better = [item for item, answer in zip(items, answers, strict=True) if answer > 0]
        others = [item for item, answer in zip(items, answers, strict=True) if answer <= 0]
        waiting += [others, [pivot], better]  # the last is taken first
    return best[:k]


def mergesort(count: int, k: int) -> Sorting:
    """Bottom-up merges; those of one level go side by side, each until it has k items."""
    runs = [[item] for item in range(count)]
    while len(runs) > 1:
        merges = [_Merge(runs[at : at + 2], k) for at in range(0, len(runs), 2)]
        while active := [merge for merge in merges if merge.open()]:
            answers = yield [(merge.right[0], merge.left[0]) for merge in active]
            for merge, answer in zip(active, answers, strict=True):
                merge.merged.append((merge.right if answer > 0 else merge.left).pop(0))
        runs = [(merge.merged + merge.left + merge.right)[:k] for merge in merges]
    return runs[0]


class _Merge:
    def __init__(self, runs: list[list[int]], k: int) -> None:
        self.left, self.right = runs if len(runs) == 2 else (runs[0], [])
        self.merged: list[int] = []
        self.k = k

    def open(self) -> bool:
        """Whether an answer is still needed."""
        return bool(self.left and self.right) and len(self.merged) < self.k


ALGORITHMS: dict[str, Callable[[int, int], Sorting]] = {
    "quicksort": quicksort,
    "heapsort": heapsort,
    "bubblesort": bubblesort,
    "mergesort": mergesort,
}


def ndcg(order: Sequence[int], gains: Sequence[float], *, k: int = 10) -> float:
    """Normalised discounted cumulative gain of the first k items of an order.

        DCG = sum_i gain_i / log2(i + 1),   i = 1..k,   divided by that of the best order

    Where no item has a gain every order is as good; it is 0 then, as in trec_eval and scikit-learn, so
    that a query without a relevant item counts in a mean over queries as one that found nothing.

    Args:
        order: items, best first.
        gains: of every item, not negative.
        k: how many count.

    Raises:
        InputError: there are no gains, or one is negative or no number.

    Example:
        >>> ndcg([1, 0, 2], [0.0, 3.0, 1.0], k=2)
        0.826
    """
    if not len(gains) or not all(gain >= 0 for gain in gains):
        raise InputError("gains must be numbers that are not negative, one for every item")

    def discounted(values: Iterable[float]) -> float:
        return sum(value / math.log2(place + 2) for place, value in enumerate(values))

    best = discounted(sorted(gains, reverse=True)[:k])
    return discounted(gains[item] for item in order[:k]) / best if best else 0.0
