"""Changes of position: elastic transform, rotation, translation, scale and shear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.streams.filters import gaussian_filter
from testtime.streams.noise import signs, uniform
from testtime.streams.severity import Images, constants, is_small, side

PUBLISHED_SIDE = 224


def pixel_grid(images: Images) -> tuple[Tensor, Tensor]:
    """Coordinates x (1, width) and y (height, 1) of the pixels, the first at 0."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=images.dtype)
    y = torch.arange(height, device=images.device, dtype=images.dtype)
    return x[None], y[:, None]


def sample(images: Images, x: Tensor, y: Tensor, *, border: str) -> Images:
    """Linear interpolation at x, y (batch, height, width) in pixels.

    Beyond the border lies nothing ("zeros"), cb|abc|ba ("mirror") or ba|abc|cb ("reflect").
    """
    height, width = images.shape[-2:]
    mirror = border == "mirror"
    if mirror:
        x, y = 2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1
    else:
        x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    mode = "zeros" if border == "zeros" else "reflection"
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    return F.grid_sample(images, grid, padding_mode=mode, align_corners=mirror)


def about_centre(images: Images, matrices: Tensor, *, shift: Tensor | None = None) -> Images:
    """Each output pixel p reads c + M (p - c) + shift, with c the middle; black beyond the border.

    Args:
        images: (batch, channels, height, width).
        matrices: M of each image, (batch, 2, 2), or (2, 2) for all; (x, y) order.
        shift: (batch, 2) in pixels, if any.
    """
    x, y = pixel_grid(images)
    centre_x, centre_y = (images.shape[-1] - 1) / 2, (images.shape[-2] - 1) / 2
    (a, b), (c, d) = (row.unbind(-1) for row in matrices.expand(len(images), 2, 2).unbind(-2))
    a, b, c, d = (v[:, None, None] for v in (a, b, c, d))
    x, y = x - centre_x, y - centre_y
    read_x, read_y = a * x + b * y + centre_x, c * x + d * y + centre_y
    if shift is not None:
        read_x, read_y = read_x + shift[:, 0, None, None], read_y + shift[:, 1, None, None]
    return sample(images, read_x, read_y, border="zeros")


def rotation(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Rotates by c radians to either side, drawn per image; black corners (MNIST-C)."""
    c = (0.2, 0.4, 0.6, 0.8, 1.0)[severity - 1]
    angle = c * signs((len(images),), like=images, generator=generator)
    rows = (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    return about_centre(images, torch.stack(rows, dim=-1).view(-1, 2, 2))


def translation(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Moves by c / 28 of each side, directions drawn per image; black beyond (MNIST-C)."""
    c = (1, 2, 3, 4, 5)[severity - 1]
    height, width = images.shape[-2:]
    shift = signs((len(images), 2), like=images, generator=generator) * c / 28
    shift = shift * images.new_tensor((width, height))
    return about_centre(images, torch.eye(2, device="cpu").to(images), shift=shift)


def scale(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Shrinks to a share c of the size about the middle; black around it (MNIST-C)."""
    c = (0.9, 0.8, 0.7, 0.6, 0.5)[severity - 1]
    return about_centre(images, torch.eye(2, device="cpu").to(images) / c)


def shear(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Turns the y axis by c radians to either side, drawn per image (MNIST-C).

    Read at (x - y sin c, y cos c) about the middle, as scikit-image defined shear then.
    """
    c = (0.2, 0.4, 0.6, 0.8, 1.0)[severity - 1]
    angle = c * signs((len(images),), like=images, generator=generator)
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    rows = (one, -angle.sin(), zero, angle.cos())
    return about_centre(images, torch.stack(rows, dim=-1).view(-1, 2, 2))


def elastic_transform(images: Images, severity: int, generator: torch.Generator) -> Images:
    """A random affine map, then a random smooth displacement field (strength, smoothness, affine).

    The affine map moves three points by U[-affine, affine] in each direction; the field is uniform
    noise blurred with the smoothness and multiplied by the strength. All three are shares of the
    image's side in the originals (ImageNet-C writes 244 for 224, and that is kept).
    """
    large = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02))
    large = (*large, (0.12, 0.01, 0.02))
    small = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05))
    small = (*small, (0.1, 0.03, 0.03))
    length = side(images) * (1 if is_small(images) else 244 / PUBLISHED_SIDE)
    row = constants(images, severity, large=large, small=small)
    strength, smoothness, affine = (share * length for share in row)
    batch, _, height, width = images.shape
    images = jolt(images, affine, generator)
    noise = uniform((2, batch, height, width), -1, 1, like=images, generator=generator)
    dx, dy = strength * gaussian_filter(noise, smoothness, border="reflect", truncate=3.0)
    x, y = pixel_grid(images)
    return sample(images, x + dx, y + dy, border="reflect")


def jolt(images: Images, reach: float, generator: torch.Generator) -> Images:
    """Applies the affine map that moves three points around the middle by U[-reach, reach]."""
    height, width = images.shape[-2:]
    half = max(side(images) // 3, 1)
    right, left, low, high = (
        width // 2 + half,
        width // 2 - half,
        height // 2 + half,
        height // 2 - half,
    )
    before = images.new_tensor([[right, low], [right, high], [left, high]])
    after = before + uniform((len(images), 3, 2), -reach, reach, like=images, generator=generator)
    matrix = torch.linalg.solve(F.pad(after, (0, 1), value=1.0), before.expand_as(after))
    x, y = pixel_grid(images)
    (xx, xy), (yx, yy), (x0, y0) = (
        (row[:, 0, None, None], row[:, 1, None, None]) for row in matrix.unbind(1)
    )
    return sample(images, xx * x + yx * y + x0, xy * x + yy * y + y0, border="mirror")
