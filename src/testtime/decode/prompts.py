"""Prompts as tokens: checked, and padded at the left so that every row ends where it goes on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime.decode.models import context_length


class Prompts(NamedTuple):
    """Tokens (rows, length) and their mask, 0 where a row is padded."""

    ids: Tensor
    mask: Tensor

    def of(self, places: Sequence[int]) -> "Prompts":
        """Some of the rows, without places that are padding in all of them."""
        ids, mask = self.ids[list(places)], self.mask[list(places)]
        begin = self.ids.shape[1] - int(mask.sum(1).max())
        return Prompts(ids[:, begin:], mask[:, begin:])


def read_prompts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Prompts:
    """Tokens of prompts, on the model's device.

    The side on which the tokenizer itself would pad is not asked, and stays as it is.

    Raises:
        InputError: no prompt, an empty one, or one that fills the model's context.
    """
    if not prompts:
        raise InputError("no prompt was given; expected a text, or a list of at least one.")
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt:
            raise InputError(
                f"prompt {place} is {prompt!r}; expected a text of at least one character. For a "
                "text from nothing give the token of beginning, tokenizer.bos_token."
            )
    rows: list[list[int]] = [read_text(tokenizer, prompt) for prompt in prompts]
    limit = context_length(model)
    for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if not row:
            raise InputError(f"prompt {place}, {prompt!r}, has no token; expected at least one.")
        if limit is not None and len(row) >= limit:
            raise InputError(
                f"prompt {place} has {len(row)} tokens, and the model looks at {limit}, prompt and "
                f"answer together. Shorten the prompt to at most {limit - 1} tokens."
            )
    return padded(rows, device=model.device, pad=tokenizer.pad_token_id or 0)


def padded(rows: Sequence[Sequence[int]], *, device: Any, pad: int = 0) -> Prompts:
    """Rows of tokens, padded at the left.

    Example:
        >>> padded([(5, 6), (7,)], device="cpu").ids
        tensor([[5, 6],
                [0, 7]])
    """
    width = max(map(len, rows))
    ids = [[*[pad] * (width - len(row)), *row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return Prompts(torch.tensor(ids, device=device), torch.tensor(mask, device=device))


def read_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokens of one text, as `read_text`.

    Raises:
        InputError: there is none.
    """
    ids = tuple(read_text(tokenizer, text)) if text else ()
    if not ids:
        raise InputError("the prompt is empty; expected at least one token. Give it some text.")
    return ids


def fitted(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], *, room: int) -> Prompts:
    """Rows of tokens on the model's device, padded at the left, with room for new ones.

    Raises:
        InputError: they do not fit the model's context.
    """
    width, context = max(map(len, rows)), context_length(model)
    if context is not None and width + room > context:
        raise InputError(
            f"{width} tokens and {room} new ones do not fit the model's context of {context}. "
            "Shorten the prompt, or ask for fewer or shorter steps."
        )
    return padded(rows, device=model.device, pad=tokenizer.pad_token_id or 0)


def read_text(tokenizer: Any, text: str) -> list[int]:
    """Tokens of one text, with the token of beginning once where the tokenizer adds one.

    Raises:
        InputError: it holds what is no character.
    """
    ids: list[int] = tokenizer(in_unicode(text))["input_ids"]
    begin = tokenizer.bos_token_id
    if begin is not None and ids[:2] == [begin, begin]:  # the prompt had it already
        return ids[1:]
    return ids


def in_unicode(text: str) -> str:
    """The text, which has no half of a surrogate pair: no tokenizer reads one.

    Raises:
        InputError: it has one, as arguments of a program and names of files do that are no UTF-8.

    Example:
        >>> in_unicode("caf\\udce9")
        Traceback (most recent call last):
        testtime._core.errors.InputError: the text holds '\\udce9' at 3, which is no character; expected
        Unicode. Decode its bytes with their own encoding, e.g. data.decode("latin-1").
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text holds {text[error.start]!r} at {error.start}, which is no character; expected "
            'Unicode. Decode its bytes with their own encoding, e.g. data.decode("latin-1").'
        ) from error
    return text
