"""The tables of a report as HTML: every name escaped, every number beside its exact value."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from testtime.bench.cells import label
from testtime.bench.metrics import ENOUGH

SLOTS = 6
"""Colours besides the grey of the source model; further methods repeat them in another line."""
LINES = (
    ("solid", "circle"), ("6px,3px", "diamond"), ("2px,3px", "square"), ("9px,3px,2px,3px", "cross"),
    ("9px,3px,2px,3px,2px,3px", "triangle-up"),
)  # fmt: skip
"""Dash and symbol of each round of colours, as Plotly and SVG read them."""

COLUMNS = (
    ("error", "Error", "%", "Mean error over domains, then seeds; ± standard deviation over seeds"),
    ("gain", "Gain", "points", "Error of the source model minus own; in brackets as a share of it"),
    ("nll", "NLL", "nats", "Negative log-likelihood"),
    ("brier", "Brier", "", "Brier score, 0 to 2"),
    ("ece", "ECE", "", "Expected calibration error, 15 bins"),
    ("clean_error", "Clean error", "%", "On source data after the stream, adapting no more"),
    ("time", "Time", "× source", "Median seconds per batch over the source model's"),  # noqa: RUF001
    ("forwards_per_sample", "Forward", "per sample", "Forward passes per sample"),
    ("backwards_per_sample", "Backward", "per sample", "Backward passes per sample"),
    (
        "peak_memory_mb",
        "Memory",
        "MB",
        "Peak while the stream ran: model, data and all; on a GPU what torch held",
    ),
)
"""Key, heading, unit and explanation of each column of the summary."""

WORST_COLUMNS = (
    (
        "worst_class_error",
        "Worst",
        "class, %",
        f"Error of the worst class of each seed, over all domains; {ENOUGH} samples or more",
    ),
    (
        "worst_domain_error",
        "Worst",
        "domain, %",
        f"Error of the worst domain of each seed; {ENOUGH} samples or more",
    ),
)
"""The columns of the worst class, and of the worst domain where a stream has several."""

OPEN_COLUMNS = (
    ("auroc", "AUROC", "", "How well unknown samples are told from known ones; 0.5 is chance"),
    ("fpr95", "FPR95", "", "Unknown samples accepted where 95 % of the known ones are"),
    ("oscr", "OSCR", "", "Area under right known samples against accepted unknown ones"),
    ("h_score", "H-score", "", "Harmonic mean of AUROC and accuracy on known samples"),
)
"""The columns that a stream with unknown classes has besides; errors are of known samples only."""

PACED_COLUMNS = (
    ("paced_error", "Paced", "%", "Error where batches come at the pace of plain inference"),
    (
        "paced_share",
        "Learnt",
        "of 1",
        "Share of the batches that the method was in time to learn from",
    ),
)
"""The columns of a run that was also made as a stream that does not wait."""

DIGITS = {"nll": 3, "brier": 3, "ece": 3, "peak_memory_mb": 1} | {
    key: 3 for key, *_ in OPEN_COLUMNS
}


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour slot, dash and symbol of each method; slot 0 stays the source's own.

    Example:
        >>> styles(["source", "tent", "sar"])["sar"]
        {'slot': 2, 'dash': 'solid', 'symbol': 'circle'}
    """
    others = [name for name in dict.fromkeys(labels) if name != "source"]
    look: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(("source", *others)):
        dash, symbol = LINES[max(place - 1, 0) // SLOTS % len(LINES)]
        slot = (place - 1) % SLOTS + 1 if place else 0
        look[name] = {"slot": slot, "dash": dash, "symbol": symbol}
    return look


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """A number for people; a dash for what is not finite.

    Example:
        >>> number(1.5, 2, sign=True), number(float("nan"), 2)
        ('+1.50', '–')
    """
    if not math.isfinite(value):
        return "–"  # noqa: RUF001
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")  # noqa: RUF001


def swatch(style: dict[str, Any]) -> str:
    """The line of a method as it is drawn in the plots."""
    dash = "" if style["dash"] == "solid" else f' stroke-dasharray="{style["dash"]}"'
    return (
        '<svg class="swatch" width="22" height="10" aria-hidden="true"><path d="M0 5H22" '
        f'style="stroke:var(--m{style["slot"]})"{dash}/></svg>'
    )


def summary(records: Sequence[dict[str, Any]], look: dict[str, dict[str, Any]]) -> str:
    """The summary table: a line for each method. Headings are buttons that sort it."""
    worst, opened, late = (
        [each for each in kind if any(each[0] in record for record in records)]
        for kind in (WORST_COLUMNS, OPEN_COLUMNS, PACED_COLUMNS)
    )
    columns = [*COLUMNS[:2], *worst, *COLUMNS[2:5], *opened, *late, *COLUMNS[5:]]
    heads = "".join(
        f'<th scope="col" title="{tip}"><button type="button">{name}'
        f"<small>{unit or '&nbsp;'}</small></button></th>"
        for _, name, unit, tip in columns
    )
    keys = [key for key, *_ in columns]
    lines = "".join(_line(record, keys, look[label(record)]) for record in records)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Summary table">'
        '<table class="summary"><thead><tr><th scope="col">Method</th>'
        f"{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _line(record: dict[str, Any], keys: Sequence[str], style: dict[str, Any]) -> str:
    cells = "".join(
        f'<td data-key="{key}" data-value="{record.get(key, math.nan)!r}"{_tip(key, record)}>'
        f"{_cell(key, record)}</td>"
        for key in keys
    )
    kind = ' class="base"' if record["method"] == "source" else ""
    return f'<tr{kind}><th scope="row">{swatch(style)}{escape(label(record))}</th>{cells}</tr>'


def _tip(key: str, record: dict[str, Any]) -> str:
    """Names the worst classes of the seeds where one points at their error."""
    known = key == "worst_class_error" and record["worst_class"]
    return f' title="class {escape(record["worst_class"])}"' if known else ""


def _cell(key: str, record: dict[str, Any]) -> str:
    text = number(record.get(key, math.nan), DIGITS.get(key, 2), sign=key == "gain")
    if key == "error" and record["seeds"] > 1:
        text += f"<small>±&nbsp;{number(record['error_std'], 2)}</small>"
    if key == "gain":
        if record["method"] == "source":
            return ""
        kind = "good" if record["gain"] > 0 else "bad" if record["gain"] < 0 else ""
        if not math.isfinite(record["relative"]):
            return text
        share = number(100 * record["relative"], 0, sign=True)
        text = f'<span class="{kind}">{text}</span><small>({share}&nbsp;%)</small>'
    return text


def heat(
    errors: dict[str, dict[str, float]], domains: Sequence[str], look: dict[str, dict[str, Any]]
) -> str:
    """Error of each method in each domain, the colour going with the number.

    Args:
        errors: method -> domain -> error in percent; a domain may be missing.
        domains: the columns, in order.
        look: from `styles`.
    """
    known = [e for own in errors.values() for e in own.values() if math.isfinite(e)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    best = {
        d: min((own.get(d, math.inf) for own in errors.values()), key=_nan_last) for d in domains
    }
    heads = "".join(f'<th scope="col"><span>{escape(_spaced(d))}</span></th>' for d in domains)
    lines = []
    for name, own in errors.items():
        cells = "".join(
            _heat_cell(own.get(d, math.nan), low, high, best[d], f"{name}, {_spaced(d)}")
            for d in domains
        )
        lines.append(f'<tr><th scope="row">{swatch(look[name])}{escape(name)}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Error per domain">'
        f'<table class="heat"><thead><tr><th scope="col">Method</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _heat_cell(value: float, low: float, high: float, best: float, name: str) -> str:
    if not math.isfinite(value):
        return f'<td title="{escape(name)}: none">–</td>'  # noqa: RUF001
    share = (value - low) / (high - low) if high > low else 0.0
    kind = ("hot " if share > 0.55 else "") + ("best" if value == best else "")
    return (
        f'<td class="{kind.strip()}" style="--t:{100 * share:.0f}%" data-value="{value!r}" '
        f'title="{escape(name)}: {number(value, 2)} %">{number(value, 1)}</td>'
    )


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _nan_last(value: float) -> float:
    return value if math.isfinite(value) else math.inf
