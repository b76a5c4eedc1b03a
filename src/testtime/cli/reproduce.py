"""`testtime reproduce`: the small check of one paper."""

import typer

from testtime.cli.show import Json, exits, print_json, print_table


@exits
def reproduce(
    slug: str = typer.Argument(..., help="A paper; testtime papers lists them."), json: bool = Json
) -> None:
    """Run the small check of a paper and say whether its claim held (exit code 1 if not)."""
    from testtime._core.errors import OptionError  # noqa: PLC0415
    from testtime._core.registry import entries  # noqa: PLC0415
    from testtime.papers.catalogue import record  # noqa: PLC0415

    paper = record(slug)
    checks = {entry.paper: entry for entry in entries("check").values()}
    if slug not in checks:
        raise OptionError(f"{paper.slug} has no small check yet; there are: {', '.join(checks)}")
    result = checks[slug].factory()
    if json:
        print_json(vars(result))
    else:
        typer.echo(f"{paper.title}\n\nclaim: {result.claim}\n")
        numbers = [(name, str(value)) for name, value in result.numbers.items()]
        print_table(["number", f"seeds {', '.join(map(str, result.seeds))}"], numbers)
        typer.echo(f"\n{'held' if result.held else 'not held'}")
    if not result.held:
        raise typer.Exit(1)
