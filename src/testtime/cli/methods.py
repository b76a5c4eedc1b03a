"""`testtime methods`: what there is; options and paper of one."""

import typer

from testtime.cli.show import Json, exits, print_json, print_table


@exits
def methods(
    name: str = typer.Argument("", help="A method, for its options."), json: bool = Json
) -> None:
    """List the methods, or show the options of one."""
    import testtime as tt  # noqa: PLC0415
    from testtime._core.registry import find  # noqa: PLC0415

    chosen = [tt.methods()[find("method", name).name]] if name else list(tt.methods().values())
    if json:
        print_json([vars(method) for method in chosen])
    elif name:
        typer.echo(find("method", name).factory.__doc__)
        shown = [(o, getattr(v, "__name__", repr(v))) for o, v in chosen[0].options.items()]
        print_table(["option", "default"], shown, title=name)
    else:
        rows = [(m.name, m.summary, ", ".join(m.needs)) for m in chosen]
        print_table(["method", "what it does", "needs"], rows)
