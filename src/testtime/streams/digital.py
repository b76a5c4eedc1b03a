"""What storing and sending does to images: pixelation and JPEG."""

from io import BytesIO

import numpy as np
import torch
from torch import Tensor

from testtime.streams.light import RGB
from testtime.streams.severity import Images, constants

BLOCK = 8
TALLEST = 65500
"""Pixels that one side of a JPEG may have."""


def box_matrix(length: int, size: int, *, like: Tensor) -> Tensor:
    """The (size, length) matrix that resizes a row of pixels with Pillow's box filter.

    Shrinking takes the mean of the whole pixels whose centres lie within a box; enlarging takes
    the pixel under the centre. Where a centre lies on the rim of a box two conditions hold, as in
    Pillow: a rounded window and an open lower rim.

    Example:
        >>> box_matrix(4, 2, like=torch.zeros(1)).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    scale = length / size
    reach = max(scale, 1.0) / 2
    centre = (torch.arange(size, device=like.device, dtype=torch.float64)[:, None] + 0.5) * scale
    first, end = (centre - reach + 0.5).floor(), (centre + reach + 0.5).floor()
    pixel = torch.arange(length, device=like.device, dtype=torch.float64)
    distance = (pixel - centre + 0.5) / (2 * reach)
    inside = (pixel >= first) & (pixel < end) & (distance > -0.5) & (distance <= 0.5)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def pixelate(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Shrinks both sides to int(c side) with a box filter, and back."""
    large, small = (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)
    c = constants(images, severity, large=large, small=small)
    rows, columns = (
        box_matrix(k, n, like=images) @ box_matrix(n, k, like=images)
        for n, k in ((n, max(int(n * c), 1)) for n in images.shape[-2:])
    )
    return rows @ images @ columns.mT


def jpeg_compression(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Writes and reads a JPEG of quality c with Pillow, as the originals do.

    The codec works on the CPU. Images that are neither grey nor RGB are written one channel at a
    time. Grey ones are put below each other into one file, each filled up to whole blocks of 8 by
    8 pixels with its last row and column, as the codec itself does: blocks are coded alone, so
    that the result is that of one file per image. Colour is kept at half resolution, across
    blocks, so RGB images get a file each.
    """
    large, small = (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)
    quality = constants(images, severity, large=large, small=small)
    pixels = (images * 255).round().to("cpu", torch.uint8)
    if images.shape[1] == RGB:
        arrays = pixels.permute(0, 2, 3, 1).numpy()
        decoded = np.stack([_through_jpeg(array, quality) for array in arrays]).transpose(
            0, 3, 1, 2
        )
    else:
        decoded = _in_one_file(pixels.flatten(0, 1).numpy(), quality).reshape(images.shape)
    return torch.from_numpy(decoded).to(images) / 255


def _in_one_file(pixels: np.ndarray, quality: int) -> np.ndarray:
    count, height, width = pixels.shape
    filled = np.pad(pixels, ((0, 0), (0, -height % BLOCK), (0, -width % BLOCK)), mode="edge")
    per_file = max(TALLEST // filled.shape[1], 1)
    columns = [filled[i : i + per_file] for i in range(0, count, per_file)]
    decoded = [_through_jpeg(part.reshape(-1, part.shape[2]), quality) for part in columns]
    return np.concatenate(decoded).reshape(filled.shape)[:, :height, :width]


def _through_jpeg(array: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image  # noqa: PLC0415

    file = BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file, formats=["JPEG"]))
