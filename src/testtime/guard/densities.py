"""Densities that give their score, the gradient of their logarithm, and samples of themselves.

The j-th entry of the score of p(x) is that of the conditional p(x_j | all others), so that one
gradient speaks about all conditionals at once.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError

RIDGE = 1e-5
"""Added to the diagonal of a covariance, so that constant and collinear features are no obstacle."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A Gaussian with the mean and the covariance of the samples, plus 1e-5 on the diagonal.

    Attributes:
        mean: (..., 1, d).
        covariance: (..., d, d).

    Example:
        >>> density = Gaussian.fit(torch.tensor([[0.0], [2.0]]).double())
        >>> density.score(torch.tensor([[2.0]]).double())
        tensor([[-0.5000]], dtype=torch.float64)
    """

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def fit(x: Tensor) -> "Gaussian":
        """Of samples (..., n, d), n at least 2; d may be larger than n. Half precision as float32.

        Raises:
            InputError: fewer samples, or numbers that are not finite or not floating point.
        """
        check_tensors(x=x)
        small = x.dim() < 2 or x.shape[-2] < 2 or x.numel() == 0
        if small or not x.is_floating_point() or not bool(x.isfinite().all()):
            raise InputError(
                f"samples are {x.dtype} of the shape {tuple(x.shape)}, or hold NaN or infinity; "
                "expected finite floating point numbers (..., n, d), n at least 2."
            )
        x = at_least_single(x)
        mean = x.mean(-2, keepdim=True)
        away = x - mean
        covariance = away.mT @ away / (x.shape[-2] - 1)
        if not bool(covariance.isfinite().all()):
            raise InputError("squares of the samples overflow; divide the features by a constant.")
        return Gaussian(
            mean, covariance + RIDGE * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        )

    def score(self, x: Tensor) -> Tensor:
        """-Σ⁻¹ (x - μ)."""
        return -torch.linalg.solve(self.covariance, (x - self.mean).mT).mT

    def sample(self, count: int, chance: torch.Generator) -> Tensor:
        """Draws (..., count, d).

        Raises:
            InputError: the covariance is singular in this precision.
        """
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        if bool(failed.any()) or not bool(factor.isfinite().all()):
            raise InputError(
                "the covariance of the samples is singular in their precision: features that differ "
                f"by {RIDGE:g} cannot be told apart. Standardise the features, or give more samples."
            )
        shape = (*self.covariance.shape[:-2], count, self.covariance.shape[-1])
        like = self.mean
        noise = torch.randn(shape, generator=chance, dtype=like.dtype, device=chance.device)
        return self.mean + noise.to(like.device) @ factor.mT

    def conditionals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means (n, d) and standard deviations (d,) of each feature given all the others."""
        precision = torch.linalg.inv(self.covariance)
        scale = precision.diagonal(dim1=-2, dim2=-1)
        return x + self.score(x) / scale, scale.rsqrt()


@dataclass(frozen=True, eq=False)
class _Layer:
    rotation: Tensor  # (d, d), columns are principal axes
    mean: Tensor
    std: Tensor
    heights: Tensor  # (d, bins), density of the histogram on [0, 1]

    @property
    def edges(self) -> Tensor:
        """Distribution function at the left edge of each bin: (d, bins)."""
        return (self.heights.cumsum(1) - self.heights) / self.heights.shape[1]


@dataclass(frozen=True, eq=False)
class DeepDensity:
    """A deep density: layers that turn samples to their principal axes and each axis to a normal.

    Each layer is a rotation by PCA and, for every coordinate, the distribution function of a normal
    with its mean and deviation, that of a histogram of ten bins with one count added to each, and
    the inverse of the standard normal's. What leaves the last layer is taken for standard normal.

    Example:
        >>> chance = torch.Generator().manual_seed(0)
        >>> x = torch.rand(2000, 1, generator=chance, dtype=torch.float64)
        >>> density = DeepDensity.fit(x)
        >>> density.log_prob(torch.tensor([[0.5], [3.0]]).double()).exp().round(decimals=1)
        tensor([1., 0.], dtype=torch.float64)

    Reference: Inouye, Ravikumar, Deep Density Destructors, ICML 2018.
    """

    layers: tuple[_Layer, ...]

    @staticmethod
    def fit(x: Tensor, *, layers: int = 2, bins: int = 10) -> "DeepDensity":
        """Of samples (n, d), n at least 2."""
        made: list[_Layer] = []
        with torch.inference_mode(False):
            x = at_least_single(x.clone())
            for _ in range(layers):
                rotation = torch.linalg.eigh(Gaussian.fit(x).covariance).eigenvectors
                z = x @ rotation
                mean, std = z.mean(0), (z.var(0) + RIDGE).sqrt()
                place = (_cdf((z - mean) / std) * bins).long().clamp(max=bins - 1)
                counts = torch.nn.functional.one_hot(place, bins).sum(0).to(x) + 1
                made.append(
                    _Layer(rotation, mean, std, bins * counts / counts.sum(1, keepdim=True))
                )
                x, _ = _through(made[-1], x)
        return DeepDensity(tuple(made))

    def log_prob(self, x: Tensor) -> Tensor:
        """Natural logarithm of the density at (n, d)."""
        x = at_least_single(x)
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, gain = _through(layer, x)
            total = total + gain
        return total + _log_normal(x).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log density by autograd."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(self.log_prob(x).sum(), x)[0]

    def sample(self, count: int, chance: torch.Generator) -> Tensor:
        """Standard normal draws, sent back through the layers."""
        like = self.layers[0].mean
        shape = (count, like.numel())
        x = torch.randn(shape, generator=chance, dtype=like.dtype, device=chance.device).to(
            like.device
        )
        for layer in reversed(self.layers):
            u = _cdf(x).T.contiguous()
            bins = layer.heights.shape[1]
            place = torch.searchsorted(layer.edges, u, right=True) - 1
            inside = (u - layer.edges.gather(1, place)) / layer.heights.gather(1, place)
            z = layer.mean + layer.std * _quantile((place.to(u) / bins + inside).T)
            x = z @ layer.rotation.T
        return x


def _through(layer: _Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output, and the logarithm of the determinant of its derivative."""
    z = (x @ layer.rotation - layer.mean) / layer.std
    u, bins = _cdf(z), layer.heights.shape[1]
    place = (u.detach() * bins).long().clamp(max=bins - 1).T
    height = layer.heights.gather(1, place).T
    out = _quantile(layer.edges.gather(1, place).T + height * (u - place.T.to(u) / bins))
    gain = _log_normal(z) - layer.std.log() + height.log() - _log_normal(out)
    return out, gain.sum(1)


def _cdf(z: Tensor) -> Tensor:
    return (0.5 * (1 + torch.erf(z / math.sqrt(2)))).clamp(1e-9, 1 - 1e-9)


def _quantile(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-9, 1 - 1e-9) - 1)


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi))
