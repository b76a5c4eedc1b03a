"""A run as one HTML file that needs nothing else: no network, no other file."""

import json
import math
import shlex
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import product
from pathlib import Path
from string import Template
from typing import Any

from testtime._core.errors import MissingExtra, RunError, TesttimeError, WorkFailed
from testtime._core.files import atomic
from testtime.bench.cells import label, parse_method, stream_words
from testtime.bench.metrics import METRICS, OPTIONAL, setting
from testtime.bench.models import shown_to
from testtime.bench.section import Rows, Section
from testtime.bench.tables import styles
from testtime.streams.folder import read_spec
from testtime.streams.scenarios import Scenario

NEEDED = frozenset(METRICS) - frozenset(OPTIONAL) | {
    "method", "options", "model", "data", "stream", "scenario", "severity", "batch_size", "seed", "domain",
    "position", "trace", "reliability", "weights_sha256", "samples_sha256", "version",
}  # fmt: skip


def write_report(rows: Rows, path: str | Path, *, title: str = "testtime benchmark") -> Path:
    """Writes the plots and tables of a run as one self-contained HTML file.

    Error over time, the summary table, error per domain, cost against error, calibration, and where
    the numbers come from; one section for each model and stream. Plots are drawn by plotly.js, which
    the file contains; a policy in the file forbids it any request.

    Args:
        rows: of a run, as `read_run` returns them.
        path: of the file. It is replaced wholly or not at all.
        title: heading of the page.

    Raises:
        RunError: there are no rows, or they lack a column, or hold what is no number where one belongs.
        MissingExtra: plotly is not installed.
        WorkFailed: the file cannot be written.

    Example:
        >>> write_report([], "report.html")
        Traceback (most recent call last):
        testtime._core.errors.RunError: a report needs at least one result row, got none. ...
    """
    check_rows(rows)
    look = styles([label(row) for row in rows])
    sections = [Section(own, look) for own in _groups([_numeric(row) for row in rows])]
    folder = files("testtime.bench") / "assets"
    page = Template((folder / "report.html").read_text("utf-8")).substitute(
        title=escape(title),
        style=(folder / "report.css").read_text("utf-8"),
        picker=_picker([section.name for section in sections]),
        sections="".join(section.html(i) for i, section in enumerate(sections)),
        command=_command(rows),
        version=escape(", ".join(sorted({str(row["version"]) for row in rows}))),
        data=script_json({"styles": look, "sections": [section.data() for section in sections]}),
        plotly=_plotly(),
        script=(folder / "report.js").read_text("utf-8"),
    )
    try:
        with atomic(path) as part:
            part.write_text(page, "utf-8")
    except OSError as error:
        raise WorkFailed(
            f"the report cannot be written to {path}: {error.strerror or error}."
        ) from error
    return Path(path)


def check_rows(rows: Rows) -> None:
    """Refuses rows that no table and no report can be made of.

    Raises:
        RunError: there are no rows, or they lack a column.
    """
    if not rows:
        raise RunError(
            "a report needs at least one result row, got none. Run: testtime bench --out DIR"
        )
    said = "a report takes rows as testtime bench writes them. Run: testtime bench --out DIR"
    missing = sorted(NEEDED - set.intersection(*map(set, rows)))
    if missing:
        raise RunError(f"rows lack {', '.join(missing)}; {said}")
    for row, name in product(rows, METRICS):
        if not isinstance(value := row.get(name), int | float | None):
            raise RunError(f"{name} of a row is {value!r:.60}, which is no number; {said}")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("plotly", "bench") from error
    return get_plotlyjs()


def _numeric(row: dict[str, Any]) -> dict[str, Any]:
    """The row with NaN where a metric is None."""
    missing = {name: math.nan for name in METRICS if row.get(name) is None}
    trace = [t if t["error"] is not None else t | {"error": math.nan} for t in row["trace"] or ()]
    return row | missing | {"trace": trace, "reliability": row["reliability"] or []}


def _groups(rows: Rows) -> list[Rows]:
    """Rows of one model on one stream each."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(setting(row), []).append(row)
    return list(groups.values())


def script_json(value: Any) -> str:
    r"""JSON that cannot end a script element, whatever the names in it.

    Example:
        >>> script_json("</script>")
        '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _picker(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    options = "".join(f'<option value="{i}">{escape(n)}</option>' for i, n in enumerate(names))
    return f'<label class="picker">Model and stream<select id="picker">{options}</select></label>'


def _command(rows: Rows) -> str:
    """The command that makes the same run; a sentence where no command can."""
    seeds = sorted({row["seed"] for row in rows})
    data = _data(rows)
    streams = [_stream(text) for text in dict.fromkeys(row.get("scenario") for row in rows)]
    methods = [_method(row) for row in rows]
    whole = len({(*setting(row), label(row), row["seed"]) for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    known = None not in [data, *streams, *methods]
    product = len(models) * len(streams) * len(set(methods)) * len(seeds)
    if not known or seeds != list(range(len(seeds))) or whole != product:
        return "<p>No single command makes this run; its cells are those of the tables above.</p>"
    command = ["testtime", "bench", "--data", str(data), "--model", ",".join(models)]
    command += ["--methods", ",".join(map(str, dict.fromkeys(methods)))]
    command += [word for stream in streams for word in ("--stream", str(stream))]
    command += ["--seeds", str(len(seeds))]
    for name, usual in (("device", "cpu"), ("threads", 1)):
        given = rows[0].get(name, usual)
        command += [f"--{name}", str(given)] * (given != usual)
    command += ["--paced"] * bool(rows[0].get("paced"))
    return f"<pre>{escape(shlex.join([*command, '--out', 'DIR']))}</pre>"


def _data(rows: Rows) -> str | None:
    """The data as `--data` reads it, of which each model sees what it was made for; None for several."""
    names = {row["data"] for row in rows}
    first = rows[0]["data"]
    if len(names) == 1:
        return first
    kind, _, rest = first.partition(":")
    plain = f"{kind}:{read_spec(rest)[0]}"
    return plain if all(shown_to(row["model"], plain) == row["data"] for row in rows) else None


def _method(row: dict[str, Any]) -> str | None:
    """A method with its options as `--methods` reads it; None where it has no such form."""
    try:
        return label(row) if parse_method(label(row)) == (row["method"], row["options"]) else None
    except TesttimeError:
        return None


def _stream(toml: str | None) -> str | None:
    """A scenario as `Scenario.parse` reads it; None where it has no such form."""
    try:
        scenario = Scenario.from_toml(toml or "?")
        words = stream_words(scenario)
        return words if Scenario.parse(words) == scenario else None
    except TesttimeError:
        return None
