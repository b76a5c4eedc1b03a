"""Any bytes as tokens, and back without a change, whatever the tokenizer.

    text     runs of valid UTF-8 whose tokens decode to the very same text
    escape   -1 - b for a byte b that is no such text
    break    -257 between two texts that are right alone and not together

A tokenizer may lower, normalise or drop characters. So each text is decoded again; where that is not
what was written it is halved, down to single characters, which are escaped.

Tokens that stand between two escapes are decoded together.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

BREAK = -257
"""The escape that only parts two texts."""


def to_tokens(content: bytes, tokenizer: Any) -> list[int]:
    """Tokens and escapes from which `from_tokens` makes the same bytes again.

    Args:
        content: any bytes.
        tokenizer: of Hugging Face; it adds no start or end token here.

    Example:
        >>> class Capitals:  # knows 26 letters, and reads small ones as large
        ...     def __call__(self, text, **options):
        ...         return {"input_ids": [ord(c) - 65 for c in text.upper() if c.isalpha()]}
        ...     def decode(self, tokens, **options):
        ...         return "".join(chr(65 + token) for token in tokens)
        >>> to_tokens(b"AB!a\\xff", Capitals())
        [0, 1, -34, -98, -256]
    """
    parts: list[int] = []
    waiting = re.split("([\udc80-\udcff])", content.decode("utf-8", "surrogateescape"))[::-1]
    while waiting:
        text = waiting.pop()
        if not text:
            continue
        tokens = None if "\udc80" <= text <= "\udcff" else _exact(text, tokenizer)
        if tokens is not None:
            parts += [BREAK, *tokens] if parts and parts[-1] >= 0 else tokens
        elif len(text) == 1:
            parts += [-1 - byte for byte in text.encode("utf-8", "surrogateescape")]
        else:
            waiting += [text[len(text) // 2 :], text[: len(text) // 2]]
    return parts


def from_tokens(tokens: Sequence[int], tokenizer: Any) -> bytes:
    """The bytes that `to_tokens` was given."""
    parts: list[bytes] = []
    for escaped, run in groupby(tokens, lambda token: token < 0):
        if escaped:
            parts.append(bytes(-1 - token for token in run if token != BREAK))
        else:
            parts.append(_text(list(run), tokenizer).encode("utf-8", "surrogatepass"))
    return b"".join(parts)


def _exact(text: str, tokenizer: Any) -> list[int] | None:
    """Tokens that decode to this very text, or None if the tokenizer finds none."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens if tokens and _text(tokens, tokenizer) == text else None


def _text(tokens: list[int], tokenizer: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
