"""How far stated probabilities stand from what happens: calibration errors, Brier score, NLL.

Each reduces its samples to one number, computed in float64 and answered in the type of the input
(float32 for half precision), with gradients to the probabilities; the choice of the bin has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from testtime._core.arrays import check_tensors, in_type_of
from testtime._core.errors import InputError
from testtime._core.options import whole

SLACK = 1e-5
"""How far outside of [0, 1] rounding may bring a probability."""

AT_ONCE = 1024
"""Samples whose classes are turned to float64 at once, so that memory stays that of the input."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """What a reliability diagram shows, one entry for each bin; 0 in an empty bin."""

    count: Int[Tensor, "bins"]
    confidence: Float[Tensor, "bins"]
    accuracy: Float[Tensor, "bins"]


def reliability(
    confidence: Float[Tensor, "n"], hit: Bool[Tensor, "n"], *, bins: int = 15
) -> Reliability:
    """Count, mean confidence and accuracy in bins of equal width.

    Bin b of M holds the confidences in ((b - 1) / M, b / M], and the first one 0 as well.

    Args:
        confidence: (n,) in [0, 1].
        hit: (n,) bool, whether the prediction was right.
        bins: number of bins; 15 as in Guo et al.

    Raises:
        InputError: for other shapes or types, no samples, or a confidence outside of [0, 1].
        OptionError: if bins is not a positive whole number.

    Example:
        >>> reliability(torch.tensor([0.9, 0.6]), torch.tensor([True, False]), bins=2)
        Reliability(count=tensor([0, 2]), confidence=tensor([0.0000, 0.7500]),
                    accuracy=tensor([0.0000, 0.5000]))

    Reference: DeGroot, Fienberg, The Comparison and Evaluation of Forecasters, 1983.
    """
    _check(confidence, hit, bins)
    place = _equal_width(confidence, bins)
    count = torch.bincount(place, minlength=bins)
    sure = _totals(place, confidence, bins) / count.clamp(min=1)
    right = _totals(place, hit, bins) / count.clamp(min=1)
    return Reliability(
        count=count,
        confidence=in_type_of(confidence, sure),
        accuracy=in_type_of(confidence, right),
    )


def calibration_error(
    confidence: Float[Tensor, "n"], hit: Bool[Tensor, "n"], *, bins: int = 15
) -> Float[Tensor, ""]:
    """Expected calibration error: how far confidence stands from accuracy, over equal-width bins.

        ECE = sum_b (n_b / n) |acc_b - conf_b|        bins ((b - 1) / M, b / M]

    Args:
        confidence: (n,) in [0, 1].
        hit: (n,) bool, whether the prediction was right.
        bins: number of bins M; 15 as in Guo et al.

    Raises:
        InputError: for other shapes or types, no samples, or a confidence outside of [0, 1].
        OptionError: if bins is not a positive whole number.

    Example:
        >>> calibration_error(torch.tensor([0.9, 0.6]), torch.tensor([True, False]), bins=2)
        tensor(0.2500)

    References: Naeini, Cooper, Hauskrecht, AAAI 2015. Guo, Pleiss, Sun, Weinberger, ICML 2017.
    """
    _check(confidence, hit, bins)
    gaps = _totals(_equal_width(confidence, bins), confidence.double() - hit.double(), bins)
    return in_type_of(confidence, gaps.abs().sum() / len(hit))


def adaptive_calibration_error(
    confidence: Float[Tensor, "n"], hit: Bool[Tensor, "n"], *, bins: int = 15
) -> Float[Tensor, ""]:
    """Adaptive calibration error: ECE over bins that hold the same number of samples.

        ACE = sum_b (n_b / n) |acc_b - conf_b|        bin b: ranks b n / M to (b + 1) n / M

    Ranks are those of the confidence; the numbers of samples differ by one at most. Samples of
    equal confidence share their hits evenly, so that the order of the samples does not matter
    where such a group lies across two bins.

    Args:
        confidence: (n,) in [0, 1].
        hit: (n,) bool, whether the prediction was right.
        bins: number of bins M; 15 as for the equal-width error.

    Raises:
        InputError: for other shapes or types, no samples, or a confidence outside of [0, 1].
        OptionError: if bins is not a positive whole number.

    Example:
        >>> hit = torch.tensor([True, False, False, True])
        >>> adaptive_calibration_error(torch.tensor([0.9, 0.8, 0.6, 0.7]), hit, bins=2)
        tensor(0.2500)

    References: Nguyen, O'Connor, EMNLP 2015. Nixon et al., Measuring Calibration in Deep Learning,
    2019 (whose ACE is over all classes; this one is of the answer only).
    """
    _check(confidence, hit, bins)
    ranked, order = confidence.double().sort()
    tie = torch.nn.functional.pad((ranked[1:] != ranked[:-1]).cumsum(0), (1, 0))
    size = tie.bincount()
    shared = (_totals(tie, hit[order], len(size)) / size)[tie]
    place = torch.arange(len(hit), device=hit.device) * bins // len(hit)
    return in_type_of(confidence, _totals(place, ranked - shared, bins).abs().sum() / len(hit))


def classwise_calibration_error(
    probs: Float[Tensor, "n classes"], labels: Int[Tensor, "n"], *, bins: int = 15
) -> Float[Tensor, ""]:
    """Classwise calibration error: the ECE of each class's own probability, averaged over classes.

        cwECE = (1 / C) sum_c sum_b (n_bc / n) |freq_bc - prob_bc|

    Args:
        probs: (n, classes), rows that sum to 1.
        labels: (n,) whole numbers below the number of classes.
        bins: number of equal-width bins M; 15 as for the equal-width error.

    Raises:
        InputError: for other shapes or types, no samples, or rows that are not probabilities.
        OptionError: if bins is not a positive whole number.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> classwise_calibration_error(probs, torch.tensor([0, 1]))
        tensor(0.3500)

    Reference: Kull et al., Beyond Temperature Scaling, NeurIPS 2019.
    """
    _check_bins(bins)
    _check_probs(probs, labels)
    samples, classes = probs.shape
    first = bins * torch.arange(classes, device=probs.device)
    gaps = torch.zeros(bins * classes, dtype=torch.float64, device=probs.device)
    for part, truth in _parts(probs, labels):
        place = _equal_width(part, bins) + first
        right = place.gather(1, truth[:, None]).flatten().bincount(minlength=bins * classes)
        gaps = gaps + _totals(place.flatten(), part.flatten(), bins * classes) - right
    return in_type_of(probs, gaps.abs().sum() / (samples * classes))


def brier_score(probs: Float[Tensor, "n classes"], labels: Int[Tensor, "n"]) -> Float[Tensor, ""]:
    """Brier score of all classes: mean squared distance from the label, in [0, 2].

        BS = (1 / n) sum_i sum_c ( p_ic - [c = y_i] )^2

    This is Brier's own form; for two classes it is twice the one that looks at one class only.

    Args:
        probs: (n, classes), rows that sum to 1.
        labels: (n,) whole numbers below the number of classes.

    Raises:
        InputError: for other shapes or types, no samples, or rows that are not probabilities.

    Example:
        >>> brier_score(torch.tensor([[0.8, 0.2]]), torch.tensor([0]))
        tensor(0.0800)

    Reference: Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.
    """
    _check_probs(probs, labels)
    wrong = torch.zeros((), dtype=torch.float64, device=probs.device)
    for part, truth in _parts(probs, labels):
        wrong = wrong + (part.double() - one_hot(truth, probs.shape[1])).square().sum()
    return in_type_of(probs, wrong / len(labels))


def negative_log_likelihood(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, "n"]
) -> Float[Tensor, ""]:
    """Negative log-likelihood of the labels under softmax(logits), the mean in nats.

        NLL = -(1 / n) sum_i ln p_i,y_i

    It is infinite if the logits mask (-inf) the class of a label; its gradient is finite then too.

    Args:
        logits: (n, classes).
        labels: (n,) whole numbers below the number of classes.

    Raises:
        InputError: for other shapes or types, no samples, or a row without a softmax (NaN, +inf, or
            nothing but -inf).

    Example:
        >>> negative_log_likelihood(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)
    """
    check_labels(logits, labels, "logits")
    if logits.is_complex():
        raise InputError(f"logits are {logits.dtype}; expected real numbers.")
    chosen = torch.cat(
        [part.double().log_softmax(1).gather(1, y[:, None]) for part, y in _parts(logits, labels)]
    )
    if bool(chosen.isnan().any()):
        raise InputError(
            f"{int(chosen.isnan().sum())} of {len(labels)} rows of logits hold NaN, +inf, or nothing "
            "but -inf and have no softmax; expected at least one finite logit and no NaN or +inf. "
            "Leave these samples out, and count them."
        )
    return in_type_of(logits, -chosen.mean())


def _equal_width(values: Tensor, bins: int) -> Tensor:
    """Bin of each value; edges are rounded as the values were, so that 0.6 is at most 0.6."""
    edges = (torch.arange(1, bins, device=values.device).double() / bins).to(values.dtype)
    return torch.bucketize(values.detach().contiguous(), edges)


def _totals(place: Tensor, values: Tensor, groups: int) -> Tensor:
    """Sum of the values in each group, in float64."""
    empty = torch.zeros(groups, dtype=torch.float64, device=values.device)
    return empty.index_add(0, place, values.double())


def _parts(probs: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in parts of `AT_ONCE` samples, labels as int64."""
    for start in range(0, len(probs), AT_ONCE):
        cut = slice(start, start + AT_ONCE)
        yield probs[cut], labels[cut].long()


