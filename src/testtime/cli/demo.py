"""`testtime demo`: the main job on embedded data, in less than a minute."""

import os
from functools import partial
from pathlib import Path

import typer

from testtime.cli.bench import cells_of, execute, print_summary
from testtime.cli.show import GOES_ON, Json, exits, print_json

METHODS = ("bn-adapt", "tent", "eta", "eata", "sar", "deyo", "lame")
STREAM = "continual,severity=5,batch_size=200,samples=600"


@partial(exits, interrupted=GOES_ON)
def demo(
    out: Path = typer.Option(Path("testtime-demo"), help="Folder of results."),  # noqa: B008
    json: bool = Json,
) -> None:
    """Try it: adapt a classifier to fifteen kinds of corrupted images.

    Ends with a table and an HTML report with plots. Fashion-MNIST images that the
    embedded model was not trained on, 600 for each corruption, arrive in batches
    of 200 without labels. A second call with the same folder shows the same.

    Example: testtime demo --out my-demo
    """
    cells = cells_of(METHODS, ["embedded:batch"], "fashion-mnist:sample", [STREAM], 1)
    rows = execute(cells, out, jobs=os.cpu_count() or 1)
    if json:
        print_json(rows)
        return
    from testtime.bench.report import write_report  # noqa: PLC0415

    print_summary(rows)
    typer.echo(f"\nreport: {write_report(rows, out / 'report.html')}")
