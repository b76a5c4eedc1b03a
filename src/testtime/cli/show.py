"""What commands share: tables, JSON, errors and exit codes."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

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


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table on standard output; numbers stand at the right."""
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold")
    for place, name in enumerate(columns):
        numbers = all(row[place][:1] in "0123456789-+ " for row in rows if row[place])
        table.add_column(name, justify="right" if place and numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_text(text: str) -> None:
    """Sentences on standard output, broken between words where the terminal ends."""
    Console().print(text, markup=False, highlight=False)


def exits(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the library's errors into one sentence on standard error and an exit code."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        from testtime._core.errors import TesttimeError  # noqa: PLC0415

        try:
            command(*args, **kwargs)
        except TesttimeError as error:
            Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {error}", highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            Console(stderr=True).print("interrupted; the same command goes on from here")
            raise typer.Exit(1) from error

    return run


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress bar on standard error."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar
