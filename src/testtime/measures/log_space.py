"""Log-probabilities that are finite everywhere, and the divergence that the measures share."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import threshold

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError

LOWEST = -1e20
"""Log-probability of an impossible class: far below any other, and still finite after it has been
summed over classes and a batch, and scaled by the gradient of a weighted or scaled loss."""


def log_probs(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Log-probabilities of logits, at least in float32, with -inf raised to `LOWEST`.

        ln p_c = max( z_c - ln sum_k exp(z_k), -1e20 )

    A masked class (-inf) has probability exactly 0 and a gradient of exactly 0, so that products
    such as p ln p need no care. A row of nothing but -inf, +inf and NaN have no softmax: NaN.

    Raises:
        InputError: for a tensor without classes.

    Example:
        >>> log_probs(torch.tensor([0.0, 0.0, -math.inf])).exp()
        tensor([0.5000, 0.5000, 0.0000])
    """
    check_classes(logits, "logits")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # threshold is clamp with a backward of one kernel instead of two
    return threshold(logits.log_softmax(-1, dtype=dtype), LOWEST, LOWEST)


def check_classes(values: Tensor, name: str) -> None:
    """An `InputError` for complex numbers, or without a last dimension of at least one class."""
    check_tensors(**{name: values})
    if values.is_complex():
        raise InputError(f"{name} are {values.dtype}; expected real numbers.")
    if values.ndim == 0 or values.shape[-1] == 0:
        raise InputError(
            f"{name} have the shape {tuple(values.shape)}; expected (*batch, classes) with at "
            "least one class. Pass the classes as the last dimension."
        )


def log_mean_prob(
    log_p: Float[Tensor, "samples *batch classes"],
) -> Float[Tensor, "*batch classes"]:
    """Logarithm of the mean probability over the first dimension, from `log_probs`.

    Raises:
        InputError: without samples, or without a dimension to average over.

    Example:
        >>> log_mean_prob(log_probs(torch.tensor([[0.0, -math.inf], [0.0, 0.0]]))).exp()
        tensor([0.7500, 0.2500])
    """
    check_tensors(log_p=log_p)
    if log_p.ndim < 2 or len(log_p) == 0:
        raise InputError(
            f"logits have the shape {tuple(log_p.shape)}; expected (samples, *batch, classes) "
            "with at least one sample, since the mean is over the first dimension."
        )
    return log_p.logsumexp(0) - math.log(len(log_p))


def alpha_divergence_of_log_probs(
    log_p: Float[Tensor, "*batch classes"],
    log_q: Float[Tensor, "*batch classes"],
    *,
    alpha: float,
) -> Float[Tensor, "*batch"]:
    """The alpha divergence of `testtime.measures.divergence`, from the results of `log_probs`.

    With a for alpha, each class contributes ( a p + (1 - a) q - p^a q^(1 - a) ) / ( a (1 - a) ),
    which is never negative and is 0 where p = q. Its differences are taken with expm1 where p and
    q are close, so that small divergences and an alpha near 0 or 1 keep their digits.

    Example:
        >>> log_p = log_probs(torch.tensor([0.0, 0.0]))
        >>> alpha_divergence_of_log_probs(log_p, log_p, alpha=1.0)
        tensor(0.)
    """
    if alpha < 0.5:  # D_alpha(p, q) = D_(1 - alpha)(q, p), so that only 1 - alpha may be small
        log_p, log_q, alpha = log_q, log_p, 1 - alpha
    rest = 1 - alpha
    p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
    linear = torch.where(gap.abs() < 1, p * torch.expm1(-gap.clamp(-1, 1)), q - p)
    if rest == 0:
        power = -p * gap
    else:
        tilt = rest * gap
        highest = 0.9 * math.log(torch.finfo(p.dtype).max)
        far = (log_p - tilt).clamp(max=highest).exp() - p
        power = torch.where(tilt.abs() < 1, p * torch.expm1(-tilt.clamp(-1, 1)), far) / rest
    total = (linear - power).sum(-1) / alpha
    if alpha < 1:
        return total
    outside = ((log_p > LOWEST) & (log_q == LOWEST)).any(-1)
    return total.masked_fill(outside, math.inf)
