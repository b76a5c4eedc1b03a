"""Variational estimates of mutual information, of the scores of a critic on all pairs of a batch.

    F_ij = f(x_i, y_j)   i = j: pairs that belong together;   i != j: pairs from the product law

Each is a function of the scores (B, B) alone, to be ascended by whoever trains the critic. Where the
value of an estimate and the bound that trains its critic differ, the function has the value of the
one and the gradient of the other.

    DV       mean_i F_ii - ln mean_{i!=j} e^F_ij
    NWJ      1 + mean_i (F_ii - 1) - mean_{i!=j} e^(F_ij - 1)
    TUBA     NWJ of F_ij - a_i + 1, with a baseline a
    InfoNCE  ln B + mean_i [ F_ii - ln sum_j e^F_ij ]                         never above ln B
    JS       value of NWJ, of scores 1 + F; gradient of
                 J = - mean_i softplus(-F_ii) - mean_{i!=j} softplus(F_ij)
    SMILE    mean_i F_ii - ln mean_{i!=j} e^clip(F_ij, -tau, tau); gradient of J

DV and NWJ average e^F over few pairs: their variance grows like e^I. SMILE clips it, at the price of a
bias, upwards too: it is no lower bound. They are losses: a score that is NaN makes them NaN. Half
precision is computed, and answered, in float32.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range

Scores = Float[Tensor, "batch batch"]


def donsker_varadhan(scores: Scores) -> Float[Tensor, ""]:
    """DV: the Donsker-Varadhan bound, with a bias of order 1 / B upwards from the logarithm.

    Raises:
        InputError: for scores that are not square, or of one pair only.

    Example:
        >>> donsker_varadhan(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
        tensor(2.)

    Reference: Donsker, Varadhan, 1983; Belghazi et al., MINE, ICML 2018.
    """
    scores = _check(scores)
    return scores.diagonal().mean() - _log_mean_exp_apart(scores)


def nwj(scores: Scores) -> Float[Tensor, ""]:
    """NWJ: the bound of Nguyen, Wainwright and Jordan (f-GAN of KL, MINE-f), without bias.

    Raises:
        InputError: as `donsker_varadhan`.

    Example:
        >>> nwj(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.6321)

    Reference: Nguyen, Wainwright, Jordan, Estimating Divergence Functionals, 2010.
    """
    scores = _check(scores) - 1
    return 1 + scores.diagonal().mean() - _log_mean_exp_apart(scores).exp()


def tuba(scores: Scores, log_baseline: Float[Tensor, "batch"]) -> Float[Tensor, ""]:
    """TUBA: the unnormalised Barber-Agakov bound, with a baseline for each x.

    Args:
        scores: (B, B).
        log_baseline: (B,), ln a(x_i); 1 gives NWJ.

    Raises:
        InputError: as `donsker_varadhan`, and for a baseline of another length.

    Example:
        >>> tuba(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2))
        tensor(0.6321)

    Reference: Poole et al., On Variational Bounds of Mutual Information, ICML 2019.
    """
    check_tensors(log_baseline=log_baseline)
    scores = _check(scores)
    fits = log_baseline.shape == scores.shape[:1] and log_baseline.is_floating_point()
    if not fits:
        raise InputError(
            f"log_baseline is {log_baseline.dtype} {tuple(log_baseline.shape)} and scores have the "
            f"shape {tuple(scores.shape)}; expected one number for each row, in floating point."
        )
    return nwj(scores - at_least_single(log_baseline)[:, None] + 1)


def infonce(scores: Scores) -> Float[Tensor, ""]:
    """InfoNCE: which of B partners is the right one. Little variance, and never above ln B.

    Raises:
        InputError: as `donsker_varadhan`.

    Example:
        >>> infonce(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))  # ln 2 = 0.6931
        tensor(0.6930)

    Reference: van den Oord, Li, Vinyals, Contrastive Predictive Coding, 2018.
    """
    scores = _check(scores)
    return math.log(len(scores)) + (scores.diagonal() - scores.logsumexp(1)).mean()


def jensen_shannon_bound(scores: Scores) -> Float[Tensor, ""]:
    """J: tells pairs that belong together from others; at its best f is the log density ratio.

    It bounds a Jensen-Shannon divergence, and is no estimate of information.

    Raises:
        InputError: as `donsker_varadhan`.

    Example:
        >>> jensen_shannon_bound(torch.zeros(2, 2))  # -2 ln 2
        tensor(-1.3863)

    Reference: Nowozin, Cseke, Tomioka, f-GAN, NeurIPS 2016.
    """
    scores = _check(scores)
    together = F.softplus(-scores.diagonal()).mean()
    return -together - _apart(F.softplus(scores)).mean()


def jensen_shannon(scores: Scores) -> Float[Tensor, ""]:
    """JS: the value of NWJ, the gradient of `jensen_shannon_bound`.

    The bound finds f = the log ratio, and NWJ is tight at 1 + the log ratio: so its value is that of
    1 + f, as in the paper. The code of SMILE takes NWJ of f itself, which is 1/e less at that f.

    Raises:
        InputError: as `donsker_varadhan`.

    Example:
        >>> jensen_shannon(torch.zeros(2, 2))
        tensor(0.)

    Reference: Poole et al., On Variational Bounds of Mutual Information, ICML 2019.
    """
    return _shown(nwj(_check(scores) + 1), jensen_shannon_bound(scores))


def smile_bound(scores: Scores, *, clip: float = 5.0) -> Float[Tensor, ""]:
    """SMILE: DV with a clipped density ratio for its value, the gradient of `jensen_shannon_bound`.

    Args:
        scores: (B, B).
        clip: tau, log ratios beyond which count as this; the paper has 1, 5 and infinity.

    Raises:
        InputError: as `donsker_varadhan`.
        OptionError: for a negative clip.

    Example:
        >>> smile_bound(torch.tensor([[9.0, 9.0], [9.0, 9.0]]), clip=5.0)
        tensor(4.)

    Reference: Song, Ermon, Understanding the Limitations of Variational Mutual Information
        Estimators, ICLR 2020.
    """
    if clip != math.inf:
        in_range(0, clip=clip)
    scores = _check(scores)
    if clip != math.inf:
        clip = min(clip, torch.finfo(scores.dtype).max)
    value = scores.diagonal().mean() - _log_mean_exp_apart(scores.clamp(-clip, clip))
    return _shown(value, jensen_shannon_bound(scores))


def _shown(value: Tensor, trained: Tensor) -> Tensor:
    return trained + (value - trained).detach()


def _apart(values: Tensor) -> Tensor:
    """The B (B - 1) entries off the diagonal: all but every (B + 1)-th, in reading order."""
    b = len(values)
    return values.reshape(-1)[1:].reshape(b - 1, b + 1)[:, :-1].reshape(-1)


def _log_mean_exp_apart(scores: Tensor) -> Tensor:
    apart = _apart(scores)
    return torch.logsumexp(apart, 0) - math.log(len(apart))


def _check(scores: Tensor) -> Tensor:
    check_tensors(scores=scores)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise InputError(
            f"scores have the shape {tuple(scores.shape)}; expected (B, B) with B at least 2: "
            "those of every x of a batch with every y."
        )
    if not scores.is_floating_point():
        raise InputError(f"scores are {scores.dtype}; expected floating point numbers of a critic.")
    return at_least_single(scores)
