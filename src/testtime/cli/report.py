"""`testtime report`: a run as one HTML file."""

from pathlib import Path

import typer

from testtime.cli.bench import print_summary
from testtime.cli.show import Json, exits, print_json


@exits
def report(
    run: Path = typer.Argument(..., help="Folder that testtime bench wrote."),  # noqa: B008
    json: bool = Json,
) -> None:
    """Print a run's table and write its plots to report.html in the folder."""
    from testtime.bench.store import read_run  # noqa: PLC0415

    rows = read_run(run)
    if json:
        print_json(rows)
        return
    from testtime.bench.report import write_report  # noqa: PLC0415

    print_summary(rows)
    typer.echo(f"\nreport: {write_report(rows, run / 'report.html')}")
