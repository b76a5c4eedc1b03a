"""What a causal model has read, whatever it keeps of it: keys and values, states, or nothing.

keys and values                   what follows is read in one pass
states (recurrent layers)         one token a pass: with more, such layers begin anew
nothing that can be handed back   all is read again
"""

import inspect
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from testtime.decode.prompts import Prompts


class Anew(NamedTuple):
    """Stands for the cache of a model that hands back none: the tokens themselves."""

    tokens: Tensor


class Reader:
    """Reads tokens one piece after another, and gives the logits that follow the last one.

    Args:
        model: a causal model of transformers.
        prompts: read with the first piece. Rows that are padded count their positions from their
            first token.
    """

    def __init__(self, model: Any, prompts: Prompts) -> None:
        self._model, self._waiting, self._mask = model, prompts.ids, prompts.mask
        self._cache: Any = None
        self._last: Any = None

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
        logits, self._cache = go_on(
            self._model, self._waiting, self._cache, mask=self._mask, last=1
        )
        self._waiting = self._waiting[:, :0]
        self._last = logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))
        return self._last


def go_on(
    model: Any,
    tokens: Int[Tensor, "rows length"],
    cache: Any,
    *,
    mask: Int[Tensor, "rows all"] | None = None,
    last: int,
) -> tuple[Float[Tensor, "rows last symbols"], Any]:
    """Logits of some tokens after what a cache holds, and the cache after them.

    Args:
        model: a causal model of transformers.
        tokens: that follow; padded at the left only where there is no cache yet.
        cache: of the tokens before, or None. It may change.
        mask: of all tokens, those in the cache first; None where no row is padded.
        last: for how many of the tokens logits are wanted; 0 for all.
    """
    length = tokens.shape[1]
    if mask is None and getattr(cache, "layers", ()) and _keys_somewhere(cache):
        # some models (Bamba) would count positions from 0 again
        mask = tokens.new_ones(len(tokens), _held(cache) + length)
    if isinstance(cache, Anew):
        tokens, cache = torch.cat([cache.tokens, tokens], 1), None
    elif cache is not None and length > 1 and not keys_alone(cache):
        found: list[Tensor] = []
        for place in range(length):
            now = None if mask is None else mask[:, : mask.shape[1] - length + place + 1]
            one, cache = go_on(model, tokens[:, place : place + 1], cache, mask=now, last=1)
            found.append(one)
        return torch.cat(found[-last:], 1), cache
    out = forward(model, tokens, mask, cache=cache, last=last or length)
    name = cache_name(model)
    kept = None if name is None else getattr(out, name, None)
    return out.logits[:, -(last or length) :], Anew(tokens) if kept is None else kept


def forward(
    model: Any, tokens: Tensor, mask: Tensor | None, *, cache: Any = None, last: int = 1,
    use_cache: bool = True,
) -> Any:  # fmt: skip
    """What a model returns for tokens at the end of a mask, with positions that follow the mask."""
    more: dict[str, Any] = {"logits_to_keep": last, "use_cache": use_cache}
    if mask is not None:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        if cache is None or _keys_somewhere(cache):  # a state has nothing that could be masked
            more["attention_mask"] = mask
    if (name := cache_name(model)) is not None:
        more[name] = cache
    taken = inspect.signature(model.forward).parameters
    return model(input_ids=tokens, **{key: value for key, value in more.items() if key in taken})


def cache_name(model: Any) -> str | None:
    """What a model calls its cache: transformers 5.24 `cache`, older ones `past_key_values`.

    None for models that take none under these names (RWKV, XLNet, the first GPT).
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def keys_alone(cache: Any) -> bool:
    """Whether all that a cache holds is keys and values, one of each for every token."""
    if isinstance(cache, tuple):  # of models that have no class for it
        return True
    from transformers import cache_utils  # noqa: PLC0415

    if not type(cache).__module__.startswith("transformers.cache_utils"):  # MiniMax has its own
        return False
    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return all(type(layer) in plain for layer in getattr(cache, "layers", (None,)))


def _held(cache: Any) -> int:
    """Tokens that a cache holds; a layer of another kind than keys and values may say 0."""
    layers = [layer for layer in cache.layers if hasattr(layer, "keys")]
    return max(layer.get_seq_length() for layer in layers)


def _keys_somewhere(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)
    return not layers or any(hasattr(layer, "keys") for layer in layers)
