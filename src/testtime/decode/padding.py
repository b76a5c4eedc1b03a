"""Which rows can be read as one batch: all, where a model answers each of them as it does alone."""

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from testtime.decode.decoding import borrowed, evaluating
from testtime.decode.drawing import check_logits
from testtime.decode.models import vocabulary_size
from testtime.decode.prompts import padded

_FOUND: WeakKeyDictionary[Any, dict[tuple[torch.dtype, int], bool]] = WeakKeyDictionary()


def together(
    model: Any, lengths: Sequence[Hashable], limits: Sequence[int] | None = None
) -> list[list[int]]:
    """Places of the rows of each batch: of all rows, of those of one length, or of one row each.

    Args:
        model: a causal model of transformers.
        lengths: how many tokens each row has (of several prompts, if it has several).
        limits: of new tokens, where they are not the same for all; rows of a batch have one.

    Raises:
        InputError: the model's logits are NaN.
    """
    keys: list[Hashable] = [None] * len(lengths) if limits is None else [*limits]
    if len(lengths) > 1 and not (len(set(lengths)) > 1 and bears_padding(model)):
        alike = zip(keys, lengths, strict=True)
        keys = [*alike] if bears_company(model) else [*range(len(lengths))]
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def bears_padding(model: Any) -> bool:
    """Whether a model answers the same when a row is padded at the left.

    Some ignore the mask (RWKV, RecurrentGemma), or misread it when they go on (MiniMax), and some then
    answer NaN in double precision. Each is asked once.
    """
    return _same(model, beside=2)


def bears_company(model: Any) -> bool:
    """Whether a model answers the same when another row of the same length is beside a row.

    RWKV mixes the states of two rows when it goes on from them. Each model is asked once.
    """
    return _same(model, beside=1)


def _same(model: Any, *, beside: int) -> bool:
    """Whether one token, and one more, have the logits that they have without another row."""
    kind = next(model.parameters()).dtype
    found = _FOUND.setdefault(model, {})
    if (kind, beside) not in found:
        alone, both = _two(model, [1]), _two(model, [1, beside])
        for each in alone:
            check_logits(each[None])
        largest = alone[alone.isfinite()].abs().max()  # some tokens may be forbidden, by -inf
        near = torch.finfo(kind).eps ** 0.5 * float(largest)
        found[kind, beside] = torch.allclose(both, alone, rtol=0, atol=near)
    return found[kind, beside]


@torch.no_grad()
def _two(model: Any, lengths: Sequence[int]) -> Tensor:
    """Logits (2, tokens) of the first row of a batch, after its end and after one more token."""
    middle = vocabulary_size(model) // 2
    rows = [[middle - place] * length for place, length in enumerate(lengths)]
    ids, mask = padded(rows, device=model.device)

    def known(_: Tensor, logits: Tensor) -> Tensor:
        return torch.full_like(logits, -torch.inf).index_fill_(-1, ids.new_tensor([middle]), 0)

    with evaluating(model):
        made = borrowed(model).generate(
            inputs=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, use_cache=True,
            logits_processor=[known], output_logits=True, return_dict_in_generate=True,
            pad_token_id=0,
        )  # fmt: skip
    return torch.stack([each[0] for each in made.logits])
