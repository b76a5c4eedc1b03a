"""The command line: `testtime COMMAND`."""

import sys
from io import TextIOWrapper

import typer

from testtime.cli import (
    bench,
    compress,
    demo,
    generate,
    methods,
    papers,
    report,
    reproduce,
    watermark,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Makes trained models better while they are in use, without labels. "
    "Begin with: testtime demo",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415

        typer.echo(version("testtime"))
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Exit codes: 0 done, 1 the work failed or a claim did not hold, 2 the call was wrong."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal without the letter for ± shows ?
        sys.stdout.reconfigure(errors="replace")


app.command("demo")(demo.demo)
app.command("methods")(methods.methods)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("papers")(papers.papers)
app.command("reproduce")(reproduce.reproduce)
app.command("compress")(compress.compress)
app.command("decompress")(compress.decompress)
app.add_typer(watermark.app, name="watermark")
app.command("generate")(generate.generate)
