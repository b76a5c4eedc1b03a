"""SADE's training loss: three experts on one long-tailed set, each for another class distribution."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime.measures.log_space import check_classes

EPS = 1e-9
"""Added to priors before their logarithm, as in the code."""


def diverse_experts_loss(
    logits: Sequence[Float[Tensor, "batch classes"]] | Float[Tensor, "batch 3 classes"],
    labels: Int[Tensor, " batch"],
    prior: Float[Tensor, " classes"],
    *,
    tau: float = 2.0,
) -> Float[Tensor, ""]:
    """The loss that makes three experts diverse: for the long tail, for balance, for the inverse.

        L = CE(v1, y) + CE(v2 + ln π, y) + CE(v3 + ln π − τ ln π̄, y)

    π is the share of each class in the training set, and π̄ the same values in reversed rank order:
    the most frequent class gets the smallest. Each cross-entropy is a mean over the batch.

    Args:
        logits: of the forward, the uniform and the inverse expert: three of (B, C), or (B, 3, C).
        labels: (B,) classes.
        prior: (C,) samples of each class, or their shares.
        tau: strength of the inverse expert; 2 (code).

    Raises:
        InputError: there are not three experts, labels are no classes of theirs, one for each
            sample, or the prior does not fit the classes.

    Example:
        >>> logits, labels = torch.zeros(2, 3, 3), torch.tensor([0, 2])
        >>> diverse_experts_loss(logits, labels, torch.tensor([60.0, 30.0, 10.0]))
        tensor(5.2514)

    Reference: Zhang, Hooi, Hong, Feng, Self-Supervised Aggregation of Diverse Experts for
    Test-Agnostic Long-Tailed Recognition, NeurIPS 2022.
    """
    in_range(0, tau=tau)
    if isinstance(logits, Tensor):
        experts = list(logits.unbind(1)) if logits.dim() == 3 else [logits]
    elif isinstance(logits, Sequence):
        experts = list(logits)
    else:
        raise InputError(
            f"logits is of type {type(logits).__name__}; expected three tensors (n, classes), or one "
            "(n, 3, classes)."
        )
    check_tensors(
        labels=labels, prior=prior, **{f"logits[{i}]": each for i, each in enumerate(experts)}
    )
    shapes = [tuple(each.shape) for each in experts]
    if len(experts) != 3 or len(set(shapes)) > 1 or experts[0].dim() != 2:
        raise InputError(
            f"logits are of the shapes {', '.join(map(str, shapes))}; expected those of three "
            "experts, each (batch, classes), or one tensor (batch, 3, classes)."
        )
    for each in experts:
        check_classes(each, "logits")
    classes = experts[0].shape[1]
    fits = prior.shape == (classes,) and not prior.is_complex() and bool((prior >= 0).all())
    shares = prior.to(at_least_single(experts[0])) / prior.sum() if fits else prior
    if not fits or not bool(shares.isfinite().all()):
        raise InputError(
            f"prior is of shape {tuple(prior.shape)} with values {prior.flatten().tolist()[:5]} ...; expected "
            f"the number of training samples of each of {classes} classes."
        )
    whole_numbers = not (labels.is_floating_point() or labels.is_complex())
    if labels.shape != experts[0].shape[:1] or not len(labels) or not whole_numbers:
        raise InputError(
            f"labels are {labels.dtype} of the shape {tuple(labels.shape)}; expected whole numbers "
            f"({len(experts[0])},), one for each sample, and at least one."
        )
    labels = labels.long()
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise InputError(
            f"labels lie between {int(labels.min())} and {int(labels.max())}; expected 0 to "
            f"{classes - 1}."
        )
    forward, uniform, inverse = map(at_least_single, experts)
    tail = (shares + EPS).log()
    reversed_tail = (reversed_prior(shares) + EPS).log()
    return (
        F.cross_entropy(forward, labels)
        + F.cross_entropy(uniform + tail, labels)
        + F.cross_entropy(inverse + tail - tau * reversed_tail, labels)
    )


def reversed_prior(prior: Float[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    """The same values in reversed rank order: the most frequent class gets the smallest.

    Example:
        >>> reversed_prior(torch.tensor([0.6, 0.3, 0.1]))
        tensor([0.1000, 0.3000, 0.6000])
    """
    check_tensors(prior=prior)
    if prior.dim() != 1 or prior.is_complex():
        raise InputError(
            f"prior is {prior.dtype} of the shape {tuple(prior.shape)}; expected shares (classes,)."
        )
    values, order = prior.sort()
    return torch.empty_like(prior).scatter(0, order, values.flip(0))
