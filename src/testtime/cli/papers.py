"""`testtime papers`: the catalogue, searchable."""

import typer

from testtime.cli.show import Json, exits, print_json, print_table


@exits
def papers(
    query: str = typer.Argument("", help="Words to look for in slug, title, family, symbols."),
    json: bool = Json,
) -> None:
    """List the papers of the field and what each became here.

    The column "here" says: "works", the library has code for the paper; "checked", testtime reproduce
    tests its claim as well; "planned", nothing is here yet.
    """
    from testtime.papers.catalogue import search  # noqa: PLC0415

    found = search(query)
    if json:
        keys = ("slug", "title", "family", "state", "symbols")
        print_json([{key: getattr(record, key) for key in keys} for record in found])
        return
    if not found:
        typer.echo(f"no paper has all of these words: {query}")
        return
    print_table(
        ["slug", "family", "here", "title"],
        [(r.slug, r.family, "checked" if r.check else r.state, r.title) for r in found],
        title=f"{len(found)} {'paper' if len(found) == 1 else 'papers'}",
    )
    for record in found:
        if record.slug == query and record.symbols:
            typer.echo(f"\n{query} became {', '.join(record.symbols)}")
            if record.check:
                typer.echo(f"its claim, tried: testtime reproduce {query}")