def _check(confidence: Tensor, hit: Tensor, bins: int) -> None:
    _check_bins(bins)
    check_tensors(confidence=confidence, hit=hit)
    if confidence.ndim != 1 or confidence.shape != hit.shape or len(hit) == 0:
        raise InputError(
            f"confidence has the shape {tuple(confidence.shape)} and hit {tuple(hit.shape)}; "
            "expected (n,) for both, with at least one sample."
        )
    if hit.dtype != torch.bool:
        raise InputError(f"hit is {hit.dtype}; expected bool. Pass for instance answers == labels.")
    _check_range(confidence, "confidence")


def _check_bins(bins: int) -> None:
    whole(1, bins=bins)


def _check_range(values: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise InputError(f"{name}: {values.dtype} given, expected a floating point type.")
    if not bool(((values >= -SLACK) & (values <= 1 + SLACK)).all()):
        low, high = values.detach().aminmax()
        raise InputError(
            f"{name} lies between {low.item():.4g} and {high.item():.4g}; expected [0, 1] without "
            "NaN. Pass probabilities (the softmax of logits), not logits or percent."
        )


def _check_probs(probs: Tensor, labels: Tensor) -> None:
    check_labels(probs, labels, "probs")
    _check_range(probs, "probs")
    worst = (probs.detach().sum(1, dtype=torch.float64) - 1).abs().amax().item()
    if worst > 0.01:  # what half precision leaves of a softmax over many classes
        raise InputError(
            f"a row of probs misses a sum of 1 by {worst:.4g}; expected probabilities of exclusive "
            "classes, as softmax gives them."
        )


def check_labels(scores: Tensor, labels: Tensor, name: str) -> None:
    """Refuses labels that are not one class of `scores` for each of its rows.

    Raises:
        InputError: for other shapes or types, no samples, or a label that has no column.

    Example:
        >>> check_labels(torch.zeros(1, 2), torch.tensor([2]), "logits")
        Traceback (most recent call last):
        testtime._core.errors.InputError: labels lie between 2 and 2; expected 0 to 1, since logits ...
    """
    check_tensors(**{name: scores, "labels": labels})
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or scores.numel() == 0:
        raise InputError(
            f"{name} have the shape {tuple(scores.shape)} and labels {tuple(labels.shape)}; "
            "expected (n, classes) and (n,), with at least one sample and one class."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels are {labels.dtype}; expected whole numbers, such as int64.")
    low, high = labels.long().aminmax()
    if int(low) < 0 or int(high) >= scores.shape[1]:
        raise InputError(
            f"labels lie between {int(low)} and {int(high)}; expected 0 to {scores.shape[1] - 1}, "
            f"since {name} have {scores.shape[1]} classes."
        )
