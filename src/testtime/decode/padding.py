"""Which rows can be read as one batch: all, where a model does not see what a row is padded with."""

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from testtime.decode.caching import forward
from testtime.decode.decoding import evaluating
from testtime.decode.models import vocabulary_size

_FOUND: WeakKeyDictionary[Any, dict[torch.dtype, bool]] = WeakKeyDictionary()


def together(
    model: Any, lengths: Sequence[Hashable], limits: Sequence[int] | None = None
) -> list[list[int]]:
    """Places of the rows of each batch: of all rows, or of those of one length where padding harms.

    Args:
        model: a causal model of transformers.
        lengths: how many tokens each row has (of several prompts, if it has several).
        limits: of new tokens, where they are not the same for all; rows of a batch have one.
    """
    keys: list[Hashable] = [None] * len(lengths) if limits is None else [*limits]
    if len(set(lengths)) > 1 and not bears_padding(model):
        keys = list(zip(keys, lengths, strict=True))
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


@torch.no_grad()
def bears_padding(model: Any) -> bool:
    """Whether a model answers the same when a row is padded at the left.

    Some ignore the mask (RWKV, RecurrentGemma), and some then answer NaN in double precision. Each is
    asked once, with one token, alone and behind another that is masked.
    """
    found, kind = _FOUND.setdefault(model, {}), next(model.parameters()).dtype
    if kind not in found:
        tokens = torch.full((1, 2), vocabulary_size(model) // 2, device=model.device)
        mask = torch.tensor([[0, 1]], device=model.device)
        with evaluating(model):
            alone = forward(model, tokens[:, 1:], mask[:, 1:]).logits[:, -1]
            padded = forward(model, tokens, mask).logits[:, -1]
        near = torch.finfo(kind).eps ** 0.5 * float(alone.abs().max())
        found[kind] = torch.allclose(padded, alone, rtol=0, atol=near, equal_nan=True)
    return found[kind]
