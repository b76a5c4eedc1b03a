"""How well a score tells positives from negatives: AUROC, FPR at 95 % TPR, average precision, AURC.

All take scores `(n,)`, of which higher ones mean "positive" (for a detector of unknown inputs: the
unknown ones), and `positive` `(n,)`, bool. Equal scores form one threshold, so the order of the
samples never matters. Counts are exact integers; the result has the type of the scores, float32 for
half precision and integers, and no gradient (a ranking has none).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor

from testtime._core.arrays import check_tensors, in_type_of
from testtime._core.errors import InputError


class _Thresholds(NamedTuple):
    """How many positives and negatives score at least each distinct value, from high to low."""

    true: Int[Tensor, "thresholds"]
    false: Int[Tensor, "thresholds"]


def auroc(scores: Real[Tensor, "n"], positive: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """Area under the receiver operating characteristic, in [0, 1]; 0.5 is chance.

        AUROC = P( s+ > s- ) + P( s+ = s- ) / 2

    Args:
        scores: (n,), higher for positives; infinite values are allowed.
        positive: (n,) bool.

    Raises:
        InputError: for other shapes or types, NaN, or samples of one kind only.

    Example:
        >>> auroc(torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([True, True, False, False]))
        tensor(0.8750)

    Reference: Hanley, McNeil, The Meaning and Use of the Area under a ROC Curve, 1982.
    """
    _check(scores, positive, negatives=True)
    true, false = _thresholds(scores, positive)
    step = false.diff(prepend=false.new_zeros(1))
    twice = (step * (2 * true - true.diff(prepend=true.new_zeros(1)))).sum()
    return in_type_of(scores, twice.double() / (2 * true[-1] * false[-1]))


def fpr_at_95_tpr(scores: Real[Tensor, "n"], positive: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """False positive rate at the highest threshold that finds 95 % of the positives, in [0, 1].

        FPR95 = min { FPR(t) : TPR(t) >= 0.95 }

    There is no interpolation between thresholds. Which kind counts as positive matters here: papers
    on out-of-distribution detection differ.

    Args:
        scores: (n,), higher for positives; infinite values are allowed.
        positive: (n,) bool.

    Raises:
        InputError: for other shapes or types, NaN, or samples of one kind only.

    Example:
        >>> positive = torch.tensor([True, True, False, False])
        >>> fpr_at_95_tpr(torch.tensor([3.0, 1.0, 2.0, 0.0]), positive)
        tensor(0.5000)

    Reference: Liang, Li, Srikant, ODIN, ICLR 2018.
    """
    _check(scores, positive, negatives=True)
    true, false = _thresholds(scores, positive)
    enough = 100 * true >= 95 * true[-1]
    return in_type_of(scores, false[enough][0].double() / false[-1])


def average_precision(scores: Real[Tensor, "n"], positive: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """Average precision, the area under the precision-recall curve (AUPR) as a sum of steps.

        AP = sum_t ( R_t - R_(t-1) ) P_t        over the distinct scores t, from high to low

    Chance is the share of positives.

    Args:
        scores: (n,), higher for positives; infinite values are allowed.
        positive: (n,) bool.

    Raises:
        InputError: for other shapes or types, NaN, or without any positive.

    Example:
        >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
        tensor(0.8333)

    Reference: Davis, Goadrich, The Relationship Between Precision-Recall and ROC Curves, ICML 2006.
    """
    _check(scores, positive, negatives=False)
    true, false = _thresholds(scores, positive)
    found = true.diff(prepend=true.new_zeros(1))
    return in_type_of(scores, (found * (true.double() / (true + false))).sum() / true[-1])


def aurc(scores: Real[Tensor, "n"], wrong: Bool[Tensor, "n"]) -> Float[Tensor, ""]:
    """Area under the risk-coverage curve, in [0, 1]; lower is better, and it knows the model's error.

        risk(t) = P( wrong | s <= t ),    coverage(t) = P( s <= t )

    The samples with the lowest scores are answered first. The area is that of a line through the
    points of all distinct scores, from the least coverage on.

    Args:
        scores: (n,), higher for wrong answers; infinite values are allowed.
        wrong: (n,) bool.

    Raises:
        InputError: for other shapes or types, NaN, or without any wrong answer.

    Example:
        >>> aurc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([False, False, True]))
        tensor(0.0556)

    Reference: Geifman, El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017.
    """
    _check(scores, wrong, negatives=False)
    missed, correct = _thresholds(-scores.double(), wrong)
    answered = (missed + correct).double()
    return in_type_of(scores, torch.trapezoid(missed / answered, answered / len(scores)))


def _thresholds(scores: Tensor, positive: Tensor) -> _Thresholds:
    ranked, order = scores.sort(descending=True)
    last = torch.nn.functional.pad(ranked[1:] != ranked[:-1], (0, 1), value=True)
    true, false = positive[order].cumsum(0), (~positive[order]).cumsum(0)
    return _Thresholds(true[last], false[last])


def _check(scores: Tensor, positive: Tensor, *, negatives: bool) -> None:
    check_tensors(scores=scores, positive=positive)
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise InputError(
            f"scores have the shape {tuple(scores.shape)} and positive {tuple(positive.shape)}; "
            "expected (n,) for both, one score and one flag for each sample."
        )
    if positive.dtype != torch.bool:
        raise InputError(
            f"positive is {positive.dtype}; expected bool. Pass for instance labels == 1."
        )
    if scores.is_complex():
        raise InputError(f"scores are {scores.dtype}; expected real numbers, which can be ranked.")
    if bool(scores.isnan().any()):
        raise InputError(
            f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN and cannot be ranked. "
            "Leave these samples out, or give them -inf."
        )
    found = int(positive.sum())
    if found == 0 or (negatives and found == len(positive)):
        raise InputError(
            f"{found} of {len(positive)} samples are positive; expected at least one"
            f"{' of each kind' if negatives else ''}. The measure is not defined otherwise."
        )
