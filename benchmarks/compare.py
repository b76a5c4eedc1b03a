"""Cost files: joined, compared, shown, and written into a page."""

from pathlib import Path
from typing import Any

from between import write_between

Rows = list[dict[str, Any]]
OURS = ("inference", "minimal step", "textbook")


def key_of(row: dict[str, Any]) -> tuple[str, int, str, str]:
    """What a row is of, and on what kind of device."""
    return row["model"], row["batch"], row["name"], row.get("device", "cpu")


def join(held: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A file's content with what was found since: newer figures take the place of older ones."""
    rows = {key_of(row): row for row in held.get("rows", [])}
    for row in found["rows"]:
        rows[key_of(row)] = {**rows.get(key_of(row), {}), **row}
    return {**held, **found, "rows": list(rows.values())}


def compare(old: dict[str, Any], new: dict[str, Any], *, tolerance: float) -> list[str]:
    """What got worse, a sentence each: time against inference, and megabytes, of the methods.

    Args:
        old: content of a cost file.
        new: content of a later one. Rows that only one of them has are not compared.
        tolerance: share by which a figure may be larger. Memory is exact, and may grow by a fifth
            of it.
    """
    before = {key_of(row): row for row in old["rows"]}
    worse: list[str] = []
    for row in new["rows"]:
        was = before.get(key_of(row))
        if was is None or row["name"].startswith(OURS):
            continue
        where = f"{row['name']} on {row['model']}, batch {row['batch']}"
        if "to_inference" in row and "to_inference" in was:
            now, then = row["to_inference"][0], was["to_inference"][0]
            if now > then * (1 + tolerance):
                worse.append(f"{where}: {now:.2f} times inference, was {then:.2f}")
        if "megabytes" in row and "megabytes" in was:
            now, then = row["megabytes"], was["megabytes"]
            if now > then * (1 + tolerance / 5):
                worse.append(f"{where}: {now:.0f} MB, was {then:.0f}")
    return worse


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
