"""Blurs: defocus, glass, motion, zoom and Gaussian."""

import torch
from torch import Tensor

from testtime.streams.filters import (
    clipped_zoom,
    correlate,
    filter_matrix,
    gaussian_filter,
    streak,
)
from testtime.streams.noise import uniform
from testtime.streams.severity import Images, constants, stretch


def disk(radius: float, alias_blur: float, *, like: Tensor) -> Tensor:
    """A filled disk whose edge is softened by a Gaussian of 3 (radius > 8: 5) taps; sums to 1.

    Example:
        >>> disk(1, 0.1, like=torch.zeros(1)).gt(0.01).long().tolist()
        [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """
    reach = 8 if radius <= 8 else int(radius)
    edge = 1 if radius <= 8 else 2
    grid = torch.arange(-reach, reach + 1, device=like.device, dtype=like.dtype)
    inside = (grid[:, None].square() + grid.square() <= radius**2).to(like.dtype)
    taps = torch.exp(-0.5 * (grid[reach - edge : reach + edge + 1] / alias_blur).square())
    blur = filter_matrix(taps / taps.sum(), 2 * reach + 1, "mirror")
    kernel = blur @ (inside / inside.sum()) @ blur.mT
    used = int((kernel.sum(dim=0) > 1e-9).sum()) // 2
    return kernel[reach - used : reach + used + 1, reach - used : reach + used + 1]


def defocus_blur(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Correlates with a disk (radius, softness of its edge)."""
    large = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
    small = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    radius, alias_blur = constants(images, severity, large=large, small=small)
    longer = stretch(images)
    return correlate(images, disk(radius * longer, alias_blur * longer, like=images))


def shuffled(
    batch: int, height: int, width: int, *, delta: int, rounds: int, generator: torch.Generator
) -> Tensor:
    """Which pixel of the image ends where after the swaps of glass blur: (batch, height * width).

    The published loop goes over the pixels from the last to the first and swaps each with one
    drawn from [-delta, delta) in both directions. Swaps that share no pixel commute: two whose
    columns are 2 delta apart, in any rows. So the swap in row i, column j (counted from the
    end) is made at time j + 2 delta i: all that it has to wait for comes earlier, and what happens
    at one time is done at once, for all images. The result is that of the published order, in
    O(width + 2 delta height) steps.
    """
    device = generator.device
    source = torch.arange(height * width, device=device).expand(batch, -1).clone()
    count = (height - 2 * delta, width - 2 * delta)
    if min(count) <= 0:
        return source
    row, column = (torch.arange(n, device=device) for n in count)
    time = (column + 2 * delta * row[:, None]).flatten()
    order = time.argsort(stable=True)
    waves = torch.bincount(time).tolist()
    here = ((height - delta - row[:, None]) * width + width - delta - column).flatten()[order]
    for _ in range(rounds):
        move = torch.randint(
            -delta, delta, (2, batch, len(here)), generator=generator, device=device
        )
        there = here + move[0] * width + move[1]
        for a, b in zip(here.split(waves), there.split(waves, dim=1), strict=True):
            left, right = source[:, a], source.gather(1, b)
            source[:, a] = right
            source.scatter_(1, b, left)
    return source


def glass_blur(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Gaussian blur, pixels swapped with near ones, Gaussian blur (sigma, reach, rounds).

    Pixels are swapped, as paper and comment say. The authors' loop does so on grey images only: on
    colour arrays its two assignments work on views, so that one of the two pixels is copied.
    """
    large = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    small = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    sigma, delta, rounds = constants(images, severity, large=large, small=small)
    longer = stretch(images)
    batch, channels, height, width = images.shape
    source = shuffled(
        batch, height, width, delta=round(delta * longer), rounds=rounds, generator=generator
    )
    index = source.to(images.device)[:, None].expand(-1, channels, -1)
    mixed = gaussian_filter(images, sigma * longer).flatten(2).gather(2, index)
    return gaussian_filter(mixed.view(images.shape), sigma * longer)


def motion_blur(images: Images, severity: int, generator: torch.Generator) -> Images:
    """A trail in a direction drawn from [-45°, 45°] per image (radius, sigma)."""
    large = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))
    small = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    radius, sigma = constants(images, severity, large=large, small=small)
    longer = stretch(images)
    angles = uniform(images.shape[:1], -45, 45, like=images, generator=generator)
    return streak(images, angles, radius=radius * longer, sigma=sigma * longer)


def zoom_blur(images: Images, severity: int, generator: torch.Generator) -> Images:
    """The mean of the image and of itself enlarged by 1, 1 + s, ... (step s, number of them)."""
    large = ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))
    small = ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26))
    step, count = constants(images, severity, large=large, small=small)
    step = (1 + step) - 1  # as np.arange rounds it: the size of the crop hangs on the last bit
    total = images.clone()
    for i in range(count):
        total += clipped_zoom(images, 1 + i * step)
    return total / (count + 1)


def gaussian_blur(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Gaussian blur of standard deviation c pixels."""
    large, small = (1.0, 2.0, 3.0, 4.0, 6.0), (0.4, 0.6, 0.7, 0.8, 1.0)
    sigma = constants(images, severity, large=large, small=small)
    return gaussian_filter(images, sigma * stretch(images))
