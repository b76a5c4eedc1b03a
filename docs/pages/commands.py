"""The page of the command line, written from the program itself."""

from typing import Any

import typer
from typer.core import TyperGroup

from testtime.cli.main import app

HEAD = """# Command line

Exit codes: 0 done, 1 the work failed or a claim did not hold, 2 the call was wrong. Every command
that prints a table prints JSON with `--json`. A call that is wrong is answered with one sentence on
standard error.
"""


def page() -> str:
    """All commands with their arguments and options."""
    program = typer.main.get_command(app)
    if not isinstance(program, TyperGroup):
        raise TypeError("the program has no commands")
    return "\n".join([HEAD, *(_command(name, c) for name, c in _commands(program).items())])


def _commands(group: TyperGroup, before: str = "") -> dict[str, Any]:
    """Every command by its full name; a group stands for those in it."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inside = isinstance(command, TyperGroup)
        found |= _commands(command, f"{name} ") if inside else {before + name: command}
    return found


def _command(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=f"testtime {name}")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    if "Example: " in text:
        text, _, example = text.partition("Example: ")
        text += f"\n```bash\n{example}\n```\n"
    rows = [_parameter(each, context) for each in command.params if each.name != "help"]
    table = ["| argument or option | default | |", "|---|---|---|", *rows] if rows else []
    return f"## testtime {name}\n\n```text\n{usage}\n```\n\n{text}\n\n" + "\n".join(table) + "\n"


def _parameter(parameter: Any, context: Any) -> str:
    shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name or ""
    default = parameter.get_default(context)
    values = default if isinstance(default, list | tuple) else [default]
    value = ", ".join(f"`{one}`" for one in values if one not in (None, "", False))
    meaning = getattr(parameter, "help", None) or ""
    return f"| `{shown}` | {'required' if parameter.required else value} | {meaning} |"
