"""One section of a report: what its tables say and what its plots draw."""

import math
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from testtime._core.errors import TesttimeError
from testtime.bench.cells import label, run_words
from testtime.bench.metrics import BINS, ranked
from testtime.bench.tables import heat, number, summary, swatch
from testtime.bench.traces import Visits, error_over_time, visits
from testtime.streams.scenarios import Scenario

Rows = list[dict[str, Any]]
STRONG = 4
"""Methods besides the source that are drawn at full strength at first: the best ones."""

FACTS = {
    "Model": "model", "Weights (SHA-256)": "weights_sha256", "Data": "data",
    "Images (SHA-256)": "data_sha256", "Code of the model (SHA-256)": "model_code_sha256",
    "Preprocessing": "preprocessing", "Samples, in order (SHA-256)": "samples_sha256",
    "Stream": "stream", "Severity": "severity", "Batch size": "batch_size",
    "Order of labels": "order", "Reset to source": "reset_rule", "Seeds": "seed",
    "Device": "device", "Threads": "threads", "Machine": "machine",
    "Version of torch": "torch_version", "Version of testtime": "version",
}  # fmt: skip


class Section:
    """One model on one stream: its records, the best first.

    Args:
        rows: of this model and stream.
        look: colour, dash and symbol of each method, from `styles`.
    """

    def __init__(self, rows: Rows, look: dict[str, dict[str, Any]]) -> None:
        self.rows = rows
        self.look = look
        self.name = (
            f"{rows[0]['model']} · {_words(rows[0])} · {rows[0]['data']}{run_words(rows[0])}"
        )
        (self.records,) = ranked(rows)
        self.source = next((r for r in self.records if label(r) == "source"), None)
        self.own: dict[str, Rows] = {}
        for row in rows:
            self.own.setdefault(label(row), []).append(row)
        place = sorted(rows, key=lambda r: r["position"])
        self.domains = list(dict.fromkeys(row["domain"] for row in place))

    def html(self, place: int) -> str:
        """The section as HTML; places for the plots are empty."""
        template = (files("testtime.bench") / "assets" / "section.html").read_text("utf-8")
        return Template(template).substitute(
            place=place,
            name=escape(self.name),
            tiles=self._tiles(),
            chips=self._chips(),
            summary=summary(self.records, self.look),
            heat=heat(self._errors(), self.domains, self.look),
            panels=self._panels(place),
            provenance=self._provenance(),
        )

    def data(self) -> dict[str, Any]:
        """What the plots of the section draw."""
        marks = visits(next(iter(self.own.values())))
        pairs = zip(marks.starts, marks.names, strict=False)
        return {
            "methods": [self._method(r, marks) for r in self.records],
            "visits": [{"batch": start, "name": name} for start, name in pairs],
            "note": marks.note,
            "relative": any(math.isfinite(r["time"]) for r in self.records),
        }

    def _method(self, record: dict[str, Any], marks: Visits) -> dict[str, Any]:
        rows = self.own[label(record)]
        keys = ("error", "error_std", "time", "seconds_per_batch", "ece")
        return {
            "name": label(record),
            "time": error_over_time(rows, marks.starts),
            "bins": pooled(rows),
            "numbers": {k: record[k] if math.isfinite(record[k]) else None for k in keys},
        }

    def _errors(self) -> dict[str, dict[str, float]]:
        """Method -> domain -> mean error over seeds, in order of the summary."""
        errors: dict[str, dict[str, float]] = {}
        for record in self.records:
            found: dict[str, list[float]] = {}
            for row in self.own[label(record)]:
                found.setdefault(row["domain"], []).append(row["error"])
            errors[label(record)] = {d: sum(e) / len(e) for d, e in found.items()}
        return errors

    def _tiles(self) -> str:
        """The answer in four numbers."""
        others = [r for r in self.records if label(r) != "source" and math.isfinite(r["error"])]
        tiles: list[tuple[str, str, str]] = []
        if self.source is not None:
            own = number(self.source["error"], 1)
            tiles.append(("Source model, not adapted", f"{own} %", "error"))
        if others:
            best = others[0]
            tiles.append((f"Best: {label(best)}", f"{number(best['error'], 1)} %", "error"))
            if math.isfinite(best["relative"]):
                share = number(-100 * best["relative"], 0, sign=True)
                better = sum(r["gain"] > 0 for r in others)
                note = f"error; {better} of {len(others)} methods lower it"
                tiles.append(("Best against source", f"{share} %", note))
            if math.isfinite(best["time"]):
                cost = f"{number(best['time'], 1)} ×"  # noqa: RUF001
                tiles.append(("Cost of the best", cost, "time of source"))
        return "".join(
            f"<div><dt>{escape(name)}</dt><dd><b>{value}</b> <span>{note}</span></dd></div>"
            for name, value, note in tiles
        )

    def _chips(self) -> str:
        names = [label(r) for r in self.records]
        strong = {"source", *[n for n in names if n != "source"][:STRONG]}
        return "".join(
            f'<button type="button" class="chip" data-method="{escape(n)}" '
            f'aria-pressed="{str(n in strong).lower()}">{swatch(self.look[n])}{escape(n)}</button>'
            for n in names
        )

    def _panels(self, place: int) -> str:
        return "".join(
            f"<figure><figcaption>{swatch(self.look[label(r)])}{escape(label(r))}"
            f"<small>ECE {number(r['ece'], 3)}</small></figcaption>"
            f'<div class="plot panel" id="panel-{place}-{i}" role="img" '
            f'aria-label="Reliability of {escape(label(r))}"></div></figure>'
            for i, r in enumerate(self.records)
        )

    def _provenance(self) -> str:
        lines: list[str] = []
        for name, key in FACTS.items():
            values = dict.fromkeys(str(row[key]) for row in self.rows if row.get(key) is not None)
            if not values:
                continue
            text = ("<br>" if "SHA" in name else ", ").join(map(escape, values))
            lines.append(f"<dt>{name}</dt><dd>{text}</dd>")
        if scenario := self.rows[0].get("scenario"):
            lines.append(f"<dt>Scenario (TOML)</dt><dd><pre>{escape(scenario)}</pre></dd>")
        return f"<dl>{''.join(lines)}</dl>"


