"""Adaptive temperature: each token's distribution is cooled until its entropy has fallen by a share.

H0 = H(softmax(z));  target = max(floor, ratio H0)
where H0 > floor: bisect T in [0.01, 1], at most 100 rounds,
    until |H(softmax(z / T)) - target| < tolerance
draw from softmax(z / T)

It is the paper's baseline beside EM-INF, and cheaper. The tolerance of the paper's code is 0.1 nats
whatever H0 is, so that for H0 below 0.1 the first T, 0.505, is always taken.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.decode.decoding import Decoding
from testtime.decode.methods.classical import nucleus
from testtime.measures.log_space import LOWEST, check_classes

COLDEST, ROUNDS = 0.01, 100
"""Lowest temperature, and rounds of the bisection at most (code)."""


def cooled(
    logits: Float[Tensor, "rows tokens"],
    *,
    ratio: float = 0.85,
    floor: float = 1e-5,
    tolerance: float = 0.1,
) -> Float[Tensor, "rows tokens"]:
    """Logits over the temperature at which their entropy is a share of what it was.

    Rows whose entropy is at most the floor stay as they are. All rows are bisected at once, each to
    its own end.

    Args:
        ratio: wanted entropy as a share of the row's own.
        floor: lowest wanted entropy, in nats.
        tolerance: how near is near enough, in nats.

    Example:
        >>> from testtime.measures.entropy import entropy
        >>> z = torch.tensor([[2.0, 1.0, 0.0], [90.0, 0.0, 0.0]])
        >>> found = cooled(z, ratio=0.5, tolerance=1e-6)
        >>> entropy(found)[0] / entropy(z)[0], found[1].equal(z[1])
        (tensor(0.5000), True)
    """
    logits = at_least_single(logits)
    check_classes(logits, "logits")
    return logits / _temperatures(logits.detach(), ratio, floor, tolerance)[:, None]


def _temperatures(logits: Tensor, ratio: float, floor: float, tolerance: float) -> Tensor:
    below = (logits - logits.amax(-1, keepdim=True)).clamp_(min=LOWEST)
    # two buffers for all rounds: to be given new ones costs as much as what is done with them
    scaled, probs = torch.empty_like(below), torch.empty_like(below)

    def entropies() -> Tensor:
        """H = -ln p_best - sum p (z - z_best) / T, of the rows that are still going on."""
        x, p = scaled[: len(going)], probs[: len(going)]
        torch.div(below, found[going, None], out=x)
        torch.softmax(x, -1, out=p)
        return -(p.amax(-1).log() + x.mul_(p).sum(-1))

    found = logits.new_ones(len(logits))
    going = torch.arange(len(logits), device=logits.device)
    before = entropies()
    target = (ratio * before).clamp(min=floor)
    low, high = torch.full_like(before, COLDEST), torch.ones_like(before)
    left = before > floor
    for _ in range(ROUNDS):
        if not bool(left.all()):
            going, below = going[left], below[left]
        if not len(going):
            break
        middle = (low[going] + high[going]) / 2
        found[going] = middle
        over = entropies() - target[going]
        high[going] = torch.where(over > 0, middle, high[going])
        low[going] = torch.where(over > 0, low[going], middle)
        left = over.abs() >= tolerance
    return found


@dataclass(frozen=True, kw_only=True)
class Cooled:
    """The step: `cooled` with these options."""

    ratio: float = 0.85
    floor: float = 1e-5
    tolerance: float = 0.1

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Logits (rows, tokens) of lower entropy."""
        return cooled(logits, ratio=self.ratio, floor=self.floor, tolerance=self.tolerance)


@register("decoding", paper="em-llm")
def adaptive_temperature(
    *, ratio: float = 0.85, floor: float = 1e-5, tolerance: float = 0.1, top_p: float = 1.0
) -> Decoding:
    """Draws at the temperature that lowers each token's entropy to a share of what it was.

    Args:
        ratio: that share. 0.85 and a floor of 1e-5 are those of the script for mathematics; the
            class of the code begins with 0.2 and 1e-6.
        floor: lowest wanted entropy, in nats; rows below it are left alone.
        tolerance: of the entropy, in nats (code).
        top_p: nucleus that is kept; 1 keeps all.

    Example:
        >>> adaptive_temperature(ratio=0.2).steps
        (Cooled(ratio=0.2, floor=1e-05, tolerance=0.1),)

    Reference: Agarwal et al., The Unreasonable Effectiveness of Entropy Minimization in LLM
    Reasoning, 2025.
    """
    in_range(0, 1, ratio=ratio)
    in_range(0, floor=floor, tolerance=tolerance)
    return Decoding(steps=(Cooled(ratio=ratio, floor=floor, tolerance=tolerance), *nucleus(top_p)))
