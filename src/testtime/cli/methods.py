"""`testtime methods`: what there is; options and paper of one."""

import inspect

import typer

from testtime.cli.show import Json, exits, print_json, print_table


@exits
def methods(
    name: str = typer.Argument("", help="A method, for its algorithm, options and paper."),
    json: bool = Json,
) -> None:
    """List the methods, or show the algorithm, options and paper of one.

    Example: testtime methods tent
    """
    import testtime as tt  # noqa: PLC0415
    from testtime._core.registry import find  # noqa: PLC0415

    chosen = [tt.methods()[find("method", name).name]] if name else list(tt.methods().values())
    if json:
        print_json([vars(method) for method in chosen])
    elif name:
        factory = find("method", name).factory
        typer.echo(f"{inspect.getdoc(inspect.getmodule(factory))}\n\n{inspect.getdoc(factory)}\n")
        shown = [(o, getattr(v, "__name__", repr(v))) for o, v in chosen[0].options.items()]
        if shown:
            print_table(["option", "default"], shown)
    else:
        rows = [(m.name, m.summary, ", ".join(m.needs)) for m in chosen]
        print_table(["method", "what it does", "needs of the source data"], rows)
        typer.echo("\nOne of them: testtime methods NAME")
