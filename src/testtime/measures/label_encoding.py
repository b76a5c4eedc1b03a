"""Label-encoding risk: how far the mean prediction of each class is from the code of its label.

It asks of unlabelled data what entropy asks, sure predictions, and besides that every class occurs.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range
from testtime.measures.log_space import check_classes

Distance = Literal["absolute", "squared", "divergence"]
"""How far a mean prediction is from its code: over all entries, or KL(code || mean) of each row."""


def label_encoding_risk(
    logits: Float[Tensor, "samples classes"], *, distance: Distance = "absolute"
) -> Float[Tensor, ""]:
    """Mean distance of the classes' mean predictions from their one-hot codes; 0 is the least.

        a_c = sum_n P_nc,   E = diag(1 / a) P^T P
        absolute    mean_cd |E_cd - [c = d]|,  at most 2 / C
        squared     mean_cd (E_cd - [c = d])^2,  at most 2 / C
        divergence  mean_c -ln E_cc,  the KL divergence of row c from its code

    Row c of E is the mean prediction of the samples that belong to c, each as far as it does. The
    risk is 0 just when all predictions are one-hot and every class occurs, so it needs about as
    many samples as classes. A sample without a prediction (NaN, +inf, nothing but -inf) makes it NaN. As a mean over C * C entries it shrinks like 1 / C: weigh it with 10 or
    more for many classes. Half precision is computed, and answered, in float32.

    Args:
        logits: (samples, classes), of one batch.
        distance: absolute is the paper's; the other two are of its code for heterogeneous adaptation,
            which takes a softmax of E before the logarithm: that is left out here, as E is a mean
            of probabilities already.

    Raises:
        InputError: for another shape, or without samples or classes.
        OptionError: for another distance.

    Example:
        >>> label_encoding_risk(torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]]))
        tensor(0.3465)

    Reference: Zhang, Yao, Chen et al., Rethinking Guidance Information to Utilize Unlabeled
        Samples: A Label Encoding Perspective, ICML 2024.
    """
    check_samples(logits, "logits")
    probs = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return label_encoding_distance(probs.T @ probs, probs.sum(0), distance=distance)


def label_encoding_distance(
    together: Float[Tensor, "classes classes"],
    belonging: Float[Tensor, "classes"],
    *,
    distance: Distance = "absolute",
) -> Float[Tensor, ""]:
    """The risk from sums over samples: P^T P, and how many samples belong to each class.

    A class to which nothing belongs counts as a row of zeros.

    Raises:
        InputError: for other shapes or types.
        OptionError: for another distance.

    Example:
        >>> label_encoding_distance(torch.eye(2), torch.ones(2))
        tensor(0.)
    """
    if distance not in get_args(Distance):
        raise OptionError(
            f"distance is {distance!r}; expected one of {', '.join(get_args(Distance))}."
        )
    check_tensors(together=together, belonging=belonging)
    real = together.is_floating_point() and belonging.is_floating_point()
    square = belonging.ndim == 1 and together.shape == 2 * belonging.shape
    if not real or not square or not len(belonging):
        raise InputError(
            f"together is {together.dtype} {tuple(together.shape)} and belonging {belonging.dtype} "
            f"{tuple(belonging.shape)}; expected (classes, classes) and (classes,), floating point."
        )
    least = torch.finfo(belonging.dtype).tiny
    means = together / belonging.clamp(min=least)[:, None]
    if distance == "divergence":
        return -means.diagonal().clamp(min=least).log().mean()
    apart = means - torch.eye(len(means), dtype=means.dtype, device=means.device)
    return (apart.abs() if distance == "absolute" else apart.square()).mean()


def semi_supervised_risk(
    labelled: Float[Tensor, "labelled classes"],
    labels: Int[Tensor, "labelled"],
    weak: Float[Tensor, "samples classes"],
    strong: Float[Tensor, "samples classes"],
    *,
    trade_off: float = 0.1,
    strong_share: float = 0.1,
    distance: Distance = "absolute",
) -> Float[Tensor, ""]:
    """Cross-entropy of labelled samples and the label-encoding risk of two views of unlabelled ones.

        CE(labelled) + trade_off * ( risk(weak) + strong_share * risk(strong) )

    Args:
        labelled: logits of the labelled samples.
        labels: their classes.
        weak: logits of weakly changed copies of unlabelled samples.
        strong: logits of strongly changed copies of the same.
        trade_off: 0.1 for CIFAR-10 with four labels a class, 10 for Office-31, 50 for CIFAR-100
            (code).
        strong_share: 0.1 (code).
        distance: as of `label_encoding_risk`.

    Raises:
        InputError: as `label_encoding_risk`.
        OptionError: when a weight is negative or no number, or for another distance.

    Example:
        >>> sure = 50 * torch.eye(3)
        >>> semi_supervised_risk(sure, torch.arange(3), sure, sure)
        tensor(0.)

    Reference: Zhang, Yao, Chen et al., ICML 2024.
    """
    in_range(0, trade_off=trade_off, strong_share=strong_share)
    check_samples(labelled, "labelled")
    check_tensors(labels=labels)
    whole_numbers = not (labels.is_floating_point() or labels.is_complex())
    fits = labels.shape == labelled.shape[:1] and whole_numbers
    if not fits or not bool(((labels >= 0) & (labels < labelled.shape[1])).all()):
        raise InputError(
            f"labels are {labels.dtype} of the shape {tuple(labels.shape)}; expected whole numbers "
            f"({len(labelled)},) from 0 to {labelled.shape[1] - 1}, one for each labelled sample."
        )
    risks = [label_encoding_risk(view, distance=distance) for view in (weak, strong)]
    unlabelled = risks[0] + strong_share * risks[1]
    return F.cross_entropy(at_least_single(labelled), labels.long()) + trade_off * unlabelled


def check_samples(logits: Tensor, name: str) -> None:
    """An `InputError` for what is not (samples, classes) with at least one of each."""
    check_classes(logits, name)
    if logits.ndim != 2 or not len(logits):
        raise InputError(
            f"{name} have the shape {tuple(logits.shape)}; expected (samples, classes) with at "
            "least one sample. Give one row for each sample."
        )