def _words(row: dict[str, Any]) -> str:
    """A stream in words; severity and batch size always, other choices where they are unusual."""
    text = f"{row['stream']}, severity {row['severity']}, batches of {row['batch_size']}"
    try:
        scenario = Scenario.from_toml(row.get("scenario") or "?")
    except TesttimeError:
        return text
    if scenario.samples is not None:
        text += f", {scenario.samples} samples a domain"
    if scenario.rounds > 1:
        text += f", {scenario.rounds} rounds"
    return text


def pooled(rows: Rows) -> list[dict[str, float]]:
    """Reliability bins of several rows as if their samples were one.

    Example:
        >>> bins = [{"count": 4, "confidence": 0.9, "accuracy": 0.5}]
        >>> pooled([{"reliability": bins}, {"reliability": bins}])
        [{'count': 8, 'confidence': 0.9, 'accuracy': 0.5}]
    """
    sums = [[0.0, 0.0, 0.0] for _ in range(BINS)]
    for item in (b for row in rows for b in row["reliability"]):
        if not item["count"] or not math.isfinite(item["confidence"] + item["accuracy"]):
            continue
        own = sums[min(max(math.ceil(item["confidence"] * BINS - 1e-9), 1), BINS) - 1]
        for i, value in enumerate((1.0, item["confidence"], item["accuracy"])):
            own[i] += item["count"] * value
    return [
        {"count": int(n), "confidence": round(c / n, 4), "accuracy": round(a / n, 4)}
        for n, c, a in sums
        if n
    ]
