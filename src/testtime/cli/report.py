"""`testtime report`: a run as one HTML file."""

from pathlib import Path

import typer

from testtime.cli.bench import print_summary
from testtime.cli.show import Json, exits, print_json


@exits
def report(
    run: Path = typer.Argument(..., help="Folder that testtime bench wrote."),  # noqa: B008
    partial: bool = typer.Option(False, "--partial", help="Show a run that has not finished."),
    json: bool = Json,
) -> None:
    """Show a run: its table, and one HTML file with plots.

    The file is report.html in the folder; it needs no network and no other file.
    With --json the result rows are printed instead, one for each method, domain
    and seed, with the error in percent.

    Example: testtime report runs/a
    """
    from testtime.bench.store import read_run  # noqa: PLC0415

    rows = read_run(run, partial=partial)
    if json:
        print_json(rows)
        return
    from testtime.bench.report import check_rows, write_report  # noqa: PLC0415

    check_rows(rows)
    print_summary(rows)
    typer.echo(f"\nreport: {write_report(rows, run / 'report.html')}")
