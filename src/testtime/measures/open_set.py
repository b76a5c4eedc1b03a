"""How well known samples are classified while unknown ones are told apart: OSCR and H-score.

Both take for every sample of a stream a score of being unknown `(n,)`, higher for samples that are
more likely of a class the model does not know; whether its prediction was right `(n,)`, bool, which
is read of known samples only; and whether it is unknown `(n,)`, bool. Without a known sample they
are not defined. Without an unknown one both are the accuracy: there is nothing to reject.
"""

import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor

from testtime._core.arrays import check_tensors, in_type_of
from testtime._core.errors import InputError
from testtime.measures.detection import auroc


def oscr(
    scores: Real[Tensor, "n"], hit: Bool[Tensor, "n"], unknown: Bool[Tensor, "n"]
) -> Float[Tensor, ""]:
    """Open-set classification rate: the area under CCR against FPR, in [0, accuracy].

        CCR(t) = share of known samples that are right and score at most t
        FPR(t) = share of unknown samples that score at most t
        OSCR   = area under CCR over FPR = accuracy · AUROC( right known samples, unknown ones )

    Samples that score at most t are accepted. Between thresholds the curve is straight, so equal
    scores count half. Without unknown samples OSCR is the accuracy, what is left of it when all of
    them are rejected.

    Args:
        scores: (n,), higher for unknown samples; infinite values are allowed.
        hit: (n,) bool, whether the prediction is right; not read of unknown samples.
        unknown: (n,) bool.

    Raises:
        InputError: for other shapes or types, NaN, or without a known sample.

    Example:
        >>> unknown = torch.tensor([False, False, True, True])
        >>> hit = torch.tensor([True, False, False, False])
        >>> oscr(torch.tensor([0.2, 0.1, 0.9, 0.1]), hit, unknown)
        tensor(0.2500)

    Reference: Dhamija, Günther, Boult, Reducing Network Agnostophobia, NeurIPS 2018.
    """
    _check(scores, hit, unknown)
    right = hit & ~unknown
    accuracy = right.sum().double() / (~unknown).sum()
    if bool(unknown.any()) and bool(right.any()):
        asked = right | unknown
        accuracy = accuracy * auroc(scores[asked].double(), unknown[asked])
    return in_type_of(scores, accuracy)


def h_score(
    scores: Real[Tensor, "n"], hit: Bool[Tensor, "n"], unknown: Bool[Tensor, "n"]
) -> Float[Tensor, ""]:
    """H-score: the harmonic mean of the accuracy on known samples and the AUROC, in [0, 1].

        H = 2 · accuracy · AUROC / (accuracy + AUROC),    0 where both are 0

    Without unknown samples it is the accuracy. In universal domain adaptation (Fu et al., ECCV
    2020) the name stands for another mean, with the accuracy on unknown samples at one threshold in
    place of AUROC.

    Args:
        scores: (n,), higher for unknown samples; infinite values are allowed.
        hit: (n,) bool, whether the prediction is right; not read of unknown samples.
        unknown: (n,) bool.

    Raises:
        InputError: for other shapes or types, NaN, or without a known sample.

    Example:
        >>> unknown = torch.tensor([False, False, True, True])
        >>> hit = torch.tensor([True, False, False, False])
        >>> h_score(torch.tensor([0.2, 0.1, 0.9, 0.1]), hit, unknown)
        tensor(0.5556)

    Reference: Yu et al., STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory Replay, ECCV
    2024.
    """
    _check(scores, hit, unknown)
    accuracy = hit[~unknown].double().mean()
    if bool(unknown.any()):
        found = auroc(scores.double(), unknown)
        both = accuracy + found
        accuracy = 2 * accuracy * found / both if bool(both > 0) else both
    return in_type_of(scores, accuracy)


def _check(scores: Tensor, hit: Tensor, unknown: Tensor) -> None:
    check_tensors(scores=scores, hit=hit, unknown=unknown)
    if scores.ndim != 1 or not scores.shape == hit.shape == unknown.shape:
        raise InputError(
            f"scores have the shape {tuple(scores.shape)}, hit {tuple(hit.shape)} and unknown "
            f"{tuple(unknown.shape)}; expected (n,) for all, one of each for every sample."
        )
    for name, flags in (("hit", hit), ("unknown", unknown)):
        if flags.dtype != torch.bool:
            raise InputError(
                f"{name} is {flags.dtype}; expected bool. Pass for instance labels == -1."
            )
    if scores.is_complex():
        raise InputError(f"scores are {scores.dtype}; expected real numbers, which can be ranked.")
    if bool(scores.isnan().any()):
        raise InputError(
            f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN and cannot be ranked. "
            "Leave these samples out, or give them inf."
        )
    if bool(unknown.all()):
        raise InputError(
            f"none of {len(unknown)} samples is of a known class; expected at least one. The "
            "measure is not defined otherwise."
        )
