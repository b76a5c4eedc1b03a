"""The plots of a report, as plain plotly records made from result rows."""

import html
import math
from collections import Counter
from typing import Any

from testtime.bench.metrics import BINS, summarise

Row = dict[str, Any]
Figure = dict[str, Any]

COLOURS = ("#3b82c4", "#e0762d", "#2f9e6e", "#c64a8c", "#8f6bd1", "#b8931c", "#a0704a", "#d2483f")
DASHES = ("solid", "dash", "dot")
POINTS = 800
NAMED = 40


def label(row: Row) -> str:
    """Name of a method, with its options where some were given."""
    return row["method"] if row["options"] in ("", "{}") else f"{row['method']} {row['options']}"


def styles(rows: list[Row]) -> dict[str, dict[str, str]]:
    """One colour and dash for each method, the same in all plots; the source model is grey."""
    names = [name for name in dict.fromkeys(map(label, rows)) if name != "source"]
    found = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "dash": DASHES[i // len(COLOURS) % len(DASHES)],
        }
        for i, name in enumerate(names)
    }
    return {"source": {"color": "#8a8f98", "dash": "solid"}, **found}


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each method, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def running_error(rows: list[Row]) -> tuple[list[int], list[float]]:
    """Percent of wrong answers from the start of the stream up to each batch, over all seeds.

    Returns:
        Batches, counted from 1, and the error up to and with each.

    Example:
        >>> trace = [{"batch": 0, "samples": 2, "error": 50.0},
        ...          {"batch": 1, "samples": 2, "error": 0.0}]
        >>> running_error([{"trace": trace}])
        ([1, 2], [50.0, 25.0])
    """
    samples: Counter[int] = Counter()
    wrong: dict[int, float] = {}
    for row in rows:
        for step in row["trace"]:
            samples[step["batch"]] += step["samples"]
            wrong[step["batch"]] = (
                wrong.get(step["batch"], 0.0) + step["samples"] * step["error"] / 100
            )
    seen, missed = 0, 0.0
    batches, errors = [], []
    for batch in sorted(samples):
        seen += samples[batch]
        missed += wrong[batch]
        batches.append(batch + 1)
        errors.append(100 * missed / seen)
    return batches, errors


def segments(rows: list[Row]) -> list[tuple[int, int, str]]:
    """Stretches of the stream in one domain: first and last batch, counted from 1, and its name.

    Empty when most batches mix domains, as there is no change to mark then.
    """
    shares: dict[int, Counter[str]] = {}
    for row in rows:
        for step in row["trace"]:
            shares.setdefault(step["batch"], Counter())[row["domain"]] += step["samples"]
    if sum(len(share) > 1 for share in shares.values()) > len(shares) / 2:
        return []
    found: list[tuple[int, int, str]] = []
    for batch in sorted(shares):
        name = shares[batch].most_common(1)[0][0]
        if found and found[-1][2] == name:
            found[-1] = (found[-1][0], batch + 1, name)
        else:
            found.append((batch + 1, batch + 1, name))
    return found


def over_time(rows: list[Row], style: dict[str, dict[str, str]]) -> Figure:
    """Running error of each method, with the changes of domain."""
    data = []
    for name, own in by_method(rows).items():
        x, y = running_error(own)
        step = math.ceil(len(x) / POINTS)
        keep = sorted({*range(0, len(x), step), len(x) - 1}) if x else []
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": html.escape(name),
                "x": [x[i] for i in keep],
                "y": [y[i] for i in keep],
                "line": {"width": 2, **style[name]},
                "hovertemplate": "%{fullData.name}: %{y:.1f} % up to batch %{x}<extra></extra>",
            }
        )
    first = rows[0]
    parts = segments([r for r in rows if r["cell"] == first["cell"]])
    axis: Figure = {"title": {"text": "batches, in order of the stream"}, "showgrid": False}
    if 1 < len(parts) <= NAMED:
        axis |= {
            "title": {"text": ""},
            "tickvals": [(start + end) / 2 for start, end, _ in parts],
            "ticktext": [html.escape(name) for *_, name in parts],
            "tickangle": -90 if len(parts) > 4 else 0,
        }
    changes = [
        {"type": "line", "x0": start - 0.5, "x1": start - 0.5, "yref": "paper", "y0": 0, "y1": 1}
        for start, *_ in parts[1:]
    ]
    errors = {"title": {"text": "error so far (%)"}, "rangemode": "tozero"}
    return {
        "data": data,
        "layout": {"xaxis": axis, "yaxis": errors, "shapes": changes},
        "height": 480,
    }


