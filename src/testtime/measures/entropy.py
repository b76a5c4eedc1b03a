"""Entropies of predictions, in nats: Shannon, Renyi, Tsallis, marginal; mutual information.

All take logits `(*batch, classes)`, of any scale, masked entries (-inf) included. Half precision is
computed, and answered, in float32. A sample whose logits hold NaN or +inf, or nothing but -inf, has no
prediction: its value is NaN, as is that of a mean it enters, so that it can be counted and left out.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range
from testtime.measures.log_space import (
    LOWEST,
    alpha_divergence_of_log_probs,
    check_classes,
    log_mean_prob,
    log_probs,
)

NEAR_ONE = 0.1
"""Orders closer to 1 than this are computed from p^order - p, not from p^order."""


def entropy(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of softmax(logits), in nats.

        H = -sum_c p_c ln p_c

    Raises:
        InputError: for a tensor without classes.

    Example:
        >>> entropy(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([0.6656, 1.0986])
        >>> entropy(torch.tensor([0.0, 0.0, -math.inf]))
        tensor(0.6931)

    Reference: Shannon, A Mathematical Theory of Communication, 1948.
    """
    check_classes(logits, "logits")
    # Written as a product of softmax and log-softmax, in this order, so that gradients equal those
    # of the published codes to the last bit: Adam turns a difference in the last bit of a tiny
    # gradient into a different step.
    probs = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(probs * log_probs(logits)).sum(-1)  # log_probs are finite, so that 0 ln 0 = 0


def entropy_of_probs(probs: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Shannon entropy of probabilities, in nats; entries of zero count nothing.

    That they are from 0 on and sum to 1 is not checked. The gradient at zero is finite: that of the smallest normal number.

    Raises:
        InputError: for a tensor without classes.

    Example:
        >>> entropy_of_probs(torch.tensor([0.5, 0.5, 0.0]))
        tensor(0.6931)
    """
    check_classes(probs, "probs")
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def cross_entropy(
    target_probs: Float[Tensor, "*batch classes"], logits: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of softmax(logits) against target probabilities, in nats.

        CE = -sum_c t_c ln p_c

    A class that the target excludes counts nothing, also where the logits mask it. A class that the
    logits mask and the target does not costs 1e20 nats times its share, where the cross-entropy is
    infinite: huge, but never NaN, and neither is its gradient. That the targets are probabilities is
    not checked.

    Raises:
        InputError: if the two shapes differ, or for tensors without classes.

    Example:
        >>> cross_entropy(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(0.6931)
    """
    check_tensors(target_probs=target_probs, logits=logits)
    if target_probs.shape != logits.shape:
        raise InputError(
            f"target_probs have the shape {tuple(target_probs.shape)} and logits "
            f"{tuple(logits.shape)}; expected one shape. Expand the smaller one first."
        )
    log_p = log_probs(logits)
    return -(target_probs.to(log_p.dtype) * log_p).sum(-1)


def marginal_entropy(logits: Float[Tensor, "samples *batch classes"]) -> Float[Tensor, "*batch"]:
    """Entropy of the mean prediction over the first dimension, in nats.

        H( mean_i softmax(z_i) )

    Raises:
        InputError: without samples, or without a dimension to average over.

    Example:
        >>> marginal_entropy(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
        tensor(0.6931)

    Reference: Zhang, Levine, Finn, MEMO, NeurIPS 2022.
    """
    log_mean = log_mean_prob(log_probs(logits))
    return -(log_mean.exp() * log_mean).sum(-1)


def mutual_information(logits: Float[Tensor, "samples *batch classes"]) -> Float[Tensor, "*batch"]:
    """Mutual information between the sample and its prediction, in nats.

        I = H( mean_i p_i ) - mean_i H(p_i)        0 <= I <= ln C

    Over an ensemble in the first dimension this is the part of the uncertainty that its members
    disagree on (BALD); over a batch it is what SHOT maximises. It is computed as the mean of
    KL(p_i || mean p), the same number, which keeps its digits where all predictions agree.

    Raises:
        InputError: without samples, or without a dimension to average over.

    Example:
        >>> mutual_information(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
        tensor(0.6931)

    Reference: Houlsby et al., Bayesian Active Learning, 2011.
    """
    log_p = log_probs(logits)
    log_mean = log_mean_prob(log_p).expand_as(log_p)
    return alpha_divergence_of_log_probs(log_p, log_mean, alpha=1).mean(0)


def renyi_entropy(
    logits: Float[Tensor, "*batch classes"], *, order: float
) -> Float[Tensor, "*batch"]:
    """Renyi entropy of softmax(logits), in nats.

        H_a = ln( sum_c p_c^a ) / (1 - a)

    Order 1 is Shannon entropy, order 0 the logarithm of the number of classes that are possible,
    infinity the min-entropy.

    Raises:
        OptionError: for a negative order.

    Example:
        >>> renyi_entropy(torch.tensor([0.0, 0.0]), order=2.0)
        tensor(0.6931)

    Reference: Renyi, On Measures of Entropy and Information, 1961.
    """
    if order != math.inf:
        in_range(0, order=order)
    log_p = log_probs(logits)
    if order == 1:
        return entropy(logits)
    if order == math.inf:
        return -log_p.amax(-1)
    if abs(order - 1) < NEAR_ONE:
        return _power_excess(log_p, order).log1p() / (1 - order)
    return _log_power_sum(log_p, order) / (1 - order)


def tsallis_entropy(
    logits: Float[Tensor, "*batch classes"], *, order: float
) -> Float[Tensor, "*batch"]:
    """Tsallis entropy of softmax(logits).

        S_q = ( 1 - sum_c p_c^q ) / (q - 1)

    Order 1 is Shannon entropy in nats; order 2 is the Gini impurity.

    Raises:
        OptionError: for an order that is not positive.

    Example:
        >>> tsallis_entropy(torch.tensor([0.0, 0.0]), order=2.0)
        tensor(0.5000)

    Reference: Tsallis, Possible generalization of Boltzmann-Gibbs statistics, 1988.
    """
    in_range(0, order=order)
    if order == 0:
        raise OptionError("order is 0; expected a positive number.")
    if order == 1:
        return entropy(logits)
    log_p = log_probs(logits)
    if abs(order - 1) < NEAR_ONE:
        return _power_excess(log_p, order) / (1 - order)
    return _log_power_sum(log_p, order).expm1() / (1 - order)


def _log_power_sum(log_p: Tensor, order: float) -> Tensor:
    """ln sum_c p_c^order over the classes that are possible."""
    return (order * log_p).masked_fill(log_p == LOWEST, -math.inf).logsumexp(-1)


def _power_excess(log_p: Tensor, order: float) -> Tensor:
    """sum_c p_c^order - 1 without the loss of digits of that difference, for an order near 1."""
    log_p = log_p.clamp(min=math.log(torch.finfo(log_p.dtype).tiny))
    return (log_p.exp() * torch.expm1((order - 1) * log_p)).sum(-1)
