"""EM-INF: the logits of each token are themselves optimised to lower their entropy.

z = z0, p0 = softmax(z0)
at most n times, for each row by itself:
    p = softmax(z);  H = -sum_v p_v ln(p_v + 1e-12)
    stop where H < delta
    z <- Adam(z, gradient of H + lambda KL(p0 || p))
draw from softmax(z / T)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime.decode.decoding import Decoding
from testtime.decode.methods.classical import heated, nucleus

TINY = 1e-12
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""Of Adam, as in torch."""


def lower_entropy(
    logits: Float[Tensor, "rows tokens"],
    *,
    threshold: float = 0.3,
    lr: float = 0.1,
    steps: int = 5,
    anchor: float = 1e-3,
) -> Float[Tensor, "rows tokens"]:
    """Logits after some steps of Adam towards lower entropy; rows below the threshold as they are.

    The gradient is written out, so that a step costs one softmax and a few passes over the rows
    that still learn, without autograd:

        d/dz_v = p_v (g_v - sum_u p_u g_u) + lambda (p_v - p0_v),  g = -ln(p + 1e-12) - p / (p + 1e-12)

    Entries of -inf stay. The paper's code sums the entropy over the batch; here each row has its
    own, which is the same for a batch of one.

    Args:
        threshold: delta, in nats.
        lr: of Adam.
        steps: n, at most.
        anchor: lambda.

    Example:
        >>> before = torch.tensor([[2.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
        >>> after = lower_entropy(before)
        >>> after[0].softmax(-1).max() > before[0].softmax(-1).max(), after[1].equal(before[1])
        (tensor(True), True)
    """
    z0 = at_least_single(logits)
    out, rows = z0, torch.arange(len(z0), device=z0.device)
    z, p0 = z0, z0.softmax(-1)
    first, second = torch.zeros_like(z0), torch.zeros_like(z0)
    for step in range(1, steps + 1):
        p = z.softmax(-1)
        log_p = (p + TINY).log_()
        learns = -(p * log_p).sum(-1) >= threshold
        if not bool(learns.any()):
            break
        if not bool(learns.all()):
            rows, z, p0, p = rows[learns], z[learns], p0[learns], p[learns]
            first, second, log_p = first[learns], second[learns], log_p[learns]
        slope = -log_p - p / (p + TINY)
        gradient = p * (slope - (p * slope).sum(-1, keepdim=True)) + anchor * (p - p0)
        first = BETA_1 * first + (1 - BETA_1) * gradient
        second = BETA_2 * second + (1 - BETA_2) * gradient**2
        size = (second / (1 - BETA_2**step)).sqrt_() + EPSILON
        z = z - lr * (first / (1 - BETA_1**step)) / size
        out = z if len(rows) == len(z0) else out.index_copy(0, rows, z)
    return out


@dataclass(frozen=True, kw_only=True)
class LowerEntropy:
    """The step: `lower_entropy` with these options."""

    threshold: float = 0.3
    lr: float = 0.1
    steps: int = 5
    anchor: float = 1e-3

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Logits (rows, tokens) of lower entropy."""
        return lower_entropy(
            logits, threshold=self.threshold, lr=self.lr, steps=self.steps, anchor=self.anchor
        )


@register("decoding", paper="em-llm")
def em_inf(
    *,
    threshold: float = 0.3,
    lr: float = 0.1,
    steps: int = 5,
    anchor: float = 1e-3,
    temperature: float = 0.1,
    top_p: float = 1.0,
) -> Decoding:
    """Optimises the logits of each uncertain token to lower their entropy, then draws.

    Args:
        threshold: delta in nats; rows below are left alone. This and what follows are the defaults
            of the code's function; its script for mathematics uses 3 steps and an anchor of 0.05.
        lr: step size of Adam on the logits.
        steps: at most.
        anchor: lambda, weight of the divergence from the model's own distribution.
        temperature: of the draw.
        top_p: nucleus that is kept; 1 keeps all.

    Example:
        >>> em_inf(steps=3).steps[0].steps
        3

    Reference: Agarwal et al., The Unreasonable Effectiveness of Entropy Minimization in LLM
    Reasoning, 2025.
    """
    in_range(0, threshold=threshold, lr=lr, anchor=anchor)
    whole(0, steps=steps)
    lower = LowerEntropy(threshold=threshold, lr=lr, steps=steps, anchor=anchor)
    return Decoding(steps=(lower, *heated(temperature), *nucleus(top_p)))