def per_domain(rows: list[Row]) -> Figure:
    """Error of each method in each domain, mean over seeds."""
    groups = by_method(rows)
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    table = [[_mean(own, domain) for own in groups.values()] for domain in domains]
    heat = {
        "type": "heatmap",
        "x": list(range(len(groups))),
        "y": list(range(len(domains))),
        "z": table,
        "text": [["" if v is None else f"{v:.0f}" for v in line] for line in table],
        "texttemplate": "%{text}",
        "customdata": [
            [f"{html.escape(name)}, {html.escape(domain)}" for name in groups] for domain in domains
        ],
        "hovertemplate": "%{customdata}: %{z:.1f} %<extra></extra>",
        "colorscale": [[0, "#f3f6fa"], [0.35, "#9fc3e3"], [0.7, "#3b78b5"], [1, "#0f2f5c"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "zmin": 0,
    }
    layout = {
        "xaxis": {"side": "top", "tickangle": -60, "showgrid": False, **_ticks(list(groups))},
        "yaxis": {"autorange": "reversed", "showgrid": False, **_ticks(domains)},
    }
    return {"data": [heat], "layout": layout, "height": 130 + 24 * len(domains)}


def cost(rows: list[Row], style: dict[str, dict[str, str]]) -> Figure:
    """Mean error against the time a batch takes."""
    data = []
    for line in summarise(rows):
        forwards, backwards = line["forwards_per_sample"], line["backwards_per_sample"]
        passes = f"{forwards:.2f} forward, {backwards:.2f} backward"
        name = label(line)
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": html.escape(name),
                "x": [1000 * line["seconds_per_batch"]],
                "y": [line["error"]],
                "customdata": [passes],
                "error_y": {
                    "type": "data", "array": [line["error_std"]], "visible": line["seeds"] > 1
                },
                "marker": {
                    "size": 12,
                    "color": style[name]["color"],
                    "symbol": ("circle", "diamond", "square")[DASHES.index(style[name]["dash"])],
                },
                "hovertemplate": "%{fullData.name}: %{y:.1f} %, %{x:.3g} ms per batch<br>"
                "%{customdata} passes per sample<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "milliseconds per batch (log)"}, "type": "log", "dtick": "D2"},
        "yaxis": {"title": {"text": "mean error (%)"}, "rangemode": "tozero"},
    }
    return {"data": data, "layout": layout, "height": 420}


def calibration(rows: list[Row], style: dict[str, dict[str, str]]) -> Figure:
    """Accuracy against confidence, over all domains and seeds."""
    even: Figure = {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "#8a8f98", "width": 1, "dash": "dot"},
        "showlegend": False,
        "hoverinfo": "skip",
    }
    data = [even]
    for name, own in by_method(rows).items():
        bins = pooled(own)
        total = sum(b["count"] for b in bins)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": html.escape(name),
                "x": [b["confidence"] for b in bins],
                "y": [b["accuracy"] for b in bins],
                "customdata": [b["count"] for b in bins],
                "line": {"width": 1.5, **style[name]},
                "marker": {"size": [4 + 10 * math.sqrt(b["count"] / total) for b in bins]},
                "hovertemplate": "%{fullData.name}: %{y:.2f} right at confidence %{x:.2f}<br>"
                "%{customdata} answers<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "confidence"}, "range": [0, 1.02]},
        "yaxis": {"title": {"text": "share of right answers"}, "range": [0, 1.02]},
    }
    return {"data": data, "layout": layout, "height": 460}


def pooled(rows: list[Row]) -> list[dict[str, float]]:
    """Reliability bins of several rows as if their samples were one."""
    sums: dict[int, list[float]] = {}
    for row in rows:
        for b in row["reliability"]:
            place = min(max(math.ceil(b["confidence"] * BINS - 1e-9), 1), BINS)
            total = sums.setdefault(place, [0, 0.0, 0.0])
            total[0] += b["count"]
            total[1] += b["count"] * b["confidence"]
            total[2] += b["count"] * b["accuracy"]
    return [
        {"count": n, "confidence": sure / n, "accuracy": right / n}
        for _, (n, sure, right) in sorted(sums.items())
    ]


def _mean(rows: list[Row], domain: str) -> float | None:
    errors = [row["error"] for row in rows if row["domain"] == domain]
    return sum(errors) / len(errors) if errors else None


def _ticks(names: list[str]) -> Figure:
    return {"tickvals": list(range(len(names))), "ticktext": [html.escape(n) for n in names]}
