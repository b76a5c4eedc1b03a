"""Error over time: the batches of a stream as lines that a plot can carry, of any length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 800
"""Points of a line at most, about one for each pixel of a wide screen."""

WINDOW_SAMPLES = 600
"""Samples that a running error is the mean of, at least: one standard error is then 2 points."""

MOST_VISITS = 500
"""A stream that changes its domain more often than this is drawn like a mixture, without marks."""


@dataclass(frozen=True, kw_only=True)
class Visits:
    """When a stream changes its domain.

    Attributes:
        starts: the first batch of each visit.
        names: the domain of each visit; empty for a mixture or where seeds disagree.
        note: why there are no names; "" where there are.
    """

    starts: tuple[int, ...]
    names: tuple[str, ...]
    note: str = ""


def visits(rows: Sequence[dict[str, Any]]) -> Visits:
    """When the domain changes, read from the traces of one method's rows.

    Args:
        rows: of one method on one stream, any number of seeds.

    Example:
        >>> rows = [{"seed": 0, "domain": "fog", "trace": [{"batch": 0}, {"batch": 1}]},
        ...         {"seed": 0, "domain": "snow", "trace": [{"batch": 2}]}]
        >>> visits(rows)
        Visits(starts=(0, 2), names=('fog', 'snow'), note='')
    """
    orders = {_order([r for r in rows if r["seed"] == seed]) for seed in {r["seed"] for r in rows}}
    if None in orders:
        return Visits(starts=(0,), names=(), note="Domains are mixed, so none is marked.")
    if len(orders) > 1:
        return Visits(starts=(0,), names=(), note="Domains come in another order for each seed.")
    order = next(iter(orders)) or ((0, ""),)
    return Visits(starts=tuple(s for s, _ in order), names=tuple(n for _, n in order))


def _order(rows: Sequence[dict[str, Any]]) -> tuple[tuple[int, str], ...] | None:
    """First batch and name of each visit in one seed; None for a mixture."""
    batches = [np.array([t["batch"] for t in r["trace"]], dtype=np.int64) for r in rows]
    if not sum(map(len, batches)):
        return ()
    owner = np.concatenate([np.full(len(b), i) for i, b in enumerate(batches)])
    batch = np.concatenate(batches)
    if len(np.unique(batch)) < len(batch):
        return None
    sort = batch.argsort()
    owner, batch = owner[sort], batch[sort]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    if len(first) > MOST_VISITS:
        return None
    return tuple((int(batch[i]), str(rows[owner[i]]["domain"])) for i in first)


def error_over_time(rows: Sequence[dict[str, Any]], starts: Sequence[int]) -> dict[str, Any]:
    """Running and cumulative error of one method, in percent, seeds pooled by their samples.

    The running error at a batch is the mean over it and the batches before it in the same visit, as
    many as hold `WINDOW_SAMPLES` samples of one seed, and at least so many that no batch is lost
    when the line is thinned to `POINTS` points. The cumulative error is the mean since the stream began.

    Args:
        rows: of one method on one stream, any number of seeds.
        starts: the first batch of each visit.

    Returns:
        `batch`, `running` and `cumulative`, lists of equal length, and `window` in batches. A batch
        without a finite error is left out of the means; a mean of nothing is None.

    Example:
        >>> trace = [{"batch": 0, "samples": 400, "error": 50.0},
        ...          {"batch": 1, "samples": 400, "error": 20.0}]
        >>> error_over_time([{"seed": 0, "trace": trace}], [0])
        {'batch': [0, 1], 'running': [50.0, 35.0], 'cumulative': [50.0, 35.0], 'window': 2}
    """
    parts = [(t["batch"], t["samples"], t["error"]) for r in rows for t in r["trace"]]
    if not parts:
        return {"batch": [], "running": [], "cumulative": [], "window": 1}
    table = np.array(parts, dtype=np.float64)
    batch, samples, error = table[:, 0].astype(np.int64), table[:, 1], table[:, 2]
    seen = np.bincount(batch, samples)
    samples = np.where(np.isfinite(error), samples, 0.0)
    wrong = _sums(np.bincount(batch, samples * np.nan_to_num(error)))
    count = _sums(np.bincount(batch, samples))
    size = seen.sum() / len(seen) / len({r["seed"] for r in rows})
    window = int(max(1, np.ceil(WINDOW_SAMPLES / size), np.ceil(len(seen) / POINTS)))
    end = np.arange(1, len(seen) + 1)
    start = np.maximum(end - window, _visit_start(starts, len(seen)))
    keep = np.unique(np.linspace(0, len(seen) - 1, min(POINTS, len(seen))).round().astype(np.int64))
    return {
        "batch": keep.tolist(),
        "running": _rounded(wrong[end] - wrong[start], count[end] - count[start], keep),
        "cumulative": _rounded(wrong[end], count[end], keep),
        "window": window,
    }


def _sums(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], values.cumsum()])


def _visit_start(starts: Sequence[int], batches: int) -> NDArray[np.int64]:
    """For each batch, the first batch of its visit."""
    first = np.array([s for s in starts if s < batches], dtype=np.int64)
    own = np.searchsorted(first, np.arange(batches), side="right") - 1
    return np.where(own >= 0, first[own], 0)


def _rounded(
    wrong: NDArray[np.float64], count: NDArray[np.float64], keep: NDArray[np.int64]
) -> list[float | None]:
    pairs = zip(wrong[keep].tolist(), count[keep].tolist(), strict=True)
    return [round(w / n, 3) if n > 0.5 else None for w, n in pairs]
