"""Fourteen operations on images, each with a size through which a gradient flows.

Where an operation is no smooth function of image or size, its gradient is passed straight through:
that of the result is taken for that of image and size.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import places_of
from testtime.adaptation.parts.pixels import warp


class Operation(NamedTuple):
    """What it does to images (B, C, H, W) in [0, 1] with sizes (B,), and the range of sizes.

    A signed operation is mirrored half of the times: its size changes sign.
    """

    change: Callable[[Tensor, Tensor], Tensor]
    low: float
    high: float
    signed: bool = False


def operate(x: Tensor, which: Tensor, share: Tensor, sign: Tensor) -> Tensor:
    """One operation for each image, by its number in `OPERATIONS`.

    Args:
        x: (B, C, H, W) in [0, 1].
        which: (B,) numbers.
        share: (B,) sizes, from 0, the low end of the operation's range, to 1, its high end.
        sign: (B,) 1 or -1, for signed operations.
    """
    x = x.clamp(0, 1)
    out = x
    for operation, index in zip(OPERATIONS, places_of(which, len(OPERATIONS)), strict=True):
        if len(index):
            size = operation.low + share[index] * (operation.high - operation.low)
            size = size * sign[index] if operation.signed else size
            out = out.index_copy(0, index, operation.change(x[index], size).clamp(0, 1))
    return out


def _through(result: Tensor, *smooth: Tensor) -> Tensor:
    """The result, with a gradient of one to each of the others besides its own."""
    for value in smooth:
        result = result + (value - value.detach())
    return result


def _wide(size: Tensor) -> Tensor:
    return size.view(-1, 1, 1, 1)


def _warp(x: Tensor, rows: list[Tensor]) -> Tensor:
    """Resamples each image by its own affine matrix, given entry by entry, reflecting."""
    return warp(x, torch.stack(rows, 1).view(-1, 2, 3), fill=None)


def _shear_x(x: Tensor, size: Tensor) -> Tensor:
    one, zero = torch.ones_like(size), torch.zeros_like(size)
    return _warp(x, [one, size, zero, zero, one, zero])


def _shear_y(x: Tensor, size: Tensor) -> Tensor:
    one, zero = torch.ones_like(size), torch.zeros_like(size)
    return _warp(x, [one, zero, zero, size, one, zero])


def _translate_x(x: Tensor, size: Tensor) -> Tensor:
    one, zero = torch.ones_like(size), torch.zeros_like(size)
    return _warp(x, [one, zero, size, zero, one, zero])


def _translate_y(x: Tensor, size: Tensor) -> Tensor:
    one, zero = torch.ones_like(size), torch.zeros_like(size)
    return _warp(x, [one, zero, zero, zero, one, size])


def _rotate(x: Tensor, size: Tensor) -> Tensor:
    cos, sin, zero = size.cos(), size.sin(), torch.zeros_like(size)
    return _warp(x, [cos, sin, zero, -sin, cos, zero])


def _blend(base: Tensor, x: Tensor, size: Tensor) -> Tensor:
    return base + _wide(size) * (x - base)


def _contrast(x: Tensor, size: Tensor) -> Tensor:
    return _blend(x.mean((1, 2, 3), keepdim=True), x, size)


def _color(x: Tensor, size: Tensor) -> Tensor:
    """Towards or away from grey; images that do not have three channels stay as they are."""
    if x.shape[1] != 3:
        return x
    weights = x.new_tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1)
    return _blend((x * weights).sum(1, keepdim=True), x, size)


def _brightness(x: Tensor, size: Tensor) -> Tensor:
    return _wide(size) * x


def _sharpness(x: Tensor, size: Tensor) -> Tensor:
    kernel = x.new_ones(3, 3)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(x.shape[1], 1, 3, 3)
    smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
    return _blend(smooth, x, size)


def _autocontrast(x: Tensor, size: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; constant channels stay."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = (x - low) / torch.where(high > low, high - low, 1.0)
    return _through(torch.where(high > low, stretched, x).detach(), x, _wide(size))


def _invert(x: Tensor, size: Tensor) -> Tensor:
    return _through(1 - x, _wide(size))


def _equalize(x: Tensor, size: Tensor) -> Tensor:
    """Histogram equalisation of each channel at 256 levels, as PIL and torchvision do it."""
    levels = (255 * x.detach()).long().flatten(2).flatten(0, 1)
    counts = torch.zeros(len(levels), 256, dtype=torch.long, device=x.device)
    counts = counts.scatter_add(1, levels, torch.ones_like(levels))
    last = counts.gather(1, levels.amax(1, keepdim=True))
    step = (levels.shape[1] - last) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    equal = torch.where(step > 0, table.gather(1, levels), levels).view(x.shape)
    return _through(equal.to(x.dtype) / 255, x, _wide(size))


def _solarize(x: Tensor, size: Tensor) -> Tensor:
    """Pixels of the threshold and above are inverted."""
    return _through(torch.where(x < _wide(size), x, 1 - x), _wide(size), x)


def _posterize(x: Tensor, size: Tensor) -> Tensor:
    """As many bits as the whole part of the size."""
    step = 2.0 ** (8 - _wide(size.detach()).floor())
    coarse = ((255 * x.detach()).floor() / step).floor() * step / 255
    return _through(coarse, x, _wide(size))


OPERATIONS = (
    Operation(_shear_x, -0.3, 0.3, signed=True),
    Operation(_shear_y, -0.3, 0.3, signed=True),
    Operation(_translate_x, -0.45, 0.45, signed=True),
    Operation(_translate_y, -0.45, 0.45, signed=True),
    Operation(_contrast, 0.1, 1.9),
    Operation(_color, 0.1, 1.9),
    Operation(_brightness, 0.1, 1.9),
    Operation(_sharpness, 0.1, 1.9),
    Operation(_rotate, -math.pi / 6, -math.pi / 6, signed=True),  # the published range: one angle
    Operation(_autocontrast, 0, 1),
    Operation(_invert, 0, 1),
    Operation(_equalize, 0, 1),
    Operation(_solarize, 0, 1),
    Operation(_posterize, 4, 8),
)
"""Operations and ranges of TeSLA's code, in its order."""
