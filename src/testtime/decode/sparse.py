"""Which keys one token attends to under a budget: sinks, a local window, and the best of the rest.

kept <- first 4 keys, last `local` keys, and the k best (blocks of) keys between them,
        by scores averaged over the query heads that share a key-value head
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import whole

SINKS = 4
"""First keys, which are always kept (code)."""


def sparse_attention_mask(
    scores: Float[Tensor, "*batch heads keys"],
    *,
    kv_heads: int,
    local: int,
    top_k: int,
    sinks: int = SINKS,
    block: int = 1,
) -> Bool[Tensor, "*batch heads keys"]:
    """The keys that stay: True. Set the scores of the others to -inf before the softmax.

    Args:
        scores: (*batch, heads, keys) of one token's queries with all keys so far.
        kv_heads: key-value heads; heads that share one stand together and keep the same keys.
        local: latest keys, all kept.
        top_k: blocks kept between sinks and window, k.
        sinks: first keys, all kept; 4 (code).
        block: keys of a block, which is kept or left as a whole, by its mean score; 1 for single
            keys, 16 in the code's block top-k. The last block may be smaller.

    Raises:
        InputError: heads are no multiple of key-value heads.
        OptionError: an option is no whole number in its range.

    Example:
        >>> scores = torch.tensor([[9.0, 0.0, 3.0, 1.0, 2.0, 0.0]])
        >>> sparse_attention_mask(scores, kv_heads=1, sinks=1, local=1, top_k=2).int()
        tensor([[1, 0, 1, 0, 1, 1]], dtype=torch.int32)

    Reference: Sadhukhan et al., Kinetics: Rethinking Test-Time Scaling Laws, 2025.
    """
    whole(0, local=local, top_k=top_k, sinks=sinks)
    whole(1, kv_heads=kv_heads, block=block)
    check_tensors(scores=scores)
    if scores.ndim < 2 or scores.shape[-2] % kv_heads:
        raise InputError(
            f"scores have the shape {tuple(scores.shape)}; expected (*batch, heads, keys) with "
            f"heads a multiple of the {kv_heads} key-value heads."
        )
    heads, keys = scores.shape[-2:]
    first, last = min(sinks, keys), max(min(sinks, keys), keys - local)
    kept = torch.ones_like(scores, dtype=torch.bool)
    middle = last - first
    blocks = -(-middle // block)
    if top_k >= blocks:
        return kept
    grouped = scores.unflatten(-2, (kv_heads, heads // kv_heads)).mean(-2)[..., first:last]
    padded = F.pad(grouped, (0, blocks * block - middle)).unflatten(-1, (blocks, block))
    sizes = (middle - block * torch.arange(blocks, device=scores.device)).clamp(max=block)
    best = (padded.sum(-1) / sizes).topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(padded[..., 0], dtype=torch.bool).scatter(-1, best, value=True)
    chosen = chosen.repeat_interleave(block, -1)[..., :middle]
    kept[..., first:last] = chosen.repeat_interleave(heads // kv_heads, -2)
    return kept
