"""`testtime reproduce`: the small check of one paper."""

from statistics import fmean

import typer

from testtime.cli.show import Json, exits, print_json, print_table, print_text, progress

EACH = 5
"""Seeds up to which the number of each is shown, not only their range."""


@exits
def reproduce(
    slug: str = typer.Argument(..., help="A paper; testtime papers lists them."),
    seeds: int = typer.Option(3, min=1, help="Seeds 0 to N - 1."),
    json: bool = Json,
) -> None:
    """Run the small check of a paper and say whether its claim held (exit code 1 if not).

    Example: testtime reproduce tent --seeds 1
    """
    from testtime._core.errors import OptionError  # noqa: PLC0415
    from testtime._core.registry import entries  # noqa: PLC0415
    from testtime.papers.catalogue import record  # noqa: PLC0415

    paper = record(slug)
    checks = {entry.paper: entry for entry in entries("check").values()}
    if slug not in checks:
        raise OptionError(f"{paper.slug} has no small check yet; there are: {', '.join(checks)}")
    with progress() as bar:
        task = bar.add_task(slug, total=None)
        result = checks[slug].factory(
            seeds=range(seeds),
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        print_json(vars(result))
    else:
        print_text(f"{paper.title}\n\nclaim: {result.claim}\n")
        print_numbers(result.numbers, result.seeds)
        verdict = result.numbers["claim held"]
        count = f"for {sum(map(bool, verdict))} of {len(verdict)} seeds"
        print_text(f"\n{'held' if result.held else 'not held'}, {count}")
    if not result.held:
        raise typer.Exit(1)


def print_numbers(numbers: dict[str, list[float]], seeds: list[int]) -> None:
    """One line for each number: its value with each seed, or with many seeds their range."""
    few = len(seeds) <= EACH
    columns = [f"seed {seed}" for seed in seeds] if few else ["lowest", "highest"]
    rows = [
        [name, *map(number, values if few else (min(values), max(values))), number(fmean(values))]
        for name, values in numbers.items()
        if name != "claim held"
    ]
    print_table(["", *columns, "mean"], rows)


def number(value: float) -> str:
    """Two places, and two digits of what is smaller than a tenth."""
    return f"{value:.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}"
