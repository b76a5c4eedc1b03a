"""`testtime bench`: methods x models x scenarios x seeds, on disk, resumable."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from testtime.cli.show import GOES_ON, Json, Watch, exits, print_json, print_table

if TYPE_CHECKING:
    from testtime.bench.cells import Cell


@partial(exits, interrupted=GOES_ON)
def bench(
    methods: str = typer.Option(
        ...,
        help="Names separated by commas, with options in brackets: 'tent,tent(lr=0.01)'. 'all' is "
        "every method. 'source', no adaptation, always runs too. For names: testtime methods",
    ),
    out: Path = typer.Option(  # noqa: B008
        ...,
        help="Folder of results. Finished cells in it are kept, so you can continue or extend a run.",
    ),
    data: str = typer.Option(
        "fashion-mnist:sample",
        help="Data set: fashion-mnist:sample, fashion-mnist, digits, folder:PATH with a folder of "
        "images for each class (in the size of the model, or of folder:PATH@SIZE), or "
        "corrupted:PATH with the layout of ImageNet-C or CIFAR-10-C.",
    ),
    model: str = typer.Option(
        "embedded:batch",
        help="Models separated by commas: embedded:batch, embedded:group, timm:NAME, "
        "torchvision:NAME, hf:NAME, file:PATH@NAME with weights for one of these, or "
        "file:PATH.py@FUNCTION for the model that your own function returns.",
    ),
    stream: list[str] = typer.Option(  # noqa: B008
        ["continual"],
        help="How data arrives: a pattern (stationary, reset, continual, gradual, recurring, mixed), "
        "then options: sorted,batch_size=16,severity=3. Repeat it for more streams. "
        "all,samples=100 runs every pattern, order and distribution, each as a stream of its own.",
    ),
    seeds: int = typer.Option(3, min=1, help="Seeds 0 to N - 1."),
    jobs: int = typer.Option(1, min=1, help="Cells (method, model, stream, seed) run at once."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    threads: int = typer.Option(1, min=1, max=1024, help="Threads of torch in each cell."),
    paced: bool = typer.Option(
        False,
        help="Also score a stream that does not wait: batches come at the pace of plain "
        "inference, and a method that is late answers with the state it has.",
    ),
    json: bool = Json,
) -> None:
    """Compare methods on a stream of shifting data.

    To continue an interrupted run, give the same command again. The same folder with more
    methods, seeds, models or streams adds to what is there.

    Example: testtime bench --methods "tent,sar(lr=0.01)" --seeds 3 --out runs/a

    Exit codes: 0 done, 1 a cell failed (the others are kept), 2 the call was wrong.
    """
    from testtime._core.errors import OptionError, WorkFailed  # noqa: PLC0415
    from testtime.bench.cells import split_methods, split_models  # noqa: PLC0415

    names = split_methods(methods)
    if not names:
        raise OptionError("no method is named; expected at least one, as tent. Alone: source.")
    cells = cells_of(
        names, split_models(model), data, stream, seeds,
        device=device, threads=threads, paced=paced,
    )  # fmt: skip
    unfit: dict[str, str] = {}
    finished: dict[str, list[dict[str, Any]]] = {}
    failure = None
    try:
        execute(cells, out, jobs=jobs, finished=finished, unfit=unfit if "all" in names else None)
    except WorkFailed as error:
        failure = error
    rows = [row for cell in cells for row in finished.get(cell.key, ())]
    if json:
        print_json(rows)
    elif rows:
        print_summary(rows)
        for method, why in unfit.items():
            typer.echo(f"\nLeft out, {method}: {why}")
        partial = " --partial" if failure else ""
        typer.echo(f"\nHTML report with plots: testtime report{partial} {quote(str(out))}")
    if failure:
        raise failure


def cells_of(
    methods: Sequence[str], models: Sequence[str], data: str, streams: Sequence[str], seeds: int,
    *, device: str = "cpu", threads: int = 1, paced: bool = False,
) -> "list[Cell]":  # fmt: skip
    """The cells that a command names."""
    from testtime.bench.cells import plan  # noqa: PLC0415
    from testtime.streams.scenarios import Scenario  # noqa: PLC0415

    return plan(
        methods=methods, models=[name.strip() for name in models if name.strip()], data=data,
        streams=[each for text in streams for each in Scenario.parse_all(text)], seeds=seeds, device=device,
        threads=threads, paced=paced,
    )  # fmt: skip


def execute(
    cells: "Sequence[Cell]",
    out: Path,
    *,
    jobs: int = 1,
    finished: dict[str, list[dict[str, Any]]] | None = None,
    unfit: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells while telling of it on standard error, and returns their rows.

    Rows are noted by key in `finished`, so that they are known where others fail. Methods that are not
    for a model are noted in `unfit`, with the reason; without it they fail.
    """
    from testtime.bench.cells import label  # noqa: PLC0415
    from testtime.bench.runner import run  # noqa: PLC0415

    with Watch(len(cells)) as watch:

        def name(cell: "Cell") -> str:
            return f"{label(vars(cell))} seed {cell.seed}"

        def notice(cell: "Cell", kind: str, count: int) -> None:
            if kind == "start":
                watch.begin(cell.key, name(cell), count)
            else:
                watch.advance(cell.key)

        def done(cell: "Cell", rows: list[dict[str, Any]] | None, now: bool) -> None:
            if rows is None:
                said = "no result"
            elif not now:
                said = "was finished before"
            else:
                said = f"{sum(row['error'] for row in rows) / len(rows):.2f} % error"
            if rows is not None and finished is not None:
                finished[cell.key] = rows
            watch.end(cell.key, f"{name(cell)}: {said}")

        def note(cell: "Cell", why: str) -> None:
            assert unfit is not None
            unfit[f"{label(vars(cell))} on {cell.model}"] = why

        def changed(count: int) -> None:
            typer.echo(
                f"images, model or method have changed: {count} of the finished cells run again",
                err=True,
            )

        return run(
            cells, out, jobs=jobs, on_notice=notice, on_done=done, on_changed=changed,
            on_unfit=None if unfit is None else note,
        )  # fmt: skip


