"""Noise: Gaussian, shot, impulse and speckle; and the two draws that all corruptions use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from testtime.streams.severity import Images, constants


def uniform(
    shape: Sequence[int],
    low: float,
    high: float,
    *,
    like: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Uniform draws on the generator's device, moved to the device and dtype of `like`."""
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return (low + (high - low) * draws).to(like.device)


def normal(shape: Sequence[int], *, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal draws on the generator's device, moved to the device and dtype of `like`."""
    draws = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return draws.to(like.device)


def signs(shape: Sequence[int], *, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of -1 or 1 with equal chance."""
    return uniform(shape, -1, 1, like=like, generator=generator).ge(0).to(like.dtype) * 2 - 1


def gaussian_noise(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Adds normal noise: x + c n."""
    large, small = (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)
    c = constants(images, severity, large=large, small=small)
    return images + c * normal(images.shape, like=images, generator=generator)


def shot_noise(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Counts photons: Poisson(c x) / c."""
    large, small = (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)
    c = constants(images, severity, large=large, small=small)
    photons = torch.poisson((images * c).to(generator.device), generator=generator)
    return photons.to(images.device) / c


def impulse_noise(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Salt and pepper: a share c of all values (each channel alone) becomes 0 or 1."""
    large, small = (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)
    c = constants(images, severity, large=large, small=small)
    chance = uniform(images.shape, 0, 1, like=images, generator=generator)
    return images.masked_fill(chance < c / 2, 0).masked_fill(chance >= 1 - c / 2, 1)


def speckle_noise(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Adds noise in proportion to the signal: x + c x n."""
    large, small = (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)
    c = constants(images, severity, large=large, small=small)
    return images + c * images * normal(images.shape, like=images, generator=generator)
