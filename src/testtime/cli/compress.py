"""`testtime compress` and `testtime decompress`: text without loss, by a language model."""

import sys
from pathlib import Path
from typing import Any

import typer

from testtime.cli.show import Json, exits, print_json, print_text, progress

SUFFIX = ".ttlz"
Model = typer.Option("gemma:270m", help="gemma:270m, or hf:NAME_OR_PATH.")
Out = typer.Option(
    None, "--out", help="Where to write; - is standard output. Never over a file without --force."
)
Force = typer.Option(False, "--force", help="Write over a file that exists.")


@exits
def compress(
    file: Path = typer.Argument(..., help="File to compress; - reads standard input."),  # noqa: B008
    out: Path | None = Out,
    model: str = Model,
    window: int | None = typer.Option(None, help="Tokens of context; 512 if the model has them."),
    lanes: int | None = typer.Option(
        None, help="Parts coded side by side: more are quicker, and a little larger."
    ),
    force: bool = Force,
    json: bool = Json,
) -> None:
    """Compress a text without loss with the probabilities of a language model.

    Slow and small: tens of tokens a second on one core. The file can be read again
    with the same model, versions and machine; it is refused otherwise.

    Example: testtime compress notes.txt
    """
    from testtime._core.errors import OptionError  # noqa: PLC0415
    from testtime.decode.compression import compress as run  # noqa: PLC0415

    content = read(file)
    if out is None and is_pipe(file):
        raise OptionError("standard input has no name: say where to write with --out")
    place = free(out or file.with_name(file.name + SUFFIX), force=force, json=json)
    with progress() as bar:
        loaded, tokenizer = load(model, bar)
        task = bar.add_task(f"compress {file.name}", total=None)
        made = run(
            content, loaded, tokenizer, window=window, lanes=lanes,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    write(place, made.data)
    found = {
        "file": str(place), "bytes": len(content), "compressed": len(made.data),
        "characters": made.characters, "tokens": made.tokens,
        "bits_per_character": made.bits_per_character, "bound": made.bound,
    }  # fmt: skip
    if json:
        print_json(found)
    elif not is_pipe(place):
        print_text(
            f"{place}: {len(content)} bytes became {len(made.data)}, "
            f"{made.bits_per_character:.3f} bits per character (the model's own: {made.bound:.3f})"
        )


@exits
def decompress(
    file: Path = typer.Argument(..., help="What testtime compress wrote; - reads standard input."),  # noqa: B008
    out: Path | None = Out,
    model: str = Model,
    force: bool = Force,
    json: bool = Json,
) -> None:
    """Restore the exact bytes that testtime compress was given.

    Example: testtime decompress notes.txt.ttlz --out notes.txt
    """
    from testtime._core.errors import OptionError  # noqa: PLC0415
    from testtime.decode.compression import decompress as run  # noqa: PLC0415
    from testtime.decode.container import inspect  # noqa: PLC0415

    data = read(file)
    inspect(data)  # a damaged file is told before a model is loaded
    if out is None and file.suffix != SUFFIX:
        raise OptionError(f"{file.name} does not end with {SUFFIX}: say where to write with --out")
    place = free(out or file.with_suffix(""), force=force, json=json)
    with progress() as bar:
        loaded, tokenizer = load(model, bar)
        task = bar.add_task(f"decompress {file.name}", total=None)
        content = run(
            data, loaded, tokenizer,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    write(place, content)
    if json:
        print_json({"file": str(place), "bytes": len(content), "compressed": len(data)})
    elif not is_pipe(place):
        print_text(f"{place}: {len(content)} bytes")


def load(name: str, bar: Any) -> tuple[Any, Any]:
    """A language model and its tokenizer; a bar shows its conversion where there is one."""
    from testtime.decode.models import load_language_model  # noqa: PLC0415

    task = bar.add_task(f"load {name}", total=None)
    found = load_language_model(
        name, on_progress=lambda done, total: bar.update(task, completed=done, total=total)
    )
    bar.remove_task(task)
    return found


def is_pipe(file: Path) -> bool:
    """Whether standard input or output is meant."""
    return str(file) == "-"


def read(file: Path) -> bytes:
    """The content of a file or of standard input, or an error that says why there is none."""
    from testtime._core.errors import InputError  # noqa: PLC0415

    if is_pipe(file):
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def read_text(file: Path) -> str:
    """The text of a file or of standard input, or an error that says why there is none."""
    from testtime._core.errors import InputError  # noqa: PLC0415

    try:
        return read(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text in UTF-8: {error.reason} at {error.start}") from error


def free(place: Path, *, force: bool, json: bool) -> Path:
    """The place, if it can be written to and nothing would be lost there."""
    from testtime._core.errors import InputError, OptionError  # noqa: PLC0415

    if is_pipe(place):
        if json:
            raise OptionError("--json and --out - would both write to standard output; give one")
        return place
    if not place.parent.is_dir():
        raise InputError(f"{place} cannot be written: there is no folder {place.parent}")
    if place.is_dir() or (place.exists() and not force):
        way = "give another --out" if place.is_dir() else "give another --out, or --force"
        raise InputError(f"{place} exists already; {way}")
    return place


def write(place: Path, content: bytes) -> None:
    """Writes a file wholly or not at all; or to standard output."""
    from testtime._core.errors import WorkFailed  # noqa: PLC0415
    from testtime._core.files import atomic  # noqa: PLC0415

    if is_pipe(place):
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        with atomic(place) as part:
            part.write_bytes(content)
    except OSError as error:
        raise WorkFailed(f"{place} cannot be written: {error.strerror}") from error
