"""Results on disk: one Parquet piece for each finished cell, written wholly or not at all."""

import fcntl
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import testtime as tt
from testtime._core.errors import MissingExtra, RunError, WorkFailed
from testtime._core.files import atomic
from testtime.bench.cells import WATCHED, Cell, shared

PLAN = "run.json"

UNSURE = "?"
"""Noted in place of a hash that may be another now: rows count again once their cell is asked for."""


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
    """Writes the rows of a finished cell.

    Raises:
        WorkFailed: the folder cannot be written, or the disk is full.
    """
    arrow, parquet = _parquet()
    try:
        with atomic(piece(out, key)) as part:
            table = arrow.Table.from_pylist(rows)
            parquet.write_table(table, part, write_page_checksum=True)
    except OSError as error:
        raise WorkFailed(
            f"results cannot be written to {out}: {error.strerror or error}. What was finished before is kept; make "
            "room, and the same command goes on from here."
        ) from error


def read_cell(
    out: Path, key: str, record: Mapping[str, Any] | None = None
) -> list[dict[str, Any]] | None:
    """The rows of a finished cell; None when it is not there, or cannot be read.

    Args:
        out: folder of the run.
        key: of the cell.
        record: with columns of `WATCHED`. Rows with another value there count as not there; rows
            without the column, or with no hash of images, of earlier versions, do not.
    """
    arrow, parquet = _parquet()
    path = piece(out, key)
    try:
        if not path.exists():
            return None
        rows = parquet.read_table(path, page_checksum_verification=True).to_pylist()
    except (arrow.ArrowException, OSError, ValueError):
        return None
    if not rows or any(row.get("cell") != key for row in rows):
        return None
    wanted = {name: value for name, value in (record or {}).items() if name in WATCHED}
    stale = any(_other(row, name, value) for row in rows for name, value in wanted.items())
    return None if stale else rows


def _other(row: Mapping[str, Any], name: str, value: Any) -> bool:
    known = row.get(name, value)
    return known != value and not (known is None and WATCHED[name] == "data")


def write_plan(
    out: Path, cells: Iterable[Cell], watched: Callable[[Cell], Mapping[str, str | None]]
) -> set[str]:
    """Notes which cells a run consists of, and gives the keys that are new; others stay.

    A cell that another version of the library has run makes way for the same cell of this one. What
    is noted with a cell, hashes of its images, weights and code, is noted with the others that
    share them: those that ran on what lay there before are then missing.

    Args:
        out: folder of the run.
        cells: that are asked for.
        watched: columns of `WATCHED` for a cell.

    Raises:
        RunError: the note of an earlier run is damaged, or the folder cannot be written.
    """
    _parquet()  # tells of a missing package before anything is written
    wanted = {
        cell.key: {**vars(cell), "version": tt.__version__, **_known(watched(cell))}
        for cell in cells
    }
    news = {
        shared(name, record): record[name]
        for record in wanted.values()
        for name in WATCHED
        if name in record
    }
    with _alone(out):
        noted = _read_plan(out) if (out / PLAN).exists() else {}
        new = [_unversioned(record) for record in wanted.values()]
        kept = {
            key: _renewed(record, news, _moved(noted.values(), news))
            for key, record in noted.items()
            if key in wanted or _unversioned(record) not in new
        }
        if noted != kept | wanted:
            _note(out, kept | wanted)
    return wanted.keys() - noted.keys()


def _moved(
    noted: Iterable[dict[str, Any]], news: Mapping[tuple[Any, ...], str]
) -> set[tuple[str, Any]]:
    """Columns and what they tell of, of which something is known to be another than was noted."""
    return {
        shared(name, record)[:2]
        for record in noted
        for name in WATCHED.keys() & record.keys()
        if news.get(shared(name, record), UNSURE) not in (UNSURE, record[name])
        and record[name] != UNSURE
    }


def _renewed(
    record: dict[str, Any], news: Mapping[tuple[Any, ...], str], moved: set[tuple[str, Any]]
) -> dict[str, Any]:
    """The record with the hashes of now; where only those of others are known, and moved, with none."""
    found = dict(record)
    for name in WATCHED.keys() & record.keys():
        key = shared(name, record)
        found[name] = news.get(key, UNSURE if key[:2] in moved else record[name])
    return found


def forget(out: Path, keys: Iterable[str]) -> None:
    """Takes cells out of the plan that nothing can run, so that they are not missed."""
    with _alone(out):
        gone = set(keys)
        _note(out, {key: record for key, record in _read_plan(out).items() if key not in gone})


def _note(out: Path, records: dict[str, Any]) -> None:
    if not records:
        (out / PLAN).unlink(missing_ok=True)
        return
    with atomic(out / PLAN) as part:
        part.write_text(json.dumps(records, indent=1), "utf-8")


def _unversioned(record: dict[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in record.items() if n != "version" and n not in WATCHED}


def _known(hashes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in hashes.items() if value is not None}


@contextmanager
def _alone(out: Path) -> Generator[None, None, None]:
    """Keeps other runs from noting at the same time; a process that dies lets go."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        why = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        raise RunError(
            f"results cannot be written to {out}: {why}. Give another folder with --out."
        ) from error


def _read_plan(out: Path) -> dict[str, dict[str, Any]]:
    """Key -> record of each cell that was noted."""
    path = out / PLAN
    try:
        noted = json.loads(path.read_text("utf-8"))
        if not isinstance(noted, dict) or not all(isinstance(r, dict) for r in noted.values()):
            raise ValueError("it is no table of cells")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged: {error}. Delete this file and give the same testtime bench "
            "command again: cells that are finished are found, and not run again."
        ) from error
    return noted


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def read_run(out: str | Path, *, partial: bool = False) -> list[dict[str, Any]]:
    """All rows of a run, in order of its plan.

    Args:
        out: the folder of the run.
        partial: whether cells may be missing.

    Raises:
        RunError: when the folder holds no run, or one that has not finished.
    """
    out = Path(out)
    if _is_file(out):
        raise RunError(
            f"{out} holds no run: it is a file. Give the folder that was --out of testtime bench."
        )
    if not _is_file(out / PLAN):
        raise RunError(
            f"{out} holds no run: it has no {PLAN}. Make one: testtime bench --methods tent "
            f"--out {out}"
        )
    plan = _read_plan(out)
    found = {key: read_cell(out, key, record) for key, record in plan.items()}
    missing = [key for key, rows in found.items() if rows is None]
    again = f"To continue the run, give the same testtime bench command with --out {out} again"
    if len(missing) == len(plan):
        raise RunError(f"{out} has no finished cell yet, of {len(plan)}. {again}.")
    if missing and not partial:
        raise RunError(
            f"{out} is not finished: {len(missing)} of {len(plan)} cells are missing. {again}; "
            f"or show what there is: testtime report {out} --partial"
        )
    return [row for key in plan for row in found[key] or ()]
