"""Tables of errors without and with a guard, and which of them hold."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import testtime as tt

Errors = Mapping[tuple[str, str], tuple[float, float]]
"""Method and stream -> error without and with a guard."""


def error(adapter: tt.Adapter, batches: Iterable[tuple[Any, ...]]) -> float:
    """Percent of wrong answers, of samples whose class is known.

    Args:
        adapter: that answers, and learns.
        batches: inputs and labels, and whether the adapter is reset before them, where that is told.
    """
    wrong = seen = 0
    for inputs, labels, *reset in batches:
        if any(reset):
            adapter.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers = adapter(inputs).argmax(1)
        known = labels >= 0
        wrong += int((answers != labels)[known].sum())
        seen += int(known.sum())
    return 100 * wrong / seen


def kept(frozen: float, plain: float, guarded: float) -> bool:
    """At most a point above the frozen model, and 80 % of a gain of more than a point kept."""
    gain = frozen - plain
    return guarded <= frozen + 1 and (gain <= 1 or frozen - guarded >= 0.8 * gain)


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def errors_table(methods: Sequence[str], frozen: Mapping[str, float], errors: Errors) -> list[str]:
    """Lines of a table, a stream each; what does not hold is bold, and what was not run is empty."""
    lines = [line(["stream", "frozen", *methods]), line(["---", *["--:"] * (len(methods) + 1)])]
    for stream, own in frozen.items():
        cells = [stream, f"{own:.1f}"]
        for method in methods:
            pair = errors.get((method, stream))
            text = "" if pair is None else f"{pair[0]:.1f} / {pair[1]:.1f}"
            cells.append(text if pair is None or kept(own, *pair) else f"**{text}**")
        lines.append(line(cells))
    return lines


def said(found: Sequence[tuple[Mapping[str, float], Errors]]) -> str:
    """How many cells of tables hold, and by how much the worst exceeds the frozen model.

    Args:
        found: of each table, the frozen errors and those of the methods.
    """
    cells = [
        (frozen[stream], *pair) for frozen, errors in found for (_, stream), pair in errors.items()
    ]
    held = sum(kept(*cell) for cell in cells)
    worst = max(guarded - own for own, _, guarded in cells)
    return f"{held} of {len(cells)} hold; the largest excess over the frozen model is {worst:.1f} points."
