"""`testtime watermark`: is a text marked, and a text that is."""

import sys
from pathlib import Path

import typer

from testtime.cli.compress import Model, load, read_text
from testtime.cli.show import Json, exits, print_json, print_text, progress

app = typer.Typer(no_args_is_help=True, help="Watermark what a model writes, and detect it.")
Gamma = typer.Option(0.25, help="Share of green tokens.")
Tau = typer.Option(0.9, help="Entropy in nats above which a token is marked (sweet).")
Plain = typer.Option(False, "--plain", help="The plain watermark: every token, no threshold.")
Key = typer.Option(15485863, help="Key of the green lists.")


@app.command()
@exits
def detect(
    file: Path = typer.Argument(..., help="Text in UTF-8; - reads standard input."),  # noqa: B008
    prompt: Path | None = typer.Option(None, help="File with the prompt, if it is known."),  # noqa: B008
    model: str = Model,
    gamma: float = Gamma,
    tau: float = Tau,
    plain: bool = Plain,
    key: int = Key,
    level: float = typer.Option(0.01, min=0, max=1, help="Called watermarked below this p."),
    json: bool = Json,
) -> None:
    """Say how unlikely the green tokens of a text are without the watermark.

    Each pair of tokens counts once. The prompt need not be known; with it
    the entropies, and so the counted tokens, are those of generation.

    Example: testtime watermark detect answer.txt
    """
    from testtime.decode.watermark import Watermark, detect_text  # noqa: PLC0415

    text = read_text(file)
    before = read_text(prompt) if prompt is not None else ""
    with progress() as bar:
        loaded, tokenizer = load(model, bar)
        task = bar.add_task("read", total=None)
        mark = Watermark(
            vocabulary=len(tokenizer), gamma=gamma, tau=None if plain else tau, key=key
        )
        found = detect_text(
            text, loaded, tokenizer, mark, prompt=before,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    marked = found.p_value < level
    if json:
        print_json({**vars(found), "watermarked": marked, "level": level})
        return
    print_text(
        f"{'watermarked' if marked else 'no watermark found'}: z {found.z:.2f}, "
        f"p {found.p_value:.2g}; {found.green} of {found.scored} counted tokens are green, "
        f"{gamma:.0%} would be by chance"
    )


@app.command()
@exits
def generate(
    prompt: str = typer.Argument(..., help="The text to continue; - reads standard input."),
    model: str = Model,
    tokens: int = typer.Option(200, min=1, help="Most tokens to write."),
    temperature: float = typer.Option(0.8, min=0.01, help="Temperature of sampling."),
    seed: int = typer.Option(0, help="Seed of sampling."),
    gamma: float = Gamma,
    delta: float = typer.Option(3.0, help="Added to the scores of green tokens."),
    tau: float = Tau,
    plain: bool = Plain,
    key: int = Key,
    json: bool = Json,
) -> None:
    """Write a text with the watermark in it.

    Example: testtime watermark generate "def mean(values):" > answer.txt
    """
    from testtime.decode.api import generate as run  # noqa: PLC0415
    from testtime.decode.decoding import Decoding  # noqa: PLC0415
    from testtime.decode.methods.classical import heated  # noqa: PLC0415
    from testtime.decode.watermark import Watermark  # noqa: PLC0415

    prompt = read_text(Path("-")) if prompt == "-" else prompt
    with progress() as bar:
        loaded, tokenizer = load(model, bar)
        mark = Watermark(
            vocabulary=len(tokenizer), gamma=gamma, delta=delta,
            tau=None if plain else tau, key=key,
        )  # fmt: skip
        bar.add_task("write", total=None)
        method = Decoding(steps=(mark, *heated(temperature)))
        found = run(loaded, tokenizer, prompt, method, max_new_tokens=tokens, seed=seed)
    if json:
        used = {"gamma": gamma, "delta": delta, "tau": None if plain else tau, "key": key}
        print_json({"prompt": prompt, "model": model, **used, **vars(found)})
    else:
        sys.stdout.write(f"{found}\n")
