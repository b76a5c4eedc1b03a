"""One self-contained HTML file from the rows of a run."""

import html
import json
import math
from pathlib import Path
from typing import Any

from testtime._core.errors import MissingExtra, RunError
from testtime._core.files import atomic
from testtime.bench.figures import calibration, cost, label, over_time, per_domain, styles
from testtime.bench.metrics import summarise

Row = dict[str, Any]

COLUMNS = (
    ("error", "error %", 1, 1),
    ("clean_error", "clean error % afterwards", 1, 1),
    ("nll", "NLL (nats)", 1, 3),
    ("brier", "Brier", 1, 3),
    ("ece", "ECE %", 100, 1),
    ("seconds_per_batch", "ms per batch", 1000, 1),
    ("forwards_per_sample", "forward passes per sample", 1, 2),
    ("backwards_per_sample", "backward passes per sample", 1, 2),
    ("peak_memory_mb", "peak memory MB", 1, 0),
)
SETTING = ("data", "model", "stream", "severity", "batch_size", "scenario")


def write_report(rows: list[Row], path: str | Path, *, title: str = "testtime") -> Path:
    """Writes tables and plots of a run as one HTML file that needs no network.

    Each data set, model and stream has a section of its own: the table, error over time, error in
    each domain, cost against error, and reliability. The same rows give the same file.

    Args:
        rows: as `testtime.bench.runner.run` and `testtime.bench.store.read_run` return them.
        path: of the file; one that is there is replaced, wholly or not at all.
        title: heading of the page.

    Returns:
        The path.

    Raises:
        RunError: there are no rows, or they lack columns. Nothing is written.
        MissingExtra: plotly is not installed.
    """
    _check(rows)
    library = _plotly()
    style = styles(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    figures: list[dict[str, Any]] = []
    sections = [_section(own, style, figures) for own in groups.values()]
    page = PAGE.format(
        title=html.escape(title),
        style=STYLE,
        sections="".join(sections),
        footer=_footer(rows),
        library=library,
        figures=embed(figures),
        script=SCRIPT,
    )
    path = Path(path)
    with atomic(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def embed(value: Any) -> str:
    """JSON that is safe inside a script element; numbers that are not finite become null.

    Example:
        >>> embed(["</script>", float("nan")])
        '["\\\\u003c/script\\\\u003e", null]'
    """
    text = json.dumps(_finite(value), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(rows: list[Row]) -> None:
    if not rows:
        raise RunError("The run holds no rows to report on. Run `testtime bench` first.")
    needed = {name for name, *_ in COLUMNS} | set(SETTING)
    needed |= {"cell", "method", "options", "seed", "domain", "trace", "reliability", "version"}
    missing = sorted(needed - set.intersection(*map(set, rows)))
    if missing:
        raise RunError(
            f"The rows lack {', '.join(missing)}. A report takes the rows of `testtime bench`."
        )


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("plotly", "bench") from error
    return get_plotlyjs()


def _section(rows: list[Row], style: dict[str, Any], figures: list[dict[str, Any]]) -> str:
    plots = (
        ("Error over time", "Share of wrong answers from the start of the stream up to each batch, "
         "over all seeds. Dotted lines: the domain changes.", over_time(rows, style)),
        ("Error in each domain", "Percent, mean over seeds.", per_domain(rows)),
        ("Cost against error", "Lower left is better.", cost(rows, style)),
        ("Reliability", "On the dotted line confidence is what it claims; below it, answers are "
         "too sure. Larger marks stand for more answers.", calibration(rows, style)),
    )  # fmt: skip
    parts = []
    for name, note, figure in plots:
        parts.append(
            f'<h3>{name}</h3><p class="note">{note}</p>'
            f'<div class="plot" data-figure="{len(figures)}" style="height:{figure["height"]}px" '
            f'role="img" aria-label="{name}"></div>'
        )
        figures.append(figure)
    first = rows[0]
    heading = f"{first['model']}, {first['stream']}"
    setting = f"{first['data']}, severity {first['severity']}, batches of {first['batch_size']}"
    return (
        f'<section><h2>{html.escape(heading)}</h2><p class="note">{html.escape(setting)}</p>'
        f"{_table(rows)}{''.join(parts)}</section>"
    )


def _table(rows: list[Row]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for _, name, *_ in COLUMNS)
    body = []
    for line in sorted(summarise(rows), key=lambda line: _rank(line["error"])):
        cells = []
        for key, _, scale, digits in COLUMNS:
            text = _number(line[key] * scale, digits)
            if key == "error" and line["seeds"] > 1:
                text += f" ± {_number(line['error_std'], digits)}"
            cells.append(f"<td>{text}</td>")
        body.append(f'<tr><th scope="row">{html.escape(label(line))}</th>{"".join(cells)}</tr>')
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">method</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _footer(rows: list[Row]) -> str:
    def distinct(name: str) -> list[str]:
        return list(dict.fromkeys(str(row.get(name, "unknown")) for row in rows))

    facts = {
        "testtime": ", ".join(distinct("version")),
        "cells": str(len(distinct("cell"))),
        "seeds": ", ".join(distinct("seed")),
        "data": ", ".join(distinct("data")),
        "weights (SHA-256)": ", ".join(
            dict.fromkeys(
                f"{r['model']} {str(r.get('weights_sha256', 'unknown'))[:16]}" for r in rows
            )
        ),
        "order of samples (SHA-256)": ", ".join(
            dict.fromkeys(
                f"{r['stream']} seed {r['seed']} {str(r.get('samples_sha256', 'unknown'))[:16]}"
                for r in rows
            )
        ),
    }
    lines = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    streams = "".join(f"<pre>{html.escape(text)}</pre>" for text in distinct("scenario"))
    return (
        "<p>Mean over domains, then over seeds; ± is the standard deviation over seeds.</p>"
        f"<dl>{lines}</dl><details><summary>Streams, to be repeated exactly</summary>"
        f"{streams}</details>"
    )


STYLE = """
:root{color-scheme:light;--back:#fff;--text:#1b1f24;--soft:#5b6470;--line:#dfe3e8}
@media(prefers-color-scheme:dark){:root:not([data-theme=light]){color-scheme:dark;--back:#14171b;
--text:#e8eaed;--soft:#a2abb6;--line:#333a43}}
:root[data-theme=dark]{color-scheme:dark;--back:#14171b;--text:#e8eaed;--soft:#a2abb6;--line:#333a43}
*{box-sizing:border-box}
body{margin:0 auto;max-width:960px;padding:16px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
header{display:flex;justify-content:space-between;align-items:center;gap:12px}
h1{font-size:1.6rem;margin:0}h2{font-size:1.25rem;margin:2rem 0 0}h3{font-size:1rem;margin:2rem 0 0}
.note,footer{color:var(--soft);font-size:.875rem}.note{margin:.1rem 0 .5rem}
button{font:inherit;font-size:.875rem;color:inherit;background:none;border:1px solid var(--line);
border-radius:6px;padding:6px 12px;white-space:nowrap}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;
font-size:.875rem;overflow-wrap:normal}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line)}
td{white-space:nowrap}
thead th{vertical-align:bottom;font-weight:500;color:var(--soft);min-width:4.5rem}
th:first-child{text-align:left;min-width:6rem;position:sticky;left:0;background:var(--back)}
footer{margin-top:3rem;border-top:1px solid var(--line)}dd{margin:0 0 .5rem}dt{color:var(--text)}
pre{white-space:pre-wrap}
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const root = document.documentElement;
const dark = matchMedia('(prefers-color-scheme: dark)');
const isDark = () => root.dataset.theme ? root.dataset.theme === 'dark' : dark.matches;
function draw() {
  const css = getComputedStyle(root), get = name => css.getPropertyValue(name).trim();
  const narrow = innerWidth < 600;
  const axis = {gridcolor: get('--line'), zeroline: false, automargin: true, fixedrange: true};
  for (const place of document.querySelectorAll('.plot')) {
    const {data, layout} = figures[place.dataset.figure];
    const shapes = (layout.shapes || []).map(
      s => ({...s, layer: 'below', line: {color: get('--line'), width: 1, dash: 'dot'}}));
    Plotly.react(place, data, {...layout, shapes,
      xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', dragmode: false,
      font: {family: 'system-ui, sans-serif', size: narrow ? 10 : 12, color: get('--text')},
      hoverlabel: {bgcolor: get('--back'), font: {color: get('--text')}},
      legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom'},
      margin: {l: 8, r: 8, t: 8, b: 8}, hovermode: 'closest'},
      {responsive: true, displayModeBar: false});
  }
  document.getElementById('theme').textContent = isDark() ? 'Light' : 'Dark';
}
document.getElementById('theme').onclick = () => {
  root.dataset.theme = isDark() ? 'light' : 'dark'; draw();
};
dark.addEventListener('change', draw);
draw();
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title><style>{style}</style></head><body>
<header><h1>{title}</h1><button id="theme" type="button">Dark</button></header>
<noscript><p>The plots need JavaScript; the tables do not.</p></noscript>
<main>{sections}</main><footer>{footer}</footer>
<script>{library}</script>
<script type="application/json" id="figures">{figures}</script>
<script>{script}</script>
</body></html>
"""