def print_summary(rows: list[dict[str, Any]]) -> None:
    """One line for each method, the lowest error first; a table for each model and stream."""
    from testtime.bench.cells import label, run_words, stream_words  # noqa: PLC0415
    from testtime.bench.metrics import ENOUGH, ranked  # noqa: PLC0415
    from testtime.streams.scenarios import Scenario  # noqa: PLC0415

    late = any(row.get("paced_error") is not None for row in rows)
    several = len({row["seed"] for row in rows}) > 1
    tables = ranked(rows)
    worst = {"worst_class_error": "worst\nclass", "worst_domain_error": "worst\ndomain"}
    shown: dict[str, None] = {}
    for place, records in enumerate(tables):
        first = records[0]
        scenario = Scenario.from_toml(first["scenario"])
        typer.echo(
            ("\n" if place else "")
            + f"{first['model']} on {first['data']}, {stream_words(scenario)}{run_words(first)}"
        )
        found = [key for key in worst if any(key in r for r in records)]
        shown |= dict.fromkeys(worst[key].replace("\n", " ") for key in found)
        told = (
            {"auroc": "AUROC", "fpr95": "FPR95", "oscr": "OSCR", "h_score": "H"}
            if scenario.unknown
            else {"nll": "NLL", "brier": "Brier", "ece": "ECE"}
        )
        names = ["method", "error\n%", *(worst[key] for key in found), *["paced\n%"] * late]
        names += ["gain", *told.values(), "clean\n%", "time", "fwd/\nbwd", "MB"]
        lines = [
            (
                label(r),
                number(r["error"], 1) + (f" ± {number(r['error_std'], 1)}" if several else ""),
                *(number(r.get(key, float("nan")), 1) for key in found),
                *[number(r.get("paced_error", float("nan")), 1)] * late,
                "" if r["method"] == "source" else number(r["gain"], 1, sign=True),
                *(number(r.get(name, float("nan")), 2) for name in told),
                number(r["clean_error"], 1),
                number(r["time"], 1),
                f"{r['forwards_per_sample']:.2g}/{r['backwards_per_sample']:.2g}",
                number(r["peak_memory_mb"], 0),
            )
            for r in records
        ]
        print_table(names, lines, tight=True)
    typer.echo(
        "mean over domains" + (" ± standard deviation over seeds" if several else "") + "; gain: "
        "points of error less than source;\nclean: error on clean data afterwards; time: source = 1; "
        "fwd/bwd: passes for each sample;\nMB: peak memory with model and data"
        + ("; paced: error of a stream that does not wait" if late else "")
        + f"\n{', '.join(shown)}: error % there, of {ENOUGH} samples or more" * bool(shown)
    )


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """A number for people; a dash for what is not finite."""
    from math import isfinite  # noqa: PLC0415

    return f"{value:{'+' if sign else ''}.{digits}f}" if isfinite(value) else "-"
