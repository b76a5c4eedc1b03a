"""What is being written: tokens of each row, their text as it becomes certain, and where to stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Ended = Literal["end", "stop", "length"]
OnText = Callable[[int, str], None]
"""Called for each new token with the index of its prompt and the text that it made certain, often one
token's and sometimes none."""
BEFORE = 4
"""Tokens of the prompt that are read before the first new one."""


@dataclass(frozen=True)
class Generation:
    """What was written after one prompt.

    Attributes:
        text: without special tokens, and without the stop string.
        tokens: all new tokens, a token of end included.
        ended: `end` by a token that ends texts, `stop` by a stop string, `length` by the limit.
        numbers: what a method counted, by name (for `ead` the share of the large model).
    """

    text: str
    tokens: tuple[int, ...]
    ended: Ended
    numbers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


class Row:
    """One text that grows by tokens.

    A character may need several tokens, and a token may change how those before it are read; so
    only text that two readings agree on is given out, and none that may yet become a stop string.
    The first tokens are read behind the last ones of the prompt, since many tokenizers leave out the
    blank of a word that begins a text.

    Args:
        tokenizer: that reads tokens.
        ends: tokens that end a text.
        stop: strings that end it, special tokens among them.
        limit: of new tokens.
        prompt: tokens before.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Sequence[int],
        stop: Sequence[str],
        limit: int,
        prompt: Sequence[int] = (),
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.ended: Ended | None = None
        self.numbers: dict[str, float] = {}
        self._tokenizer, self._ends, self._stop, self._limit = tokenizer, set(ends), stop, limit
        special = getattr(tokenizer, "added_tokens_decoder", {}).items()
        # these have no text, so that they would never be found in it
        self._stop_tokens = {token for token, said in special if str(said) in stop}
        self._all = list(prompt[-BEFORE:])
        self._from, self._read, self._given = 0, len(self._all), 0

    def add(self, token: int) -> str:
        """Takes the next token of a text that has not ended; returns what has become certain of it."""
        self.tokens.append(token)
        self._all.append(token)
        if token in self._ends:
            self.ended = "end"
        elif token in self._stop_tokens:
            self.ended = "stop"
        elif len(self.tokens) == self._limit:
            self.ended = "length"
        before, now = self._decode(self._from, self._read), self._decode(self._from, None)
        if len(now) > len(before) and (self.ended or not now.endswith("\ufffd")):
            old = len(self.text)
            self.text += now[len(before) :]
            self._from, self._read = self._read, len(self._all)
            self._find_stop(old)
        held = 0 if self.ended else self._held()
        piece = self.text[self._given : len(self.text) - held]
        self._given += len(piece)
        return piece

    def result(self) -> Generation:
        """What was written."""
        return Generation(self.text, tuple(self.tokens), self.ended or "length", self.numbers)

    def _decode(self, begin: int, end: int | None) -> str:
        return self._tokenizer.decode(
            self._all[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _find_stop(self, old: int) -> None:
        begins = [self.text.find(word, max(0, old - len(word) + 1)) for word in self._stop]
        found = [begin for begin in begins if begin >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], "stop"

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for word in self._stop for n in range(1, len(word))
             if self.text.endswith(word[:n])), default=0,
        )  # fmt: skip


class Writing:
    """The rows of a batch.

    Args:
        rows: one for each prompt.
        places: which of them the batch has.
        on_text: told of each piece of text.
    """

    def __init__(
        self, rows: Sequence[Row], places: Sequence[int], on_text: OnText | None = None
    ) -> None:
        self.rows, self._places, self._on_text = [rows[p] for p in places], places, on_text

    def add(self, row: int, token: int) -> bool:
        """Takes the next token of a row of the batch; returns whether that row has ended."""
        if self.rows[row].ended is None:
            piece = self.rows[row].add(token)
            if self._on_text is not None:
                self._on_text(self._places[row], piece)
        return self.rows[row].ended is not None
