"""`testtime papers`: the catalogue, searchable."""

import typer

from testtime.cli.show import Json, exits, print_json, print_table


@exits
def papers(
    query: str = typer.Argument("", help="Words to look for in slug, title, family, symbols."),
    json: bool = Json,
) -> None:
    """List the papers of the field and what each became here."""
    from testtime.papers.catalogue import search  # noqa: PLC0415

    found = search(query)
    if json:
        keys = ("slug", "title", "family", "state", "symbols")
        print_json([{key: getattr(record, key) for key in keys} for record in found])
        return
    print_table(
        ["slug", "family", "state", "title"],
        [(r.slug, r.family, r.state, r.title) for r in found],
        title=f"{len(found)} papers",
    )
