"""What a run consists of: cells, each a record that says all that its result depends on."""

import ast
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import testtime as tt
from testtime._core.errors import OptionError
from testtime._core.registry import entries, find
from testtime.bench.models import shown_to
from testtime.streams.scenarios import Scenario

EVERY = "all"
"""Stands for every method where methods are named."""

WATCHED = {
    "weights_sha256": "model", "model_code_sha256": "model", "method_code_sha256": "method",
    "data_sha256": "data", "source_data_sha256": "data",
}  # fmt: skip
"""Columns of a row that tell what a field of its cell stood for when it ran: a hash, or None."""


def shared(column: str, record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What records share that have the same value in a column of `WATCHED`.

    Of images that were corrupted beforehand, often too many to read them all, only those count that
    a stream sends, which its seed chooses.

    Example:
        >>> shared("data_sha256", {"data": "folder:photos", "stream": "...", "seed": 0})
        ('data_sha256', 'folder:photos')
    """
    own = record.get(WATCHED[column])
    if WATCHED[column] == "data" and str(own).startswith("corrupted:"):
        return column, own, record.get("stream"), record.get("seed")
    return column, own


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one model, one stream and one seed.

    Attributes:
        method: name of the method.
        options: of the method, as JSON; those that have their default are left out.
        model: as `load_model` takes it.
        data: as `load_data` takes it.
        stream: a scenario, as TOML.
        seed: of the stream and of the method.
        device: "cpu", "cuda", "cuda:1", …
        threads: that torch computes with; sums, and so the last bits, may depend on it.
        paced: whether the stream is also run as one that does not wait, see `pace`.
    """

    method: str
    options: str = "{}"
    model: str
    data: str
    stream: str
    seed: int
    device: str = "cpu"
    threads: int = 1
    paced: bool = False

    @property
    def key(self) -> str:
        """A name that depends on the whole record and on the version of the library."""
        own = {name: value for name, value in vars(self).items() if name != "paced" or value}
        record = json.dumps({**own, "version": tt.__version__}, sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        stream = stream_words(Scenario.from_toml(self.stream))
        return f"{label(vars(self))} on {self.model}, {self.data}, {stream}, seed {self.seed}"


def plan(
    *,
    methods: Sequence[str],
    models: Sequence[str],
    data: str,
    streams: Sequence[Scenario],
    seeds: int,
    device: str = "cpu",
    threads: int = 1,
    paced: bool = False,
) -> list[Cell]:
    """The cells of a run, seed by seed. The source model is always among the methods, and first.

    Args:
        methods: names, with options as `parse_method` reads them; "all" stands for every method.
        models: as `load_model` takes them.
        data: as `load_data` takes it; of a folder each model sees what `shown_to` says.
        streams: what arrives.
        seeds: how many; 0 to seeds - 1.
        device: where the models run.
        threads: that torch computes with in each cell.
        paced: whether each stream is also run as one that does not wait.

    Raises:
        UnknownName: no method is called that.
        OptionError: a method has no such option, or it cannot take the value; or no model is named.

    Example:
        >>> cells = plan(methods=["tent", "tent(lr=0.01)"], models=["embedded:batch"],
        ...              data="fashion-mnist:sample", streams=[Scenario()], seeds=1)
        >>> [label(vars(cell)) for cell in cells]
        ['source', 'tent', 'tent(lr=0.01)']
    """
    named = [name for text in methods for name in (entries("method") if text == EVERY else [text])]
    if not models:
        raise OptionError("no model is named; expected at least one, as embedded:batch.")
    chosen = dict.fromkeys(parse_method(text) for text in ("source", *named))
    return [
        Cell(
            method=method, options=options, model=model, data=shown, stream=stream.to_toml(),
            seed=seed, device=device, threads=threads, paced=paced,
        )
        for model in dict.fromkeys(models)
        for shown in [shown_to(model, data)]
        for stream in dict.fromkeys(streams)
        for seed in range(seeds)
        for method, options in chosen
    ]  # fmt: skip


def split_methods(text: str) -> list[str]:
    """Names of methods with commas between; commas inside parentheses belong to a method.

    Example:
        >>> split_methods("tent, sar(lr=0.01, margin=0.5)")
        ['tent', 'sar(lr=0.01, margin=0.5)']
    """
    return [part for part in map(str.strip, re.split(r",(?![^(]*\))", text)) if part]


def split_models(text: str) -> list[str]:
    """Names of models with commas between; a comma that no name follows belongs to a file's path.

    Example:
        >>> split_models("embedded:batch, file:a,b/net.py@build")
        ['embedded:batch', 'file:a,b/net.py@build']
    """
    return [part for part in map(str.strip, re.split(r",(?=\s*(?:\w+:|,|$))", text)) if part]


def parse_method(text: str) -> tuple[str, str]:
    """Name and options of a method, from `NAME` or `NAME(option=value, ...)`; runs no code.

    Values are numbers, `True`, `False`, `None` and quoted strings. Options that are given their
    default are left out, so that what is the same has the same record.

    Returns:
        The name, and the options as JSON.

    Raises:
        UnknownName: no method is called that.
        OptionError: it has no such option, or the option cannot take the value.

    Example:
        >>> parse_method("tent(steps=2, lr=0.001)")
        ('tent', '{"steps": 2}')
    """
    name, bracket, rest = text.partition("(")
    entry = find("method", name.strip())
    given = _arguments(text) if bracket or rest else {}
    entry.build(**given)
    kept = {k: _value(text, k, v, entry.options[k]) for k, v in sorted(given.items())}
    entry.build(**kept)
    return entry.name, json.dumps({k: v for k, v in kept.items() if v != entry.options[k]})


def _arguments(text: str) -> dict[str, Any]:
    """Options of a call, from its syntax alone."""
    name, _, rest = text.partition("(")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg}
        if len(given) < len(call.keywords):  # **options, or one given twice
            raise ValueError
        return given
    except (SyntaxError, ValueError) as error:
        raise OptionError(
            f"{text!r} cannot be read; expected a name and options with plain values, as "
            f"{name.strip()}(lr=0.01) or {name.strip()}(lr=0.01, steps=2)."
        ) from error


def _value(text: str, name: str, value: Any, default: Any) -> Any:
    """The value as the default's kind; numbers without a fraction will do for a real number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if callable(default):
        raise OptionError(
            f"{text!r}: {name} takes a part of a recipe ({default.__name__}), which has no text "
            "form. Leave it out, or register a method of your own that sets it."
        )
    if isinstance(default, float) and number:
        return float(value)
    fits = value is None or number if default is None else type(value) is type(default)
    if not fits:
        kind = "a number or None" if default is None else f"a value like {default!r}"
        raise OptionError(f"{text!r}: {name} is {value!r}; expected {kind}.")
    return value


def label(record: Mapping[str, Any]) -> str:
    """A method's name, with its options where they are not the defaults.

    Example:
        >>> label({"method": "tent", "options": '{"lr": 0.01}'})
        'tent(lr=0.01)'
    """
    try:
        options = json.loads(record["options"])
        words = ", ".join(f"{name}={value!r}" for name, value in options.items())
    except (ValueError, AttributeError):  # a row of another maker
        words = record["options"]
    return record["method"] + (f"({words})" if words else "")


def run_words(record: Mapping[str, Any]) -> str:
    """How a cell was run, where that is unusual, with a comma before each word.

    Example:
        >>> run_words({"device": "cuda", "threads": 2, "paced": True}), run_words({"threads": 1})
        (', cuda, 2 threads, paced', '')
    """
    device, threads = record.get("device") or "cpu", record.get("threads") or 1
    words = [device] * (device != "cpu") + [f"{threads} threads"] * (threads != 1)
    return "".join(f", {word}" for word in [*words, *["paced"] * bool(record.get("paced"))])


def stream_words(scenario: Scenario) -> str:
    """What of a scenario differs from the defaults, as words of `--stream`.

    Example:
        >>> stream_words(Scenario.parse("gradual,dirichlet,batch_size=16"))
        'gradual,dirichlet,batch_size=16'
    """
    plain = Scenario(pattern=scenario.pattern, rounds=scenario.rounds)
    words = [scenario.pattern]
    words += [f"rounds={scenario.rounds}"] * (scenario.rounds != 1)
    for name, value in vars(scenario).items():
        if value == getattr(plain, name):
            continue
        if name in ("labels", "distribution"):
            words.append(value)
        else:
            words.append(f"{name}={'+'.join(value) if isinstance(value, tuple) else value}")
    return ",".join(words)
