"""`testtime generate`: a text goes on, by a decoding method."""

import ast
import sys
from pathlib import Path
from typing import Any

import typer

from testtime.cli.compress import load, read_text
from testtime.cli.show import Json, exits, print_json, progress


@exits
def generate(
    prompt: str = typer.Argument(..., help="The text to continue; - reads standard input."),
    model: str = typer.Option("gemma:270m", help="gemma:270m or hf:NAME_OR_PATH."),
    method: str = typer.Option("sample", help="A decoding method, e.g. em-inf, min-p, edt, top-p."),
    option: list[str] = typer.Option([], help="NAME=VALUE of the method; repeat for more."),  # noqa: B008
    max_new_tokens: int = typer.Option(128, min=1, help="Most tokens to write."),
    stop: list[str] = typer.Option([], help="String that ends the text; repeat for more."),  # noqa: B008
    seed: int = typer.Option(0, help="Seed of the random draws."),
    large: str = typer.Option("", help="The large model, for ead."),
    lame: Path | None = typer.Option(None, help="File with the lame prompt, for uscd."),  # noqa: B008
    json: bool = Json,
) -> None:
    """Continue a text with a language model, and show it while it is written.

    The first use of gemma:270m converts the installed weights, once.

    Example: testtime generate "The capital of France is" --method min-p --option p=0.05
    """
    from testtime._core.errors import InputError  # noqa: PLC0415
    from testtime._core.registry import find  # noqa: PLC0415
    from testtime.decode.api import generate as write  # noqa: PLC0415

    # what is wrong is told before a model is loaded
    find("decoding", method).build(**(options := _options(option)))
    without = None if lame is None else read_text(lame)
    if not (prompt := read_text(Path("-")) if prompt == "-" else prompt):
        raise InputError("the prompt is empty; expected a text of at least one character")
    with progress() as bar:
        first, tokenizer = load(model, bar)
        second = load(large, bar)[0] if large else None
    found = write(
        first,
        tokenizer,
        prompt,
        method,
        max_new_tokens=max_new_tokens,
        stop=stop,
        seed=seed,
        large=second,
        lame=without,
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
