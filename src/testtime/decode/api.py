"""The door: `generate`, `stream` and `decodings`."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

from testtime._core.errors import InputError, OptionError
from testtime._core.options import check_types, whole
from testtime._core.registry import Info, find, infos
from testtime._core.seeds import derive
from testtime.decode.decoding import Job, Method
from testtime.decode.methods.uscd import without_examples
from testtime.decode.models import check_pair, context_length, end_tokens
from testtime.decode.padding import together
from testtime.decode.prompts import Prompts, read_prompts
from testtime.decode.writing import Generation, OnText, Row, Writing

END = object()


def decodings() -> dict[str, Info]:
    """All decoding methods by name.

    Example:
        >>> decodings()["min-p"].options
        {'p': 0.1, 'temperature': 1.0}
    """
    return infos("decoding")


@overload
def generate(  # pyright: ignore[reportOverlappingOverload]  (a text is a sequence of texts)
    model: Any, tokenizer: Any, prompt: str, method: str | Method = ..., **options: Any
) -> Generation: ...
@overload
def generate(
    model: Any, tokenizer: Any, prompt: Sequence[str], method: str | Method = ..., **options: Any
) -> list[Generation]: ...
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[str],
    method: str | Method = "sample",
    *,
    max_new_tokens: int = 128,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    large: Any = None,
    lame: str | Sequence[str] | None = None,
    on_text: OnText | None = None,
    **options: Any,
) -> Generation | list[Generation]:
    """Writes on from one prompt, or from a batch of prompts of any lengths.

    Args:
        model: a causal language model of transformers; it stays as it is.
        tokenizer: of that model.
        prompt: a text, or a list of texts. A token of beginning is added where the tokenizer adds
            one, and never twice.
        method: name of a decoding method, or its value.
        max_new_tokens: at most; fewer where the model's context ends earlier.
        stop: strings that end a text; they are not part of it, and are not looked for in the prompt.
        seed: of what is drawn. Each prompt of a batch draws for itself: the first as it would alone.
        large: the large model, for `ead`.
        lame: prompts without their examples, for `uscd`. None: the prompt, without its doctests.
        on_text: called for each new token with the index of its prompt and the text that it made
            certain, which may be empty: a character may take several tokens, and what may become a
            stop string is held back.
        options: of the method, when it is named.

    Returns:
        A `Generation` for a text, a list of them for a list.

    Raises:
        UnknownName: no decoding method has that name.
        OptionError: it has no such option, or cannot take the value.
        InputError: a prompt that is empty or fills the context, a tokenizer that does not belong to
            the model, something that the method needs and did not get, logits that are NaN.

    Example:
        >>> from testtime.decode import generate, load_language_model
        >>> model, tokenizer = load_language_model("gemma:270m")           # doctest: +SKIP
        >>> str(generate(model, tokenizer, "The capital of France is",
        ...              "greedy", max_new_tokens=8))                      # doctest: +SKIP
        ' the capital of the country of France.'
    """
    prompts = _several("prompt", prompt)
    chosen, needs = _method(method, options)
    whole(1, max_new_tokens=max_new_tokens)
    check_types({"seed": seed, "on_text": on_text}, {"seed": int, "on_text": OnText | None})
    for name, given in (("large", large), ("lame", lame)):
        if given is not None and isinstance(method, str) and name not in needs:
            raise OptionError(f"{method} takes no {name}=; leave it out")
    words = _words(stop)
    check_pair(model, tokenizer)
    read = read_prompts(model, tokenizer, prompts)
    spared = None
    if lame is not None or "lame" in needs:
        spared = _lame(model, tokenizer, prompts, lame)
    if large is not None:
        check_pair(large, tokenizer)
        read_prompts(large, tokenizer, prompts)
    elif "large" in needs:
        raise InputError(
            f"{method} needs a second model; give large=, a larger one of the same tokenizer."
        )
    kinds = [p for p in (read, spared) if p is not None]
    lengths = list(zip(*(p.mask.sum(1).tolist() for p in kinds), strict=True))
    contexts = [c for m in (model, large) if m is not None and (c := context_length(m)) is not None]
    limits = [min([max_new_tokens, *(c - max(each) for c in contexts)]) for each in lengths]
    ends = end_tokens(model, tokenizer)
    rows = [
        Row(tokenizer, ends, words, limit, ids[at.bool()].tolist())
        for limit, ids, at in zip(limits, read.ids, read.mask, strict=True)
    ]
    seeds = [derive(seed, "row", row) for row in range(len(prompts))]
    for places in together(model, lengths, limits):
        chosen.run(
            Job(
                model=model, prompts=read.of(places), seeds=[seeds[place] for place in places],
                ends=ends, limit=limits[places[0]], writing=Writing(rows, places, on_text),
                large=large, lame=None if spared is None else spared.of(places),
            )
        )  # fmt: skip
    found = [row.result() for row in rows]
    return found[0] if isinstance(prompt, str) else found


class Piece(NamedTuple):
    """A piece of text and the index of the prompt that it follows."""

    prompt: int
    text: str


def stream(
    model: Any, tokenizer: Any, prompt: str | Sequence[str], *args: Any, **kwargs: Any
) -> Iterator[Piece]:
    """Writes as `generate` does, with the same arguments, and gives the text piece by piece.

    The writing runs in a thread. When the iterator is closed or dropped it stops after its token.

    Raises:
        InputError: as `generate`, with the first piece.

    Example:
        >>> from testtime.decode import load_language_model, stream
        >>> model, tokenizer = load_language_model("gemma:270m")           # doctest: +SKIP
        >>> for piece in stream(model, tokenizer, "The capital of France is",
        ...                     "greedy", max_new_tokens=3):               # doctest: +SKIP
        ...     print(piece)
        Piece(prompt=0, text=' the')
        Piece(prompt=0, text=' capital')
        Piece(prompt=0, text=' of')
    """
    pieces: queue.Queue[Any] = queue.Queue()
    left = threading.Event()

    def told(row: int, text: str) -> None:
        if text:
            pieces.put(Piece(row, text))
        if left.is_set():
            raise _Left

    def write() -> None:
        try:
            generate(model, tokenizer, prompt, *args, on_text=told, **kwargs)
            pieces.put(END)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not END:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        left.set()
        thread.join()


class _Left(Exception):  # noqa: N818
    """The reader of a stream has left."""


def _method(method: str | Method, options: dict[str, Any]) -> tuple[Method, tuple[str, ...]]:
    if isinstance(method, str):
        entry = find("decoding", method)
        return entry.build(**options), entry.needs
    if options:
        raise OptionError(
            f"options ({', '.join(options)}) go with the name of a method; for a value use "
            "dataclasses.replace(method, ...)"
        )
    run: Callable[..., Any] | None = getattr(method, "run", None)
    if run is None or isinstance(method, type):
        raise OptionError(
            f"the method is of type {type(method).__name__}; expected a name or a value such as "
            "min_p(p=0.1)"
        )
    return method, ()


def _several(name: str, given: Any) -> list[str]:
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InputError(f"{name} is {given!r}; expected a text, or a list of texts.")
    return [given] if isinstance(given, str) else list(given)


def _words(stop: str | Sequence[str]) -> list[str]:
    several = isinstance(stop, Iterable) and not isinstance(stop, str)
    words: list[Any] = list(stop) if several else [stop]
    for word in words:
        if not isinstance(word, str) or not word:
            raise OptionError(
                f"a stop string is {word!r}; expected a text of at least one character"
            )
    return words


def _lame(
    model: Any, tokenizer: Any, prompts: list[str], given: str | Sequence[str] | None
) -> Prompts:
    if given is None:
        lame = [without_examples(prompt) for prompt in prompts]
        same = [place for place, prompt in enumerate(prompts) if lame[place] == prompt]
        if same:
            raise InputError(
                f"prompt {same[0]} has no example (>>> or assert) that could be left out; give "
                "lame=, the prompt without what helps most."
            )
    else:
        lame = _several("lame", given)
    if len(lame) != len(prompts):
        raise InputError(f"{len(lame)} lame prompts for {len(prompts)} prompts; expected as many.")
    return read_prompts(model, tokenizer, lame)
