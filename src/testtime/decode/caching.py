"""A model and its key-value cache: what one stream of tokens has read."""

from typing import Any

import torch
from torch import Tensor

from testtime.decode.prefixes import cache_name
from testtime.decode.prompts import Prompts


class Reader:
    """Reads tokens one piece after another, and gives the logits that follow the last one.

    Args:
        model: a causal model of transformers.
        prompts: read with the first piece. Rows that are padded count their positions from their
            first token.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self._model, self._waiting, self._mask = model, prompts.ids, prompts.mask
        self._name = cache_name(model)
        self._cache: Any = None
        self._last: Any = None
        self._seen = prompts.mask.new_zeros(len(prompts.mask))

    def push(self, tokens: Tensor) -> None:
        """Tokens (rows,) that follow; they are read when logits are asked for."""
        self._waiting = torch.cat([self._waiting, tokens[:, None]], 1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)

    @property
    def waiting(self) -> int:
        """Tokens of a row that have not been read."""
        return self._waiting.shape[1]

    def logits(self) -> Tensor:
        """Logits (rows, tokens) after all that was pushed, in float32 or more."""
        if not self.waiting:
            return self._last
        new = self._mask[:, -self.waiting :]
        places = (new.cumsum(-1) - 1 + self._seen[:, None]).clamp(min=0)
        found = self._model(
            input_ids=self._waiting,
            attention_mask=self._mask,
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **{self._name: self._cache},
        )
        self._cache = found[self._name]
        self._seen = self._seen + new.sum(-1)
        self._waiting = self._waiting[:, :0]
        logits = found.logits[:, -1]
        self._last = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self._last
