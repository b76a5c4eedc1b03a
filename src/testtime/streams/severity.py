"""What an image is, and which constants one of its size gets: ImageNet-C's or CIFAR-10-C's."""

from collections.abc import Sequence
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "batch channels height width"]
"""Float images with values in [0, 1]."""

SMALL_BELOW = 64
"""Images whose shorter side is below this many pixels get CIFAR-10-C's constants."""

ROUNDING = 1e-5
"""How far beyond [0, 1] the rounding of a resize or a conversion may bring a value."""

T = TypeVar("T")


def in_range(images: Images) -> Images | None:
    """The same images, values that rounding brought beyond [0, 1] put back; None for others.

    Example:
        >>> import torch
        >>> in_range(torch.tensor([1 + 1e-6, 0.5])), in_range(torch.tensor([1.5]))
        (tensor([1.0000, 0.5000]), None)
    """
    low, high = (float(value) for value in images.detach().aminmax())
    if low >= 0 and high <= 1:
        return images
    return images.clamp(0, 1) if low >= -ROUNDING and high <= 1 + ROUNDING else None


def side(images: Images) -> int:
    """The shorter side of the images in pixels."""
    return min(images.shape[-2:])


def is_small(images: Images) -> bool:
    """Whether the constants of CIFAR-10-C hold (shorter side below 64 pixels)."""
    return side(images) < SMALL_BELOW


def constants(images: Images, severity: int, *, large: Sequence[T], small: Sequence[T]) -> T:
    """The constants of one severity: `large` of ImageNet-C, `small` of CIFAR-10-C.

    Example:
        >>> import torch
        >>> constants(torch.zeros(1, 3, 28, 40), 5, large=(1, 2, 3, 4, 6), small=(4, 6, 7, 8, 10))
        10
    """
    return (small if is_small(images) else large)[severity - 1]


def stretch(images: Images) -> float:
    """What a length in pixels is multiplied by: max(1, side / 32) below 64 pixels, else 1.

    The lengths of CIFAR-10-C were set at 32 pixels. They grow with the image above that, and do
    not shrink below it: half of them are around one pixel, and a blur of less is no blur.

    Example:
        >>> import torch
        >>> [stretch(torch.zeros(1, 1, n, n)) for n in (28, 32, 48, 64, 224)]
        [1.0, 1.0, 1.5, 1.0, 1.0]
    """
    return max(1.0, side(images) / 32) if is_small(images) else 1.0
