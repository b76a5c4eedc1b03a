"""EDT: the temperature of each token from the entropy of its distribution.

p = softmax(z);  H = -sum_v p_v ln p_v
T = T0 0.8^(theta / H)             cold where the model is sure, near T0 where it is not
draw from softmax(z / T)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.errors import OptionError
from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.decode.decoding import Decoding
from testtime.decode.methods.classical import COLDEST, nucleus
from testtime.measures.entropy import entropy

BASE = 0.8
FLOOR = 1e-2
"""Lowest temperature: at H = 0 the formula gives 0, by which logits cannot be divided."""


def entropy_temperature(
    logits: Float[Tensor, "*rows tokens"], *, highest: float, theta: float
) -> Float[Tensor, "*rows"]:
    """Temperature of each row, from 0.01 to `highest`, rising with the entropy in nats.

        T = T0 0.8^(theta / H)

    Example:
        >>> entropy_temperature(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), highest=0.8, theta=1.0)
        tensor([0.5798, 0.0100])
    """
    h = entropy(logits)
    if theta == 0:
        return torch.full_like(h, highest)
    return (highest * BASE ** (theta / h.clamp(min=1e-30))).clamp(min=min(FLOOR, highest))


@dataclass(frozen=True, kw_only=True)
class EntropyTemperature:
    """The step: logits divided by `entropy_temperature`, row by row."""

    highest: float
    theta: float

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Logits (rows, tokens) over their temperature."""
        logits = at_least_single(logits)
        t = entropy_temperature(logits, highest=self.highest, theta=self.theta)
        return logits / t[..., None]


@register("decoding", paper="edt")
def edt(*, highest: float = 0.8, theta: float = 1.0, top_p: float = 1.0) -> Decoding:
    """Draws at a temperature that follows the entropy of each token's distribution.

    Args:
        highest: T0, the temperature where entropy is high. The paper chooses it for each task, from
            about 0.1 to 1; 0.8 and theta 1 are those of our small check.
        theta: how fast the temperature falls with the entropy, in nats; 0 is plain T0.
        top_p: nucleus that is kept afterwards; 1 keeps all.

    Example:
        >>> edt().steps
        (EntropyTemperature(highest=0.8, theta=1.0),)

    Reference: Zhang et al., EDT: Improving Large Language Models' Generation by Entropy-based
    Dynamic Temperature Sampling, 2024.
    """
    in_range(0, highest=highest, theta=theta)
    if highest < COLDEST:
        raise OptionError(
            f"highest is {highest}; expected at least {COLDEST}. Use the method 'greedy'."
        )
    return Decoding(steps=(EntropyTemperature(highest=highest, theta=theta), *nucleus(top_p)))
