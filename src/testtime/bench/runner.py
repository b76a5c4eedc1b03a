"""Methods x models x scenarios x seeds, on disk: what is finished is kept, what is not is run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from testtime._core.errors import InputError, OptionError, ScopeError, WorkFailed
from testtime.bench.cells import WATCHED, Cell
from testtime.bench.store import forget, read_cell, write_cell, write_plan
from testtime.bench.watched import Watched
from testtime.bench.workers import Failure, Notice, Outcome, attempt, run_all


def run(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    jobs: int = 1,
    on_notice: Notice | None = None,
    on_done: Callable[[Cell, list[dict[str, Any]] | None, bool], None] | None = None,
    on_unfit: Callable[[Cell, str], None] | None = None,
    on_changed: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells that are not finished yet and returns the rows of all, in order of the cells.

    Each finished cell is written at once, so that the same call goes on after an interruption of
    any kind. A piece that cannot be read is made again, and so is one of other images, weights or
    code than lie in the folders and files now that its cell names. Two runs in one folder do no harm
    but double work. A cell that fails does not keep the others from running, but for the source
    model: where that cannot run, nothing can.

    Args:
        cells: from `plan`.
        out: folder of the run; made when it is not there.
        jobs: cells that run at once, each in a process of its own; a script that calls this needs
            the usual `if __name__ == "__main__":`. 0 runs them in this process, which leaves
            memory out of account and dies with a cell that does.
        on_notice: called with a cell, "start" and its number of batches before it runs, and with
            "batch" and 1 after each batch.
        on_done: called with a cell, its rows (None when it failed), and whether it was run now.
        on_unfit: called with a cell whose method is not for its model, and why. The cell is then
            left out of the run; without this function it has failed.
        on_changed: called before the first cell runs with the number of finished cells that run
            again because their images, weights or code are others now; not called where none is.

    Raises:
        WorkFailed: cells have failed; those that finished are kept.
        InputError: a function that makes a model draws its weights anew at each call; or images, weights
            or code changed while the run went on.
        TesttimeError: data, model or stream do not fit, as the source model's cell found out.

    Example:
        >>> from testtime.bench.cells import plan
        >>> from testtime.streams.scenarios import Scenario
        >>> import tempfile
        >>> stream = Scenario(domains=("fog",), samples=40)
        >>> cells = plan(methods=["bn-adapt"], models=["embedded:batch"], streams=[stream],
        ...              data="fashion-mnist:sample", seeds=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [row["method"] for row in run(cells, folder, jobs=0)]
        ['source', 'bn-adapt']
    """
    if jobs < 0:
        raise OptionError(f"jobs is {jobs}; expected 0 or more processes.")
    out, done = Path(out), on_done or (lambda cell, rows, now: None)
    watched = Watched()
    now = {cell.key: watched(cell) for cell in cells}
    new = write_plan(out, cells, lambda cell: now[cell.key])
    found: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, Cell] = {}
    changed = 0
    for cell in cells:
        own = read_cell(out, cell.key, now[cell.key])
        if own is None:
            changed += read_cell(out, cell.key) is not None
            missing[cell.key] = cell
        else:
            found[cell.key] = own
            done(cell, own, False)
    if changed and on_changed is not None:
        on_changed(changed)
    failed: list[tuple[Cell, Failure]] = []
    for cell, made in _outcomes(list(missing.values()), jobs, on_notice or (lambda *_: None)):
        outcome = _steady(cell, made, now[cell.key], watched)
        if isinstance(outcome, Failure):
            error = outcome.error()
            if cell.method == "source" and error is not None:
                forget(out, new - found.keys())
                raise error
            done(cell, None, True)
            if on_unfit is not None and outcome.kind is ScopeError:
                on_unfit(cell, outcome.text)
                forget(out, {cell.key})
            else:
                failed.append((cell, outcome))
        else:
            rows = [row | watched.images(cell) for row in outcome]
            write_cell(out, cell.key, rows)
            found[cell.key] = rows
            done(cell, rows, True)
    if failed:
        raise WorkFailed(_complaint(failed, cells))
    return [row for cell in cells for row in found.get(cell.key, ())]


def _steady(
    cell: Cell, outcome: Outcome, begun: dict[str, str | None], watched: Watched
) -> Outcome:
    """The outcome; a failure where weights, code or images are others than when the run began."""
    if isinstance(outcome, Failure):
        return outcome
    changed = {
        name for name, known in begun.items() if known and outcome[0].get(name, known) != known
    }
    why = None
    if "weights_sha256" in changed:
        why = (
            f"{cell.model} has other weights in this cell than when the run began: they are drawn "
            "anew at each call, or a file has changed meanwhile. Read them from a file that stays, or "
            "draw them with a seed; then give the same command again."
        )
    elif changed:
        why = (
            f"the code of {' and '.join(getattr(cell, WATCHED[name]) for name in sorted(changed))} has "
            "changed since the run began. Give the same command again."
        )
    elif watched.moved(cell):
        why = (
            f"images of {cell.data} have changed since the run began. Once they stay as they are, give "
            "the same command again."
        )
    return outcome if why is None else Failure(text=why, kind=InputError)


def _outcomes(cells: Iterable[Cell], jobs: int, notice: Notice) -> Iterator[tuple[Cell, Outcome]]:
    if jobs == 0:
        return ((cell, attempt(cell, notice)) for cell in cells)
    return run_all(list(cells), jobs=jobs, notice=notice)


def _complaint(failed: Sequence[tuple[Cell, Failure]], cells: Sequence[Cell]) -> str:
    reasons = "\n".join(f"  {cell}: {failure.text}" for cell, failure in failed)
    return (
        f"{len(failed)} of {len(cells)} cells failed; the finished ones are kept, and the same "
        f"command tries the others again:\n{reasons}"
    )
