"""Pairs of variables whose mutual information is known: what an estimator is tried on."""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from typing import NamedTuple

import torch
from torch import Tensor

from testtime._core.errors import OptionError
from testtime._core.options import in_range, whole
from testtime._core.seeds import check_generator


class Pairs(NamedTuple):
    """Samples (n, d) of x and of y in float64, and their mutual information in nats."""

    x: Tensor
    y: Tensor
    truth: float


def gaussian(n: int, *, dims: int, information: float, generator: torch.Generator) -> Pairs:
    """x standard normal, y = rho x + sqrt(1 - rho^2) e in each coordinate.

        I = -(d / 2) ln(1 - rho^2)

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> gaussian(3, dims=2, information=1.0, generator=torch.Generator()).truth
        1.0
    """
    whole(1, n=n, dims=dims)
    in_range(0, information=information)
    x, noise = (_normal(n, dims, generator) for _ in range(2))
    left = math.exp(-2 * information / dims)  # 1 - rho^2
    return Pairs(x, math.sqrt(1 - left) * x + math.sqrt(left) * noise, information)


def cubed(n: int, *, dims: int, information: float, generator: torch.Generator) -> Pairs:
    """`gaussian` with y^3 for y: heavy tails, the same information.

    Example:
        >>> cubed(3, dims=2, information=1.0, generator=torch.Generator()).truth
        1.0
    """
    x, y, truth = gaussian(n, dims=dims, information=information, generator=generator)
    return Pairs(x, y**3, truth)


def uniform(n: int, *, dims: int, noise: float, generator: torch.Generator) -> Pairs:
    """x uniform on [0, 1], y = x + uniform noise on [-e, e], in each coordinate.

        I = d (e - ln 2e)  for e up to 1/2,   d / 4e  above

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> uniform(3, dims=2, noise=0.5, generator=torch.Generator()).truth
        1.0

    Reference: Czyz et al., Beyond Normal, NeurIPS 2023.
    """
    whole(1, n=n, dims=dims)
    in_range(0, noise=noise)
    if noise == 0:
        raise OptionError("noise is 0; expected more, as the information is infinite without it")
    check_generator(generator)
    x, e = (
        torch.rand(n, dims, generator=generator, dtype=torch.float64, device="cpu")
        for _ in range(2)
    )
    each = noise - math.log(2 * noise) if noise <= 0.5 else 1 / (4 * noise)
    return Pairs(x, x + noise * (2 * e - 1), dims * each)


def student(
    n: int, *, dims: int, information: float, freedom: int, generator: torch.Generator
) -> Pairs:
    """`gaussian`, all coordinates of a sample divided by one root of chi-squared / freedom.

        I = I_gauss + c(v) + c(v + 2d) - 2 c(v + d),   c(t) = ln Gamma(t / 2) - t / 2 psi(t / 2)

    The common factor makes x and y depend on each other even where `information` is 0.

    Args:
        n: samples.
        dims: coordinates d of x and of y.
        information: of the Gaussian.
        freedom: v, the degrees of freedom; few are heavy tails.
        generator: of the samples.

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> round(student(3, dims=1, information=0.0, freedom=2, generator=torch.Generator()).truth, 4)
        0.0827

    Reference: Arellano-Valle et al., Shannon Entropy and Mutual Information for Multivariate
        Skew-Elliptical Distributions, 2013.
    """
    whole(1, freedom=freedom)
    x, y, truth = gaussian(n, dims=dims, information=information, generator=generator)
    scale = _normal(n, freedom, generator).square().mean(1, keepdim=True).sqrt()

    def c(t: float) -> float:
        half = torch.tensor(t / 2, dtype=torch.float64, device="cpu")
        return float(half.lgamma() - half * half.digamma())

    extra = c(freedom) + c(freedom + 2 * dims) - 2 * c(freedom + dims)
    return Pairs(x / scale, y / scale, truth + extra)


CENTRES = torch.tensor(
    [[-3.0, 1.0], [-1.0, -3.0], [1.0, 3.0], [3.0, -1.0]], dtype=torch.float64, device="cpu"
)
WIDTH = 0.7


def multimodal(n: int, *, dims: int, generator: torch.Generator) -> Pairs:
    """Four round modes of (x, y), of width 0.7 and 2 apart, in each coordinate.

    The truth, 0.82 nats a coordinate, is a quadrature.

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> round(multimodal(3, dims=1, generator=torch.Generator()).truth, 4)
        0.8248
    """
    whole(1, n=n, dims=dims)
    check_generator(generator)
    mode = torch.randint(len(CENTRES), (n, dims), generator=generator, device="cpu")
    noise = torch.stack([_normal(n, dims, generator) for _ in range(2)], -1)
    x, y = (CENTRES[mode] + WIDTH * noise).unbind(-1)
    return Pairs(x, y, dims * _multimodal_information())


def _multimodal_information() -> float:
    """By the trapezoidal rule, which for smooth densities is exact to rounding."""
    grid = torch.linspace(-9, 9, 601, dtype=torch.float64, device="cpu")
    step = float(grid[1] - grid[0])
    bells = (-((grid - CENTRES[..., None]) ** 2) / (2 * WIDTH**2)).exp()
    bells = bells / (WIDTH * math.sqrt(2 * math.pi))  # (modes, 2, grid)
    joint = torch.einsum("mi,mj->ij", bells[:, 0], bells[:, 1]) / len(CENTRES)
    p, q = bells.mean(0)
    ratio = (joint / (p[:, None] * q)).clamp(min=1e-300)
    return float((joint * ratio.log()).sum()) * step**2


def _normal(n: int, dims: int, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    return torch.randn(n, dims, generator=generator, dtype=torch.float64, device="cpu")
