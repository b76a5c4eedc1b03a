"""A stream that does not wait: who adapts longer than plain inference takes misses batches.

Nothing waits for a clock here: which batches a method is late for follows from two measured times,
so that the same times give the same score.

    batch n comes at n tau, tau being the time of plain inference
    it is learnt from if the method is free before batch n + 1 comes: from max(n tau, free) on, for s
    else it is answered with the state there is, which takes no time here

Reference: Alfarra, Itani, Pardo, Alhuwaider, Ramazanova, Pérez, Cai, Müller, Ghanem, Evaluation of
Test-Time Adaptation Under Computational Time Constraints, ICML 2024; there a method that is late
misses the batch at once, here it may be late by less than a batch, so that a few percent cost a few
percent of the batches and not half of them.
"""

from collections.abc import Sequence
from statistics import fmean


def on_average(seconds: Sequence[float]) -> float:
    """What a method takes for a batch: the mean, which counts updates that come now and then.

    The first batch, in which a method also looks at the model, is left out where there are others.

    Args:
        seconds: of each batch, in order.

    Example:
        >>> on_average([9.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 5.0])
        2.0
    """
    return fmean(seconds[1:] or seconds)


def schedule(batches: int, *, pace: float, seconds: float | Sequence[float]) -> list[bool]:
    """Which batches of a stream that does not wait a method learns from.

    Args:
        batches: that come.
        pace: tau, seconds between them.
        seconds: s, that the method takes for a batch it learns from; or one for each batch.

    Example:
        >>> schedule(6, pace=1.0, seconds=1.0)
        [True, True, True, True, True, True]
        >>> schedule(6, pace=1.0, seconds=2.0)
        [True, True, False, True, False, True]
    """
    each = [seconds] * batches if isinstance(seconds, float | int) else seconds
    free, learns = 0.0, list[bool]()
    for number in range(batches):
        due, last = number * pace, (number + 1) * pace
        learns.append(free <= last * (1 + 1e-9))  # sums of times are rounded
        if learns[-1]:
            free = max(free, due) + each[number]
    return learns
