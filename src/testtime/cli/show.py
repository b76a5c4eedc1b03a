"""What commands share: tables, JSON, errors and exit codes."""

import errno
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Json = typer.Option(False, "--json", help="Print JSON for machines instead of a table.")


def print_json(value: Any) -> None:
    """Valid JSON on standard output; numbers that are not finite become null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return value.__name__ if callable(value) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", tight: bool = False
) -> None:
    """A table on standard output; numbers stand at the right, `tight` puts columns close."""
    table = Table(
        title=title or None, title_justify="left", box=None, header_style="bold",
        padding=(0, 1, 0, 0) if tight else (0, 1), pad_edge=not tight,
    )  # fmt: skip
    for place, name in enumerate(columns):
        numbers = all(row[place][:1] in "0123456789-+ " for row in rows if row[place])
        table.add_column(name, justify="right" if place and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_text(text: str) -> None:
    """Sentences on standard output, broken between words where the terminal ends."""
    Console().print(text, markup=False, highlight=False)


GOES_ON = "; the same command goes on from here"
"""What a command says when it is stopped that keeps what is finished."""


def exits(command: Callable[..., None], *, interrupted: str = "") -> Callable[..., None]:
    """Turns the library's errors into one sentence on standard error and an exit code.

    Args:
        command: of the command line.
        interrupted: what is said beside "interrupted" when the user stops it.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from testtime._core.errors import TesttimeError, WorkFailed  # noqa: PLC0415

        try:
            command(*args, **kwargs)
        except TesttimeError as error:
            console = Console(stderr=True, soft_wrap=True)
            console.print(Text("error:", "red"), Text(str(error)), highlight=False)
            raise typer.Exit(1 if isinstance(error, WorkFailed) else 2) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads on, as behind `| head`
                raise
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            Console(stderr=True).print(f"interrupted{interrupted}")
            raise typer.Exit(1) from error

    return run


def progress() -> Progress:
    """A progress bar on standard error, to be entered; none where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class Watch:
    """Tells of a run on standard error: bars on a terminal, a line for each finished cell in a log.

    Args:
        cells: how many there are.
    """

    def __init__(self, cells: int) -> None:
        self._bar = progress()
        self._live, self._cells, self._done = not self._bar.disable, cells, 0
        self._whole = self._bar.add_task("all", total=cells)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Watch":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, key: str, name: str, steps: int) -> None:
        """A cell begins."""
        self._tasks[key] = self._bar.add_task(name, total=steps)

    def advance(self, key: str) -> None:
        """A cell has taken a step."""
        self._bar.advance(self._tasks[key])

    def end(self, key: str, line: str) -> None:
        """A cell has ended, well or not."""
        self._done += 1
        self._bar.advance(self._whole)
        if key in self._tasks:
            self._bar.remove_task(self._tasks.pop(key))
        if not self._live:
            sys.stderr.write(f"[{self._done}/{self._cells}] {line}\n")
            sys.stderr.flush()
