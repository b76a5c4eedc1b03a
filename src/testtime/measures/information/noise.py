"""The diffusion of MINDE's estimators: how much noise there is when, and the times that are drawn.

    z_t = m(t) z_0 + s(t) eps,   m = e^(-B/2),  s^2 = 1 - e^(-B),  B(t) = b0 t + (b1 - b0) t^2 / 2
    t ~ r(t) / Z,   r = beta / s^2 held at r(0.001) below 0.001,   Z = integral of r;
        or, without importance sampling, t ~ U(0.00001, 1)
    | eps - eps' |^2 of two predictions counts Z, or beta(t) / s^2 without importance sampling

Reference: Franzese, Bounoua, Michiardi, MINDE: Mutual Information Neural Diffusion Estimation, ICLR 2024.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime._core.seeds import check_generator

LOW, HIGH = 0.1, 20.0
"""b0 and b1 (code)."""
HELD = 1e-3
"""The time below which the rate is held (code)."""
EARLIEST = 1e-5
"""The earliest of uniform times (code)."""


def signal_and_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """m(t) and s(t): how much is left of a sample, and how much noise there is.

    Example:
        >>> m, s = signal_and_noise(torch.tensor([0.0, 1.0]))
        >>> m[0], s[0]
        (tensor(1.), tensor(0.))
    """
    b = LOW * t + (HIGH - LOW) * t**2 / 2
    return (-b / 2).exp(), (-torch.expm1(-b)).sqrt()


def rate_integral() -> float:
    """Z, the integral of r = beta / s^2 from 0 to 1.

    Example:
        >>> round(rate_integral(), 2)
        20.26
    """
    return HELD * _held_rate() + _log_growth(1.0) - _log_growth(HELD)


def sampled_times(n: int, generator: torch.Generator, *, importance: bool = True) -> Tensor:
    """Times of density r / Z, by the inverse of its distribution function; or uniform ones.

    Args:
        n: of times.
        generator: on the CPU.
        importance: False: uniform from 0.00001 to 1.

    Example:
        >>> bool((sampled_times(9, torch.Generator().manual_seed(0)) <= 1).all())
        True
    """
    whole(0, n=n)
    check_generator(generator)
    v = torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
    if not importance:
        return EARLIEST + (1 - EARLIEST) * v
    v = rate_integral() * v
    start = HELD * _held_rate()
    b = F.softplus(v - start + _log_growth(HELD))  # ln(e^B - 1) = G
    late = ((LOW**2 + 2 * (HIGH - LOW) * b).sqrt() - LOW) / (HIGH - LOW)
    return torch.where(v < start, v / _held_rate(), late)


def check_samples(samples: Tensor, name: str) -> None:
    """Refuses what is no finite (n, d) in floating point.

    Example:
        >>> check_samples(torch.ones(3), "x")
        Traceback (most recent call last):
        testtime._core.errors.InputError: x is torch.float32 of the shape (3,); expected finite ...
    """
    check_tensors(**{name: samples})
    floating = samples.ndim == 2 and samples.is_floating_point()
    if not floating or not bool(samples.isfinite().all()):
        raise InputError(
            f"{name} is {samples.dtype} of the shape {tuple(samples.shape)}; expected finite samples "
            "(n, d) in floating point. Give one coordinate as x[:, None]."
        )


def time_weight(t: Tensor, *, importance: bool) -> Tensor:
    """What the squared difference of two predictions counts at each of the drawn times.

    Example:
        >>> time_weight(torch.tensor([0.5, 1.0]), importance=False)
        tensor([10.9128, 20.0009])
    """
    return torch.full_like(t, rate_integral()) if importance else _rate(t)


def diffused(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t of samples (n, d) with this noise, at times (n,).

    Example:
        >>> diffused(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1))
        tensor([[1., 1.]])
    """
    check_tensors(clean=clean, noise=noise, t=t)
    if clean.ndim != 2 or noise.shape != clean.shape or t.shape != clean.shape[:1]:
        raise InputError(
            f"samples are {tuple(clean.shape)}, noise {tuple(noise.shape)} and times "
            f"{tuple(t.shape)}; expected (n, d), (n, d) and (n,)."
        )
    m, s = signal_and_noise(t)
    return m[:, None] * clean + s[:, None] * noise


def normal_like(like: Tensor, random: torch.Generator) -> Tensor:
    """Noise of a tensor's shape and type, drawn on the CPU.

    Example:
        >>> normal_like(torch.ones(3, 2), torch.Generator()).shape
        torch.Size([3, 2])
    """
    return torch.randn(like.shape, generator=random, dtype=like.dtype, device="cpu").to(like.device)


def _log_growth(t: float) -> float:
    """ln(e^B - 1), whose derivative is beta / s^2."""
    return math.log(math.expm1(LOW * t + (HIGH - LOW) * t**2 / 2))


def _rate(t: Tensor) -> Tensor:
    """beta / s^2, not held."""
    return (LOW + t * (HIGH - LOW)) / signal_and_noise(t)[1].square()


def _held_rate() -> float:
    return float(_rate(torch.tensor(HELD, dtype=torch.float64, device="cpu")))
