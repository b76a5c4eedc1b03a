"""The corruptions of ImageNet-C and a few more: any image size and channel count, batched, seeded.

The definitions are those of Hendrycks and Dietterich (*Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations*, ICLR 2019), with their constants:

- Images whose shorter side has 64 pixels or more get the constants of ImageNet-C.
- Smaller ones get those of CIFAR-10-C, which were set at 32 pixels. Lengths in pixels are
  multiplied by max(1, side / 32), so that 28 and 32 pixels get exactly the published lengths.
- Lengths that the originals give as a share of the image (elastic, zoom, pixelate) stay shares.
- Tiny ImageNet-C (64 pixels) was made with constants of its own, mostly milder than ImageNet-C's;
  they are not used here.

What differs from the originals, everywhere: images stay float, so the rounding to 8 bits between
two steps (at most 1/255) is left out, except where the definition needs it (JPEG, spatter).
Where colour matters, three channels are RGB; any other number of channels is treated as that many
grey images, and `saturate` leaves those as they are. What differs in one corruption stands in the
docstring of its function; the largest difference is `frost`, whose photographs of frosted windows
are replaced by a synthetic texture. Compare errors under frost between methods, not with published
ones.
"""

from collections.abc import Callable
from operator import index

import torch

from testtime._core.errors import InputError, unknown
from testtime.streams import blur, digital, geometry, light, noise, spatter, weather
from testtime.streams.severity import Images, in_range

Corruption = Callable[[Images, int, torch.Generator], Images]

_STANDARD: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": light.brightness,
    "contrast": light.contrast,
    "elastic_transform": geometry.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}
_EXTRA: dict[str, Corruption] = {
    "speckle_noise": noise.speckle_noise,
    "gaussian_blur": blur.gaussian_blur,
    "spatter": spatter.spatter,
    "saturate": light.saturate,
}
_GEOMETRIC: dict[str, Corruption] = {
    "rotation": geometry.rotation,
    "translation": geometry.translation,
    "scale": geometry.scale,
    "shear": geometry.shear,
}
_ILLUMINATION: dict[str, Corruption] = {
    "gamma": light.gamma,
    "illumination": light.illumination,
}
_FUNCTIONS = {**_STANDARD, **_EXTRA, **_GEOMETRIC, **_ILLUMINATION}

CORRUPTIONS = tuple(_STANDARD)
"""The fifteen of ImageNet-C, in its order."""

EXTRA_CORRUPTIONS = tuple(_EXTRA)
"""The four extra ones of ImageNet-C, meant for choosing hyper-parameters."""

GEOMETRIC = tuple(_GEOMETRIC)
"""Affine changes of position, with the severities of MNIST-C."""

ILLUMINATION = tuple(_ILLUMINATION)
"""Changes of light, which begin where CoTTA's augmentation ends."""

SEVERITIES = (1, 2, 3, 4, 5)
"""From hardly visible to strong."""


def corrupt(images: Images, name: str, severity: int, *, generator: torch.Generator) -> Images:
    """The same images after a corruption, each with its own chance where the original has any.

    Args:
        images: (batch, channels, height, width), float, values in [0, 1] (1e-5 beyond is taken for
            rounding), on any device.
        name: one of `CORRUPTIONS`, `EXTRA_CORRUPTIONS`, `GEOMETRIC`, `ILLUMINATION`; or "clean",
            which returns the images as they are.
        severity: 1 to 5.
        generator: where all randomness comes from. Draws are made on its device, so that a CPU
            generator gives the same corruption on every device.

    Returns:
        New images of the same shape, dtype and device, values in [0, 1]. Half precision is
        computed in float32. The same call gives the same bits; another number of threads can
        change the last one.

    Raises:
        UnknownName: no corruption has this name.
        InputError: images that are empty, not float, not 4-dimensional, not finite or beyond
            [0, 1]; a severity other than 1 to 5; no generator.

    Example:
        >>> from testtime._core.seeds import generator
        >>> grey = torch.full((2, 3, 32, 32), 0.5)
        >>> noisy = corrupt(grey, "gaussian_noise", 5, generator=generator(0, "noise"))
        >>> noisy.shape, round(float(noisy.std()), 2)
        (torch.Size([2, 3, 32, 32]), 0.1)

    Reference: Hendrycks, Dietterich, ICLR 2019; Mu, Gilmer, *MNIST-C*, 2019 (geometric ones).
    """
    if not isinstance(name, str) or (name != "clean" and name not in _FUNCTIONS):
        raise unknown("corruption", str(name), ["clean", *_FUNCTIONS])
    images = _checked(images, severity, generator)
    if name == "clean":
        return images
    wide = images.to(torch.promote_types(images.dtype, torch.float32)).contiguous()
    return _FUNCTIONS[name](wide, severity, generator).clamp_(0, 1).to(images.dtype)


def _is(value: object, whole: int) -> bool:
    """Whether something that counts, of any kind, is that whole number."""
    try:
        return index(value) == whole  # pyright: ignore[reportArgumentType]
    except TypeError:
        return False


def _checked(images: Images, severity: int, generator: torch.Generator) -> Images:
    if isinstance(severity, bool) or not any(_is(severity, each) for each in SEVERITIES):
        raise InputError(f"severity must be 1, 2, 3, 4 or 5, but is {severity!r}.")
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator must be a torch.Generator, but is {generator!r}. "
            "Make one with testtime._core.seeds.generator(seed, 'corruptions')."
        )
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or images.numel() == 0:
        given = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise InputError(
            "images must be a tensor (batch, channels, height, width) with at least one of each, "
            f"but got {given}. Put a single image in a batch with image[None]."
        )
    if images.layout is not torch.strided:
        raise InputError(f"images must be dense, but are {images.layout}. Pass images.to_dense().")
    if not images.is_floating_point():
        raise InputError(
            f"images must be float with values in [0, 1], but are {images.dtype}. "
            "For bytes, pass images.float() / 255."
        )
    if (settled := in_range(images)) is None:
        low, high = (float(v) for v in images.aminmax())
        raise InputError(
            f"images must have finite values in [0, 1], but they go from {low:g} to {high:g}. "
            "Corrupt images before they are normalised."
        )
    return settled
