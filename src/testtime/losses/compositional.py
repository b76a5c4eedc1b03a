"""Maximum likelihood of unnormalised models, without samples of the model: MECO, beside NCE.

    p(x) = exp(-E(x)) / Z,   Z = g = E_{z ~ q} w(z),   w(z) = exp(-E(z)) / q(z)
    for each step, with a batch x of data and a batch Z of noise:
        u <- (1 - b) u + b g(theta; Z)                          moving average, or
        u <- g(theta; Z) + (1 - b) (u - g(theta_before; Z))     STORM: the same Z at both
        step along  mean grad E(x) + grad g(theta; Z) / u       u is no function of theta here

All is kept as logarithms, in float32 at least. The variance is that of w under q: the noise must
cover the data. An infinite energy is a density of 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import as_given, at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range

Energies = Float[Tensor, "samples"]
Scalar = Float[Tensor, ""]


def log_partition(energies: Energies, log_noise: Energies) -> Scalar:
    """ln g: the logarithm of the partition function, by importance from noise.

    Args:
        energies: (n,) E of the noise samples.
        log_noise: (n,) ln q of the same samples.

    Raises:
        InputError: shapes that differ, no sample, NaN, or a sum that is 0 or not finite: noise that
            the model gives no density, or ln q that is not finite.

    Example:
        >>> z = torch.linspace(-6, 6, 4001)
        >>> round(float(log_partition(z.square() / 2, torch.full_like(z, -math.log(12)))), 3)
        0.919

    Reference: Jiang et al., Learning Unnormalized Statistical Models via Compositional
        Optimization, ICML 2023.
    """
    _check("energies", energies)
    check_tensors(log_noise=log_noise)
    if energies.shape != log_noise.shape:
        raise InputError(
            f"energies are of shape {tuple(energies.shape)}, log_noise of {tuple(log_noise.shape)}; "
            "expected one of each for every noise sample."
        )
    _check("log_noise", log_noise)
    weights = -at_least_single(energies) - at_least_single(log_noise)
    found = torch.logsumexp(weights, 0) - math.log(len(energies))
    if not bool(found.isfinite() & log_noise.isfinite().all()):
        raise InputError(
            f"ln g is {float(found.detach()):.4g}, of energies from {float(energies.detach().min()):.4g} "
            f"to {float(energies.detach().max()):.4g}; expected noise that has a density, under the "
            "model and under its own law."
        )
    return found


def moving_average(log_u: Scalar | None, log_g: Scalar, *, rate: float = 0.1) -> Scalar:
    """ln u after a batch: (1 - b) u + b g; the first batch's g where there is no u yet.

    Args:
        log_u: of the batches before, or None.
        log_g: of this batch, `log_partition`.
        rate: b; 0.1, of the small check (the paper's is not known).

    Raises:
        InputError: what is no single finite number.
        OptionError: a rate outside of 0 and 1.

    Example:
        >>> moving_average(torch.tensor(0.0), torch.tensor(math.log(3.0)), rate=0.5).exp()
        tensor(2.)

    Reference: Jiang et al., ICML 2023.
    """
    in_range(0, 1, rate=rate)
    new = _number("log_g", log_g)
    if log_u is None:
        return new
    parts = (_number("log_u", log_u) + _log(1 - rate), new + _log(rate))
    return torch.logaddexp(*parts)


def storm(
    log_u: Scalar | None, log_g: Scalar, log_g_before: Scalar, *, rate: float = 0.1
) -> Scalar:
    """ln u after a batch: g + (1 - b) (u - g_before), which follows a moving theta without lag.

    The sum may turn negative; then u is the batch's g.

    Args:
        log_u: of the batches before, or None.
        log_g: `log_partition` of this noise at the present parameters.
        log_g_before: of the same noise at the parameters before the last step.
        rate: b; 0.1, of the small check.

    Raises:
        InputError: what is no single finite number.
        OptionError: a rate outside of 0 and 1.

    Example:
        >>> one, two, three = (torch.tensor(math.log(v)) for v in (1.0, 2.0, 3.0))
        >>> storm(two, three, one, rate=0.5).exp()  # 3 + 0.5 (2 - 1)
        tensor(3.5000)

    Reference: Jiang et al., ICML 2023; Cutkosky, Orabona, STORM, NeurIPS 2019.
    """
    in_range(0, 1, rate=rate)
    new = _number("log_g", log_g)
    if log_u is None:
        return new
    old, before = _number("log_u", log_u), _number("log_g_before", log_g_before)
    # ln |(1 - b) (u - g_before)|
    change = torch.maximum(old, before) + (-(-(old - before).abs()).expm1()).log() + _log(1 - rate)
    if old >= before:
        return torch.logaddexp(new, change)
    return new + (-(change - new).exp()).log1p() if change < new else new


def compositional_likelihood(energies: Energies, log_g: Scalar, log_u: Scalar) -> Scalar:
    """What to descend: its value is the negative log-likelihood, its gradient that of MECO.

        mean E(x) + ln u   with the gradient   mean grad E(x) + grad g / u

    Args:
        energies: (n,) E of the data.
        log_g: `log_partition` of this batch of noise.
        log_u: the tracked ln u, updated with this batch.

    Raises:
        InputError: no energies (n,), NaN, or u that has lost g: their ratio is not finite.

    Example:
        >>> mean = torch.tensor(0.0, requires_grad=True)
        >>> z = torch.linspace(-6, 6, 4001)
        >>> log_g = log_partition((z - mean).square() / 2, torch.full_like(z, -math.log(12)))
        >>> loss = compositional_likelihood((torch.ones(8) - mean).square() / 2, log_g, log_g.detach())
        >>> round(float(loss), 3), round(float(torch.autograd.grad(loss, mean)[0]), 3)
        (1.419, -1.0)

    Reference: Jiang et al., ICML 2023.
    """
    _check("energies", energies)
    check_tensors(log_g=log_g)
    if log_g.dim() or log_g.is_complex():
        raise InputError(
            f"log_g is {log_g.dtype} of shape {tuple(log_g.shape)}; expected one real number, ()."
        )
    tracked = _number("log_u", log_u)
    share = torch.exp(at_least_single(log_g) - tracked)  # g / u
    if not bool(share.isfinite()):
        raise InputError(
            f"ln g is {float(log_g.detach()):.4g} and ln u {float(tracked):.4g}; expected u that was "
            "updated with this batch before."
        )
    return at_least_single(energies).mean() + tracked + share - share.detach()


def noise_contrastive(
    data: tuple[Energies, Energies], noise: tuple[Energies, Energies], log_z: Scalar
) -> Scalar:
    """NCE: the logistic loss of telling data from as many noise samples; ln Z is a parameter.

    Args:
        data: E and ln q of data (n,).
        noise: E and ln q of noise (m,).
        log_z: the logarithm of the partition function, learnt beside the energy.

    Raises:
        InputError: energies that are not (n,), shapes that differ, NaN, a sample that has no density
            under either law, or more than one ln Z.

    Example:
        >>> zeros = torch.zeros(4)
        >>> noise_contrastive((zeros, zeros), (zeros, zeros), torch.tensor(0.0))
        tensor(1.3863)

    Reference: Gutmann, Hyvärinen, Noise-Contrastive Estimation, AISTATS 2010.
    """
    if not isinstance(log_z, Tensor | float | int):
        check_tensors(log_z=log_z)
    if isinstance(log_z, Tensor) and (
        log_z.numel() != 1 or log_z.is_complex() or log_z.dtype == torch.bool
    ):
        raise InputError(
            f"log_z is {log_z.dtype} of shape {tuple(log_z.shape)}; expected one real number, ()."
        )
    scores: list[Tensor] = []
    for name, pair in (("data", data), ("noise", noise)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(
                f"{name} is of type {type(pair).__name__}; expected a pair: energies (n,), ln q (n,)."
            )
        energies, log_noise = pair
        _check(name, energies)
        check_tensors(**{f"ln q of {name}": log_noise})
        if energies.shape != log_noise.shape:
            raise InputError(
                f"{name} has energies of shape {tuple(energies.shape)} and ln q of shape "
                f"{tuple(log_noise.shape)}; expected one of each for every sample."
            )
        _check(f"ln q of {name}", log_noise)
        scores.append(-at_least_single(energies) - log_z - at_least_single(log_noise))
        if bool(scores[-1].isnan().any()):
            raise InputError(
                f"{name} has a sample that neither the model nor the noise could have drawn, or ln Z "
                "is NaN."
            )
    return F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()


def _check(name: str, energies: Tensor) -> None:
    check_tensors(**{name: energies})
    if energies.dim() != 1 or not len(energies) or not energies.is_floating_point():
        raise InputError(
            f"{name} is of shape {tuple(energies.shape)} and type {energies.dtype}; expected one "
            "energy for each sample (n,)."
        )
    if bool(energies.isnan().any()):
        raise InputError(f"{name} holds NaN; expected numbers. Leave these samples out.")


def _number(name: str, value: Tensor) -> Tensor:
    """One finite number, without its graph."""
    try:
        value = as_given(value).detach()
    except Exception:  # whatever else it is
        check_tensors(**{name: value})
        raise
    if value.dim() or value.is_complex() or not bool(value.isfinite()):
        raise InputError(
            f"{name} is {value.tolist() if value.numel() < 4 else tuple(value.shape)}; expected the "
            "logarithm of one positive number, as log_partition and the trackers give it."
        )
    return at_least_single(value)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
