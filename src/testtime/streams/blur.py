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


def shuffled(moves: Tensor, height: int, width: int, *, delta: int) -> Tensor:
    """Which pixel each pixel shows after one round of glass blur, (batch, height * width).

    The published loop visits the pixels from last to first, leaving out a margin, and gives each
    the present value of the pixel (dy, dx) away. A pixel visited earlier already shows another
    one, so the source of p is that of p + move if that came earlier, else p + move itself. These
    chains are followed for all pixels at once by doubling (each pointer takes its target's pointer
    until none changes), which gives the result of the loop exactly.

    Args:
        moves: (2, batch, height - 2 delta, width - 2 delta), dy and dx from [-delta, delta).
        height: of the images, in pixels.
        width: of the images, in pixels.
        delta: the longest move; rows and columns delta + 1 ... size - delta are visited.
    """
    place = torch.arange(height * width, device=moves.device).view(height, width)
    inside = (slice(delta + 1, height - delta + 1), slice(delta + 1, width - delta + 1))
    target = place.expand(moves.shape[1], -1, -1).clone()
    target[:, *inside] += moves[0] * width + moves[1]
    visited = torch.zeros_like(place, dtype=torch.bool)
    visited[inside] = True
    place, target = place.flatten(), target.flatten(1)
    pointer = torch.where((target > place) & visited.flatten()[target], target, place)
    while not torch.equal(further := pointer.gather(1, pointer), pointer):
        pointer = further
    return target.gather(1, pointer)


def glass_blur(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Gaussian blur, pixels shuffled within reach, Gaussian blur (sigma, reach, rounds).

    The authors' comment speaks of swaps. Their loop, on colour arrays, works on views, so that one
    pixel of each pair is copied and the other stays; ImageNet-C and CIFAR-10-C were made that way.
    We follow them: true swaps would carry pixels far along the scan, half as strong again at 32
    pixels.
    """
    large = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))
    small = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    sigma, delta, rounds = constants(images, severity, large=large, small=small)
    delta, sigma = round(delta * stretch(images)), sigma * stretch(images)
    batch, channels, height, width = images.shape
    count = (max(height - 2 * delta, 0), max(width - 2 * delta, 0))
    mixed = gaussian_filter(images, sigma).flatten(2)
    for _ in range(rounds if all(count) else 0):
        device = generator.device
        moves = torch.randint(
            -delta, delta, (2, batch, *count), generator=generator, device=device
        ).to(images.device)
        source = shuffled(moves, height, width, delta=delta)[:, None]
        mixed = mixed.gather(2, source.expand(-1, channels, -1))
    return gaussian_filter(mixed.view(images.shape), sigma)


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
