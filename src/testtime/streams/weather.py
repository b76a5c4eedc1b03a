"""Weather: snow, frost and fog."""

import torch
from torch import Tensor

from testtime.streams.filters import clipped_zoom, gaussian_filter, streak
from testtime.streams.light import luma, paint
from testtime.streams.noise import normal, uniform
from testtime.streams.severity import Images, constants, is_small, stretch

FROST_TINT = (0.89, 1.02, 1.09)
"""Colour of frost: the mean of the original photographs, over their grey value."""


def snow(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Flakes that fall in a direction drawn per image, over a picture turned pale.

    Normal noise (mean, std) is enlarged to flakes, cut below a threshold, and blurred by motion
    (radius, sigma) between -135 and -45 degrees; it is added, and once more upside down, to
    b x + (1 - b) max(x, 1.5 grey + 0.5).
    """
    large = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )
    small = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )
    mean, std, flake, cut, radius, sigma, kept = constants(
        images, severity, large=large, small=small
    )
    longer = stretch(images)
    batch, _, height, width = images.shape
    layer = mean + std * normal((batch, 1, height, width), like=images, generator=generator)
    layer = clipped_zoom(layer, flake * longer)
    layer = layer.masked_fill(layer < cut, 0).clamp_(0, 1)
    angles = uniform((batch,), -135, -45, like=images, generator=generator)
    layer = streak(layer, angles, radius=radius * longer, sigma=sigma * longer)
    pale = torch.maximum(images, 1.5 * luma(images) + 0.5)
    return kept * images + (1 - kept) * pale + layer + layer.rot90(2, dims=(2, 3))


def frost(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Lays frost over the picture: a x + b frost.

    The original crops photographs of frosted windows. There are none here: `crystals` draws a
    texture with their brightness, contrast, colour and length of needles, but not their shapes.
    """
    large = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))
    small = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    kept, added = constants(images, severity, large=large, small=small)
    return kept * images + added * crystals(images, generator) * paint(images, FROST_TINT)


def crystals(images: Images, generator: torch.Generator, *, directions: int = 3) -> Tensor:
    """A grey texture of needles (batch, 1, height, width), for each image another.

    White noise is smeared along a few directions per image (in the frequency domain), ridges of it
    are the needles, and in each place the direction prevails that a coarse noise prefers. Mean and
    deviation are drawn from the range that the original photographs have: 0.47 to 0.82 and 0.06 to
    0.17. Needles are a fifth as long below 64 pixels, where the original shrinks its photographs
    to a fifth.
    """
    batch, _, height, width = images.shape
    unit = 0.2 * stretch(images) if is_small(images) else 1.0
    shape = (batch, directions, height, width)
    noise = torch.fft.rfft2(normal((batch, 1, height, width), like=images, generator=generator))
    turn = uniform((batch, directions, 1, 1), 0, torch.pi, like=images, generator=generator)
    fy = torch.fft.fftfreq(height, device=images.device, dtype=images.dtype)[:, None]
    fx = torch.fft.rfftfreq(width, device=images.device, dtype=images.dtype)
    along, across = fx * turn.cos() + fy * turn.sin(), fy * turn.cos() - fx * turn.sin()
    spread = (2 * torch.pi * unit) ** 2 / 2 * ((12 * along).square() + (1.5 * across).square())
    smeared = torch.fft.irfft2(noise * torch.exp(-spread), s=(height, width))
    needles = torch.exp(-3 * standardised(smeared).abs())
    place = normal(shape, like=images, generator=generator)
    place = standardised(gaussian_filter(place, 12 * unit, border="reflect"))
    texture = (needles * (3 * place).softmax(dim=1)).sum(dim=1, keepdim=True)
    texture = standardised(texture + 0.1 * place[:, :1])
    mean = uniform((batch, 1, 1, 1), 0.47, 0.82, like=images, generator=generator)
    std = uniform((batch, 1, 1, 1), 0.06, 0.17, like=images, generator=generator)
    return (mean + std * texture).clamp_(0, 1)


def standardised(maps: Tensor) -> Tensor:
    """The same maps with mean 0 and deviation 1 each; constant ones become 0."""
    maps = maps - maps.mean(dim=(2, 3), keepdim=True)
    return maps / maps.square().mean(dim=(2, 3), keepdim=True).sqrt().add(1e-6)


def fog(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Adds a cloud of thickness c, and keeps the brightest value m: (x + c cloud) m / (m + c)."""
    large = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))
    small = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))
    thickness, decay = constants(images, severity, large=large, small=small)
    batch, _, height, width = images.shape
    size = 1 << max((max(height, width) - 1).bit_length(), 1)
    cloud = plasma(batch, size, decay=decay, like=images, generator=generator)
    brightest = images.amax(dim=(1, 2, 3), keepdim=True)
    thick = images + thickness * cloud[:, None, :height, :width]
    return thick * brightest / (brightest + thickness)


def plasma(
    batch: int, size: int, *, decay: float, like: Tensor, generator: torch.Generator
) -> Tensor:
    """Height maps (batch, size, size) in [0, 1] by the diamond-square algorithm on a torus.

    From coarse to fine, the middle of each square, then of each diamond, becomes the mean of its
    four corners plus U[-w², w²], and w shrinks by `decay`. The size is a power of two.
    """
    height = like.new_zeros(batch, size, size)
    step, wobble = size, 100.0

    def middle(corners: Tensor) -> Tensor:
        reach = wobble * wobble
        return corners / 4 + uniform(corners.shape, -reach, reach, like=like, generator=generator)

    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        pairs = corner + corner.roll(-1, 1)
        height[:, half::step, half::step] = middle(pairs + pairs.roll(-1, 2))
        centre = height[:, half::step, half::step]
        beside, above = corner + corner.roll(-1, 2), corner + corner.roll(-1, 1)
        height[:, ::step, half::step] = middle(centre + centre.roll(1, 1) + beside)
        height[:, half::step, ::step] = middle(centre + centre.roll(1, 2) + above)
        step, wobble = half, wobble / decay
    height = height - height.amin(dim=(1, 2), keepdim=True)
    return height / height.amax(dim=(1, 2), keepdim=True)
