"""Cost files: joined, compared, shown, and written into a page."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from between import write_between

Rows = list[dict[str, Any]]
Key = tuple[str, int, str, str]
"""Model, batch, what was measured, and the kind of device."""
OURS = ("inference", "minimal step", "textbook")
FIGURES = {
    "to_inference": ("times inference", 1.0), "megabytes": ("MB", 0.2),
    "forwards": ("forwards", 1.0), "backwards": ("backwards", 1.0),
}  # fmt: skip
"""What is compared: its unit, and how much of the tolerance it has."""


def key_of(row: dict[str, Any]) -> Key:
    """What a row is of, and on what kind of device."""
    return row["model"], row["batch"], row["name"], row.get("device", "cpu")


def join(held: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A file's content with what was found since: newer figures take the place of older ones."""
    rows = {key_of(row): row for row in held.get("rows", [])}
    for row in found["rows"]:
        rows[key_of(row)] = {**rows.get(key_of(row), {}), **row}
    return {**held, **found, "rows": list(rows.values())}


class Compared(NamedTuple):
    """Two cost files beside each other.

    Attributes:
        worse: what got worse, a sentence each.
        left: what could not be compared, a sentence each.
        figures: how many were compared.
    """

    worse: list[str]
    left: list[str]
    figures: int


def compare(old: dict[str, Any], new: dict[str, Any], *, tolerance: float) -> Compared:
    """What got worse: times of inference, megabytes and passes, of the methods.

    Times are compared where both are of one machine. A figure that is no number is worse.

    Args:
        old: content of a cost file.
        new: content of a later one.
        tolerance: share by which a figure may be larger. Memory is exact, and may grow by a fifth
            of it.
    """
    before, after = (
        {key_of(row): row for row in found["rows"] if not row["name"].startswith(OURS)}
        for found in (old, new)
    )
    worse: list[str] = []
    left = alone(before.keys() - after, "old") + alone(after.keys() - before, "new")
    figures = 0
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        elsewhere = was.get("machine") != now.get("machine")
        if elsewhere and "to_inference" in was and "to_inference" in now:
            left.append(f"{of(key)}: times of {was.get('machine')} and of {now.get('machine')}")
        for figure, (unit, share) in FIGURES.items():
            if figure not in was or (elsewhere and figure == "to_inference"):
                continue
            if figure not in now:
                left.append(f"{of(key)}: the new file says nothing of {unit}")
                continue
            figures += 1
            then, value = (_middle(row[figure]) for row in (was, now))
            if not value <= then * (1 + share * tolerance):
                digits = 0 if unit == "MB" else 2
                worse.append(f"{of(key)}: {value:.{digits}f} {unit}, was {then:.{digits}f}")
    return Compared(sorted(worse), sorted(left), figures)


def of(key: Key) -> str:
    """What a row is of, in words."""
    model, batch, name, device = key
    return f"{name} on {model}, batch {batch}" + f", {device}" * (device != "cpu")


def alone(rows: Iterable[Key], file: str) -> list[str]:
    """Rows that only one of two files has, a sentence for each model, batch and device."""
    found: dict[str, list[str]] = {}
    for model, batch, name, device in rows:
        found.setdefault(of((model, batch, "{}", device)), []).append(name)
    return [
        f"only in the {file} file: {where.format(', '.join(sorted(names)))}"
        for where, names in found.items()
    ]


def _middle(figure: float | list[float]) -> float:
    return figure[0] if isinstance(figure, list) else figure


COLUMNS = {
    "ms": "milliseconds", "to inference": "to_inference", "to minimal step": "to_minimal",
    "to textbook": "to_textbook", "MB": "megabytes", "MB to textbook": "memory_to_textbook",
}  # fmt: skip


def cell(row: dict[str, Any], column: str) -> str:
    """One figure as text."""
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"
    short = column == "milliseconds" and value < 20
    return f"{value:.2f}" if column == "memory_to_textbook" else f"{value:.{short:d}f}"


def groups(rows: Rows) -> dict[tuple[str, str], Rows]:
    """Rows by model and batch, and by the machine that gave their times."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        title = f"{row['model']}, batch {row['batch']}"
        found.setdefault((title, row.get("machine", "no times")), []).append(row)
    return found


def show(rows: Rows) -> None:
    """A table for each model on the terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    for (title, _), own in groups(rows).items():
        table = Table(title=title, box=None, header_style="bold")
        table.add_column("")
        for column in COLUMNS:
            table.add_column(column, justify="right")
        for row in own:
            table.add_row(row["name"], *[cell(row, column) for column in COLUMNS.values()])
        console = Console()
        console.width = max(console.width, 120)
        console.print(table)


def page(path: Path, found: dict[str, Any]) -> None:
    """Writes the tables between the marks of a page."""
    lines = ["In float32. Times are medians of rounds with the smallest and largest."]
    for (title, machine), own in groups(found["rows"]).items():
        columns = [name for name, key in COLUMNS.items() if any(key in row for row in own)]
        lines += ["", f"**{title}** ({machine})", "", f"| | {' | '.join(columns)} |"]
        lines.append(f"|---|{'---:|' * len(columns)}")
        for row in own:
            cells = [cell(row, COLUMNS[name]) for name in columns]
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    if "overhead_ms" in found:
        told = ", ".join(
            f"{value:.2f} for `{name}`"
            for name, value in found["overhead_ms"].items()
            if name != "machine"
        )
        machine = found["overhead_ms"]["machine"]
        lines += ["", f"Beyond the work itself a call costs, in milliseconds: {told} ({machine})."]
    write_between(path, "measured", lines)
