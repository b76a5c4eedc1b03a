"""Workers: each cell runs in a process of its own, forked from one that has torch loaded.

So a cell's memory is its own, a cell that is killed takes nothing with it, and a process costs
milliseconds instead of the seconds in which torch is imported.
"""

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

from testtime._core.errors import TesttimeError
from testtime.bench.cells import Cell
from testtime.bench.trial import run_cell


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell has no rows.

    Attributes:
        text: for people, one sentence or more.
        kind: of the error, where it was one of the library's.
    """

    text: str
    kind: type[TesttimeError] | None = None

    def error(self) -> TesttimeError | None:
        """The library's error as it was raised; None for another."""
        if self.kind is None:
            return None
        error = self.kind.__new__(self.kind)  # not every error is made from its text
        error.args = (self.text,)
        return error


Outcome = list[dict[str, Any]] | Failure
Notice = Callable[[Cell, str, int], None]
"""Called with a cell, "start" and its number of batches, or with "batch" and 1."""


def attempt(cell: Cell, notice: Notice) -> Outcome:
    """Runs a cell in this process; an error becomes a `Failure`."""
    try:
        return run_cell(
            cell,
            on_start=lambda batches: notice(cell, "start", batches),
            on_batch=lambda: notice(cell, "batch", 1),
        )
    except TesttimeError as error:
        return Failure(text=str(error), kind=type(error))
    except BrokenPipeError:  # nobody listens any more
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(
            text=f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
        )


def run_all(cells: Sequence[Cell], *, jobs: int, notice: Notice) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes of cells as they come, `jobs` at a time, each from a fresh process.

    When the caller stops asking, the processes that still run are ended.
    """
    context = _context()
    waiting, running = list(reversed(cells)), list[_Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Worker(context, waiting.pop()))
            ready = wait([worker.inbox for worker in running])
            for worker in [w for w in running if w.inbox in ready]:
                outcome = worker.hear(notice)
                if outcome is not None:
                    running.remove(worker)
                    yield worker.cell, outcome
    finally:
        for worker in running:
            worker.end()


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Ctrl-C is for the one who runs the cells: the server and its workers, which inherit the mask,
    # would answer it with a traceback each. The tracker unblocks what is blocked, so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


class _Worker:
    """One process that runs one cell."""

    def __init__(self, context: BaseContext, cell: Cell) -> None:
        self.cell = cell
        self.inbox, outbox = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(vars(cell), outbox), daemon=True)  # pyright: ignore[reportAttributeAccessIssue]
        self.process.start()
        outbox.close()

    def hear(self, notice: Notice) -> Outcome | None:
        """Takes one message; the outcome when there is one, or when the process is gone."""
        try:
            kind, value = self.inbox.recv()
        except (EOFError, OSError):
            self.process.join()
            return Failure(text=_death(self.process.exitcode))
        if kind != "done":
            notice(self.cell, kind, value)
            return None
        self.process.join()
        return value

    def end(self) -> None:
        """Stops the process."""
        self.process.kill()
        self.process.join()


def _work(record: dict[str, Any], outbox: Connection) -> None:
    """What a process does; it ends when nobody listens any more."""
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results; models may print
            outcome = attempt(Cell(**record), lambda _, kind, value: outbox.send((kind, value)))
        outbox.send(("done", outcome))
    except (BrokenPipeError, KeyboardInterrupt):
        return


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (memory may have run out)" if code == -9 else ""
        return f"its process was killed by signal {-code}{hint}"
    return f"its process ended with exit code {code} and no result"
