"""Divergences between two predictions, in nats: Kullback-Leibler, Jensen-Shannon, alpha.

All take two tensors of logits `(*batch, classes)` of one shape, of any scale, masked entries
(-inf) included. Half precision is computed, and answered, in float32. Gradients are finite
everywhere; where a divergence is infinite, as one prediction excludes a class that the other one
allows, its gradient is 0. Where either prediction does not exist, as its logits hold NaN or +inf, or
nothing but -inf, the value is NaN.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime.measures.log_space import alpha_divergence_of_log_probs, log_probs


def kl_divergence(
    p_logits: Float[Tensor, "*batch classes"], q_logits: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence of p = softmax(p_logits) from q = softmax(q_logits), in nats.

        KL(p || q) = sum_c p_c ln( p_c / q_c )

    It is infinite where q masks a class that p allows.

    Raises:
        InputError: if the two shapes differ.

    Example:
        >>> kl_divergence(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.3278])

    Reference: Kullback, Leibler, On Information and Sufficiency, 1951.
    """
    _check_shapes(p_logits, q_logits)
    return alpha_divergence_of_log_probs(log_probs(p_logits), log_probs(q_logits), alpha=1)


def js_divergence(
    p_logits: Float[Tensor, "*batch classes"], q_logits: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence of softmax(p_logits) and softmax(q_logits), in nats.

        JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2,    m = (p + q) / 2,    0 <= JS <= ln 2

    It is symmetric and always finite; its square root is a metric.

    Raises:
        InputError: if the two shapes differ.

    Example:
        >>> js_divergence(torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0]))
        tensor(0.6931)

    Reference: Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    _check_shapes(p_logits, q_logits)
    log_p, log_q = log_probs(p_logits), log_probs(q_logits)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    from_p = alpha_divergence_of_log_probs(log_p, middle, alpha=1)
    from_q = alpha_divergence_of_log_probs(log_q, middle, alpha=1)
    return (from_p + from_q) / 2


def alpha_divergence(
    p_logits: Float[Tensor, "*batch classes"],
    q_logits: Float[Tensor, "*batch classes"],
    *,
    alpha: float,
) -> Float[Tensor, "*batch"]:
    """Alpha divergence of p = softmax(p_logits) and q = softmax(q_logits), in Minka's convention.

        D_alpha(p, q) = ( 1 - sum_c p_c^alpha q_c^(1 - alpha) ) / ( alpha (1 - alpha) )

    The limits are taken at alpha = 1, KL(p || q), and at alpha = 0, KL(q || p). Alpha = 1/2 is four
    times the squared Hellinger distance, alpha = 2 half of Pearson's chi-squared, and exchanging p
    and q is exchanging alpha and 1 - alpha. Amari's a is 1 - 2 alpha here (with p and q in this
    order). For alpha outside of (0, 1) it is infinite where one prediction masks a class that the
    other allows, and ratios of probabilities beyond the range of the type saturate.

    Raises:
        InputError: if the two shapes differ.
        OptionError: if alpha is not finite.

    Example:
        >>> p, q = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
        >>> alpha_divergence(p, q, alpha=0.5), alpha_divergence(p, q, alpha=1)
        (tensor(0.3690), tensor(0.3278))

    References: Zhu, Rohwer, Information Geometric Measurements of Generalisation, 1995.
    Minka, Divergence Measures and Message Passing, 2005.
    """
    _check_shapes(p_logits, q_logits)
    in_range(-math.inf, alpha=alpha)  # 1 and 0 give the two KL
    return alpha_divergence_of_log_probs(log_probs(p_logits), log_probs(q_logits), alpha=alpha)


def _check_shapes(p_logits: Tensor, q_logits: Tensor) -> None:
    check_tensors(p_logits=p_logits, q_logits=q_logits)
    if p_logits.shape != q_logits.shape:
        raise InputError(
            f"the logits have the shapes {tuple(p_logits.shape)} and {tuple(q_logits.shape)}; a "
            "divergence compares predictions of one shape. Expand the smaller one first."
        )
