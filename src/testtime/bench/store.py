"""Results on disk: one Parquet piece for each finished cell, written wholly or not at all."""

import json
from pathlib import Path
from typing import Any

from testtime._core.errors import MissingExtra, RunError
from testtime._core.files import atomic

PLAN = "run.json"


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("pyarrow", "bench") from error
    return pyarrow, pyarrow.parquet


def piece(out: Path, key: str) -> Path:
    """Where the rows of a cell lie."""
    return out / "cells" / f"{key}.parquet"


def write_cell(out: Path, key: str, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of a finished cell."""
    arrow, parquet = _parquet()
    with atomic(piece(out, key)) as part:
        parquet.write_table(arrow.Table.from_pylist(rows), part)


def read_cell(out: Path, key: str) -> list[dict[str, Any]] | None:
    """The rows of a finished cell; None when it is not there, or cannot be read."""
    arrow, parquet = _parquet()
    path = piece(out, key)
    if not path.exists():
        return None
    try:
        return parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError):
        return None


def write_plan(out: Path, cells: dict[str, Any]) -> None:
    """Notes which cells a run consists of; cells noted before stay."""
    path = out / PLAN
    try:
        noted = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is damaged: {error}. Use another folder.") from error
    if noted.keys() >= cells.keys():
        return
    with atomic(path) as part:
        part.write_text(json.dumps({**noted, **cells}, indent=1))


def read_run(out: str | Path, *, partial: bool = False) -> list[dict[str, Any]]:
    """All rows of a run, in order of its plan.

    Args:
        out: the folder of the run.
        partial: whether cells may be missing.

    Raises:
        RunError: when the folder holds no run, or one that has not finished.
    """
    out = Path(out)
    if not (out / PLAN).exists():
        raise RunError(
            f"{out} holds no run: it has no {PLAN}. Make one: testtime bench --out {out}"
        )
    plan = json.loads((out / PLAN).read_text())
    found = {key: read_cell(out, key) for key in plan}
    missing = [key for key, rows in found.items() if rows is None]
    if missing and (not partial or len(missing) == len(plan)):
        raise RunError(
            f"{out} is half-written: {len(missing)} of {len(plan)} cells are missing. Give the "
            f"same testtime bench command with --out {out} again; it goes on where it stopped."
        )
    return [row for key in plan for row in found[key] or ()]
