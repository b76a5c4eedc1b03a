"""LLMZip: lossless compression of text with the probabilities of a language model.

    compress     bytes -> tokens and escapes -> range coder, with p(x_i | window) of the model
    decompress   the same forward passes, token by token; the same tables; the same bytes
    bound        H_ub = (1 / N_C) sum_i -log2 p(x_i | window)    bits per character

The decoder must find the very probabilities of the encoder, so both run the same loop: the same
batch of lanes, the same cache, the same number of threads. That holds on one machine with the same
versions; elsewhere sums may round otherwise. A file therefore carries the fingerprint of the model, a
checksum of itself, one of the content, and what it was made with: a wrong model or a damaged file is
refused before the work, and wrong content is never returned (`testtime.decode.container`). What the
model expects so little that nothing would be gained is kept as it is.

Reference: Valmeekam et al., LLMZip: Lossless Text Compression using Large Language Models, 2023.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from testtime._core.errors import (
    InputError,
    OptionError,
    StateError,
    TesttimeWarning,
    WorkFailed,
)
from testtime._core.options import whole
from testtime.decode.coding import Progress, decode, encode
from testtime.decode.container import (
    File,
    digest,
    identity,
    inspect,
    machine,
    named,
    versions,
)
from testtime.decode.decoding import evaluating
from testtime.decode.lossless_tokens import from_tokens, to_tokens
from testtime.decode.models import check_pair, context_length
from testtime.decode.windows import WindowedModel, start_token

WINDOW = 512
"""Tokens of context with the start token; LLMZip's longest has 511."""
LANE = 1024
"""Tokens that a lane has at least; shorter lanes would begin without context too often."""
LANES = 16
"""Lanes at most, if not asked for more: beyond, a processor gains little."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compressed file, and how well it went.

    Attributes:
        data: the file.
        characters: of the content (bytes that are no UTF-8 count as one each).
        tokens: coded symbols, escapes included.
        bits_per_character: of the whole file.
        bound: bits per character that the model's probabilities ask for.
    """

    data: bytes
    characters: int
    tokens: int
    bits_per_character: float
    bound: float


def compress(
    content: bytes,
    model: nn.Module,
    tokenizer: Any,
    *,
    window: int | None = None,
    stride: int | None = None,
    lanes: int | None = None,
    on_progress: Progress | None = None,
) -> Compressed:
    """Compresses bytes without loss; text of the kind that the model knows becomes small.

    Args:
        content: any bytes.
        model: a Hugging Face causal model.
        tokenizer: its tokenizer.
        window: tokens of context at most; None: 512, or the model's context if that is shorter.
        stride: tokens dropped when the window is full; half a window when None.
        lanes: parts of the text that are coded side by side. Each begins without context, and all
            share the price of reading the weights. None: one for each 1024 tokens, 16 at most.
        on_progress: called with tokens done and all.

    Raises:
        OptionError: an option that cannot be, or a window beyond the model's context.
        InputError: the content is no bytes, the tokenizer not the model's, or its logits are NaN.

    Example:
        >>> from testtime.decode.models import load_language_model
        >>> model, tokenizer = load_language_model("gemma:270m")  # doctest: +SKIP
        >>> made = compress(b"Tent adapts while it predicts.", model, tokenizer)  # doctest: +SKIP
        >>> decompress(made.data, model, tokenizer)  # doctest: +SKIP
        b'Tent adapts while it predicts.'

    Reference: Valmeekam et al., LLMZip, 2023.
    """
    if not isinstance(content, bytes | bytearray):
        raise InputError(
            f"content is of type {type(content).__name__}; expected bytes. Encode text first: "
            'text.encode("utf-8").'
        )
    check_pair(model, tokenizer)
    context = context_length(model)
    window = min(WINDOW, context or WINDOW) if window is None else window
    whole(2, window=window)
    if context is not None and window > context:
        raise OptionError(f"window={window} is more than the model's context of {context} tokens")
    predictor = _predictor(model, tokenizer, window, stride)
    tokens = to_tokens(content, tokenizer)
    lanes = min(max(len(tokens) // LANE, 1), LANES) if lanes is None else lanes
    whole(1, lanes=lanes)
    if lanes >= 2**16:
        raise OptionError(f"lanes={lanes}: expected 65535 at most")
    with evaluating(model):
        coded = encode(tokens, predictor, lanes=lanes, on_progress=on_progress)
    kept = len(coded.payload) >= len(content)
    data = File(
        lanes=lanes, threads=torch.get_num_threads(), window=window, stride=predictor.stride,
        tokens=0 if kept else len(tokens), versions=versions(), fingerprint=identity(model, tokenizer),
        digest=digest(content), machine=machine(model), payload=bytes(content) if kept else coded.payload,
    ).pack()  # fmt: skip
    characters = len(content.decode("utf-8", "surrogateescape"))
    return Compressed(
        data=data,
        characters=characters,
        tokens=len(tokens),
        bits_per_character=8 * len(data) / max(characters, 1),
        bound=coded.bound / max(characters, 1),
    )


def decompress(
    data: bytes,
    model: nn.Module,
    tokenizer: Any,
    *,
    on_progress: Progress | None = None,
) -> bytes:
    """The bytes that `compress` was given, or an error; never other bytes.

    Args:
        data: of `compress`.
        model: the same model.
        tokenizer: the same tokenizer.
        on_progress: called with tokens done and all.

    Raises:
        StateError: no such file, a damaged one, or one made with another model.
        WorkFailed: the model gave other probabilities than when the file was made.

    Reference: Valmeekam et al., LLMZip, 2023.
    """
    file = inspect(data)
    own = identity(model, tokenizer)
    if file.fingerprint != own:
        raise StateError(
            "the file was compressed with another model or tokenizer: their fingerprint is "
            f"{file.fingerprint.hex()}, and that of these is {own.hex()}"
        )
    elsewhere = file.machine != machine(model)
    made_with = (
        f"It was made with {named(file.versions)}{' on another machine or build' * elsewhere}; "
        f"this is {named(versions())}."
    )
    if file.tokens and (elsewhere or file.versions != versions()):
        warnings.warn(
            "probabilities may differ here in their last bits, and then the file cannot be read. "
            + made_with,
            TesttimeWarning,
            stacklevel=2,
        )
    content = _decoded(file, model, tokenizer, on_progress) if file.tokens else file.payload
    if content is None or digest(content) != file.digest:
        raise WorkFailed(
            "the content is not what was compressed, though the file is whole: the model gave other "
            f"probabilities here. {made_with}"
        )
    return content


def _decoded(
    file: File, model: nn.Module, tokenizer: Any, on_progress: Progress | None
) -> bytes | None:
    """The content, or None where the model's probabilities cannot be those of the file."""
    try:
        with _threads(file.threads), evaluating(model):
            predictor = _predictor(model, tokenizer, file.window, file.stride)
            tokens = decode(
                file.payload, file.tokens, predictor, lanes=file.lanes, on_progress=on_progress
            )
    except WorkFailed:
        return None
    return from_tokens(tokens, tokenizer)


def _predictor(model: nn.Module, tokenizer: Any, window: int, stride: int | None) -> WindowedModel:
    return WindowedModel(model, start=start_token(tokenizer), window=window, stride=stride)


@contextmanager
def _threads(count: int) -> Generator[None, None, None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)
