"""`testtime bench`: methods x models x scenarios x seeds, on disk, resumable."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from testtime.cli.show import Json, exits, print_json, print_table, progress


@exits
def bench(
    methods: str = typer.Option(..., help="Names with commas between; `source` is always run."),
    out: Path = typer.Option(..., help="Folder of results; if it exists, the run goes on."),  # noqa: B008
    data: str = typer.Option("fashion-mnist:sample", help="fashion-mnist, digits, folder:PATH"),
    model: str = typer.Option("embedded:batch", help="Names with commas: embedded:group, timm:…"),
    stream: list[str] = typer.Option(  # noqa: B008
        ["continual"], help="Scenario, e.g. sorted,batch_size=16. May be given again."
    ),
    seeds: int = typer.Option(3, min=1, help="Seeds 0 to N - 1."),
    json: bool = Json,
) -> None:
    """Compare methods on a stream; an interrupted run goes on with the same command.

    Example: testtime bench --methods tent,eata --stream continual,batch_size=200 --out runs/a
    """
    rows = execute(methods.split(","), model.split(","), data, stream, seeds, out)
    if json:
        print_json(rows)
    else:
        print_summary(rows)
        typer.echo(f"\nHTML report: testtime report {out}")


def execute(
    methods: Sequence[str], models: Sequence[str], data: str, streams: Sequence[str], seeds: int,
    out: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """Runs the cells with a progress bar, and returns their rows."""
    from testtime._core.registry import find  # noqa: PLC0415
    from testtime.bench.runner import Cell, plan, run  # noqa: PLC0415
    from testtime.streams.scenarios import Scenario  # noqa: PLC0415

    for name in methods:
        find("method", name)
    scenarios = [Scenario.parse(text) for text in streams]
    cells = plan(methods=methods, models=models, data=data, streams=scenarios, seeds=seeds)
    with progress() as bar:
        whole = bar.add_task("all", total=len(cells))
        part = bar.add_task("", total=None, visible=False)

        def start(cell: Cell, batches: int) -> None:
            bar.reset(
                part, total=batches, description=f"{cell.method} seed {cell.seed}", visible=True
            )

        return run(
            cells, out, on_start=start,
            on_batch=lambda: bar.advance(part), on_done=lambda _: bar.advance(whole),
        )  # fmt: skip


def print_summary(rows: list[dict[str, Any]]) -> None:
    """One line for each method, the lowest error first."""
    from testtime.bench.metrics import summarise  # noqa: PLC0415

    table = summarise(rows)
    sources = {(r["model"], r["stream"]): r for r in table if r["method"] == "source"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in table:
        groups.setdefault((record["model"], record["stream"]), []).append(record)
    for key, records in groups.items():
        base = sources[key]
        lines = [
            (
                r["method"],
                f"{r['error']:.1f} ± {r['error_std']:.1f}",
                f"{base['error'] - r['error']:+.1f}",
                f"{r['nll']:.2f}",
                f"{r['ece']:.3f}",
                f"{r['clean_error']:.1f}",
                f"{r['seconds_per_batch'] / base['seconds_per_batch']:.1f}",
                f"{r['forwards_per_sample']:.1f} / {r['backwards_per_sample']:.1f}",
            )
            for r in sorted(records, key=lambda r: r["error"])
        ]
        columns = ["method", "error %", "gain", "NLL", "ECE", "clean %", "time", "fwd / bwd"]
        print_table(columns, lines, title=f"{key[0]}, {key[1]} stream")
