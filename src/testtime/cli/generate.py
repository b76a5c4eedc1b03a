"""`testtime generate`: a text goes on, by a decoding method."""

import ast
import sys
from pathlib import Path
from typing import Any

import typer

from testtime.cli.show import Json, exits, print_json, progress


@exits
def generate(
    prompt: str = typer.Argument(..., help="The text to go on from; - reads standard input."),
    model: str = typer.Option("gemma:270m", help="gemma:270m or hf:NAME_OR_PATH."),
    method: str = typer.Option("sample", help="A decoding method, e.g. em-inf, min-p, edt, top-p."),
    option: list[str] = typer.Option([], help="NAME=VALUE of the method; repeat for more."),  # noqa: B008
    max_new_tokens: int = typer.Option(128, min=1, help="At most."),
    stop: list[str] = typer.Option([], help="String that ends the text; repeat for more."),  # noqa: B008
    seed: int = typer.Option(0, help="Of what is drawn."),
    large: str = typer.Option("", help="The large model, for ead."),
    lame: Path | None = typer.Option(None, help="File with the lame prompt, for uscd."),  # noqa: B008
    json: bool = Json,
) -> None:
    """Go on from a text with a language model, and show it as it is written.

    The first use of gemma:270m converts the installed weights, once.

    Example: testtime generate "The capital of France is" --method min-p --option p=0.05
    """
    from testtime._core.errors import InputError  # noqa: PLC0415
    from testtime._core.registry import find  # noqa: PLC0415
    from testtime.decode.api import generate as write  # noqa: PLC0415

    find("decoding", method).build(**(options := _options(option)))  # before a model is loaded
    if lame is not None and not lame.is_file():
        raise InputError(f"there is no file {lame}; expected a text, the lame prompt.")
    if prompt == "-":
        prompt = sys.stdin.read()
    first, tokenizer = _load(model)
    second = _load(large)[0] if large else None
    found = write(
        first,
        tokenizer,
        prompt,
        method,
        max_new_tokens=max_new_tokens,
        stop=stop,
        seed=seed,
        large=second,
        lame=None if lame is None else lame.read_text("utf-8"),
        on_text=None if json else _show,
        **options,
    )
    if json:
        print_json({"prompt": prompt, "model": model, "method": method, **vars(found)})
    else:
        sys.stdout.write("\n")


def _show(_: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _load(spec: str) -> tuple[Any, Any]:
    from testtime.decode.models import load_language_model  # noqa: PLC0415

    with progress() as bar:
        task = bar.add_task(spec, total=None)
        return load_language_model(
            spec, on_progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def _options(given: list[str]) -> dict[str, Any]:
    from testtime._core.errors import OptionError  # noqa: PLC0415

    found: dict[str, Any] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise OptionError(f"--option {each} has no value; expected NAME=VALUE, e.g. p=0.1")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = float(value) if value in ("inf", "nan") else value
    return found
