"""What storing and sending does to images: pixelation and JPEG."""

import torch
from torch import Tensor

from testtime.streams.light import RGB
from testtime.streams.severity import Images, constants


def box_matrix(length: int, size: int, *, like: Tensor) -> Tensor:
    """The (size, length) matrix that resizes a row of pixels with Pillow's box filter.

    Shrinking takes the mean of the whole pixels whose centres lie within a box; enlarging takes
    the pixel under the centre.

    Example:
        >>> box_matrix(4, 2, like=torch.zeros(1)).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    scale = length / size
    centre = (torch.arange(size, device=like.device, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(length, device=like.device, dtype=torch.float64) + 0.5
    distance = (pixel - centre) / max(scale, 1.0)
    weights = ((distance > -0.5) & (distance <= 0.5)).to(like.dtype)
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
    """Writes and reads a JPEG of quality c, with colour at half resolution (Pillow's default).

    The codec is torchvision's, on the CPU. Images that are neither grey nor RGB are written one
    channel at a time.
    """
    from torchvision.io import decode_jpeg, encode_jpeg  # noqa: PLC0415

    large, small = (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)
    quality = constants(images, severity, large=large, small=small)
    pixels = (images * 255).round().to("cpu", torch.uint8)
    if images.shape[1] != RGB:
        pixels = pixels.flatten(0, 1)[:, None]
    files = encode_jpeg(list(pixels), quality=quality)
    decoded = torch.cat([torch.as_tensor(decode_jpeg(file)) for file in files])
    return decoded.to(images).div_(255).view(images.shape)
