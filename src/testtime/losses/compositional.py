"""Maximum likelihood of unnormalised models, without samples of the model: MECO, beside NCE.

    p(x) = exp(-E(x)) / Z,   Z = g = E_{z ~ q} w(z),   w(z) = exp(-E(z)) / q(z)
    for each step, with a batch x of data and a batch Z of noise:
        u <- (1 - b) u + b g(theta; Z)                          moving average, or
        u <- g(theta; Z) + (1 - b) (u - g(theta_before; Z))     STORM: the same Z at both
        step along  mean grad E(x) + grad g(theta; Z) / u       u is no function of theta here

All is kept as logarithms. The variance is that of w under q: the noise must cover the data.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

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
        InputError: shapes that differ, or no sample.

    Example:
        >>> z = torch.linspace(-6, 6, 4001)
        >>> round(float(log_partition(z.square() / 2, torch.full_like(z, -math.log(12)))), 3)
        0.919

    Reference: Jiang et al., Learning Unnormalized Statistical Models via Compositional
        Optimization, ICML 2023.
    """
    _check("energies", energies)
    if energies.shape != log_noise.shape:
        raise InputError(
            f"energies are of shape {tuple(energies.shape)}, log_noise of {tuple(log_noise.shape)}; "
            "expected one of each for every noise sample."
        )
    return torch.logsumexp(-energies - log_noise, 0) - math.log(len(energies))


def moving_average(log_u: Scalar | None, log_g: Scalar, *, rate: float = 0.1) -> Scalar:
    """ln u after a batch: (1 - b) u + b g; the first batch's g where there is no u yet.

    Args:
        log_u: of the batches before, or None.
        log_g: of this batch, `log_partition`.
        rate: b; 0.1, of the small check (the paper's is not known).

    Example:
        >>> moving_average(torch.tensor(0.0), torch.tensor(math.log(3.0)), rate=0.5).exp()
        tensor(2.)

    Reference: Jiang et al., ICML 2023.
    """
    in_range(0, 1, rate=rate)
    new = log_g.detach()
    if log_u is None:
        return new
    parts = [log_u.detach() + _log(1 - rate), new + _log(rate)]
    return torch.logsumexp(torch.stack(parts), 0)


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

    Example:
        >>> one, two, three = (torch.tensor(math.log(v)) for v in (1.0, 2.0, 3.0))
        >>> storm(two, three, one, rate=0.5).exp()  # 3 + 0.5 (2 - 1)
        tensor(3.5000)

    Reference: Jiang et al., ICML 2023; Cutkosky, Orabona, STORM, NeurIPS 2019.
    """
    in_range(0, 1, rate=rate)
    new = log_g.detach()
    if log_u is None:
        return new
    top = torch.stack([new, log_u.detach(), log_g_before.detach()]).max()
    scaled = [value.detach().sub(top).exp() for value in (new, log_u, log_g_before)]
    total = scaled[0] + (1 - rate) * (scaled[1] - scaled[2])
    return torch.where(total > 0, total.clamp(min=1e-30).log() + top, new)


def compositional_likelihood(energies: Energies, log_g: Scalar, log_u: Scalar) -> Scalar:
    """What to descend: its value is the negative log-likelihood, its gradient that of MECO.

        mean E(x) + ln u   with the gradient   mean grad E(x) + grad g / u

    Args:
        energies: (n,) E of the data.
        log_g: `log_partition` of this batch of noise.
        log_u: the tracked ln u, updated with this batch.

    Raises:
        InputError: no energies (n,).

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
    share = torch.exp(log_g - log_u.detach())  # g / u
    return energies.mean() + log_u.detach() + share - share.detach()


def noise_contrastive(
    data: tuple[Energies, Energies], noise: tuple[Energies, Energies], log_z: Scalar
) -> Scalar:
    """NCE: the logistic loss of telling data from as many noise samples; ln Z is a parameter.

    Args:
        data: E and ln q of data (n,).
        noise: E and ln q of noise (m,).
        log_z: the logarithm of the partition function, learnt beside the energy.

    Raises:
        InputError: energies that are not (n,), or shapes that differ.

    Example:
        >>> zeros = torch.zeros(4)
        >>> noise_contrastive((zeros, zeros), (zeros, zeros), torch.tensor(0.0))
        tensor(1.3863)

    Reference: Gutmann, Hyvärinen, Noise-Contrastive Estimation, AISTATS 2010.
    """
    scores: list[Tensor] = []
    for name, (energies, log_noise) in (("data", data), ("noise", noise)):
        _check(name, energies)
        if energies.shape != log_noise.shape:
            raise InputError(
                f"{name}: {tuple(energies.shape)} energies, {tuple(log_noise.shape)} ln q"
            )
        scores.append(-energies - log_z - log_noise)
    return F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()


def _check(name: str, energies: Tensor) -> None:
    if energies.dim() != 1 or not len(energies) or not energies.is_floating_point():
        raise InputError(
            f"{name} is of shape {tuple(energies.shape)} and type {energies.dtype}; expected one "
            "energy for each sample (n,)."
        )


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
