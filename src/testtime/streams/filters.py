"""The linear filters that blurs, weather and warps are made of, with the borders of the originals.

A filter along one side of an image is a square matrix into which the taps beyond the border are
folded back. One matrix product then serves any radius, also one far larger than the image.
"""

from math import ceil
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["nearest", "reflect", "mirror"]
"""nearest: aa|abc|cc; reflect: ba|abc|cb; mirror: cb|abc|ba (cv2's default)."""


def fold(index: Tensor, length: int, border: Border) -> Tensor:
    """Brings indices beyond 0 ... length-1 back inside.

    Example:
        >>> index = torch.arange(-2, 5)
        >>> for border in ("nearest", "reflect", "mirror"):
        ...     print(border, fold(index, 3, border).tolist())
        nearest [0, 0, 0, 1, 2, 2, 2]
        reflect [1, 0, 0, 1, 2, 2, 1]
        mirror [2, 1, 0, 1, 2, 1, 0]
    """
    if border == "nearest":
        return index.clamp(0, length - 1)
    if border == "reflect":
        index = index % (2 * length)
        return torch.minimum(index, 2 * length - 1 - index)
    index = index % max(2 * length - 2, 1)
    return torch.minimum(index, (2 * length - 2 - index).abs())


def filter_matrix(taps: Tensor, length: int, border: Border) -> Tensor:
    """The (length, length) matrix that correlates a row of pixels with centred `taps`."""
    radius = len(taps) // 2
    centre = torch.arange(length, device=taps.device)[:, None]
    index = fold(centre + torch.arange(-radius, radius + 1, device=taps.device), length, border)
    return taps.new_zeros(length, length).scatter_add_(1, index, taps.expand(length, -1))


def gaussian_taps(sigma: float, *, truncate: float, like: Tensor) -> Tensor:
    """Normalised Gaussian weights, cut at `truncate` standard deviations (scipy's rule)."""
    radius = int(truncate * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1, device=like.device, dtype=like.dtype)
    taps = torch.exp(-0.5 * (offset / sigma).square()) if radius else torch.ones_like(offset)
    return taps / taps.sum()


def gaussian_filter(
    images: Tensor, sigma: float, *, border: Border = "nearest", truncate: float = 4.0
) -> Tensor:
    """Gaussian blur over the last two dimensions, as `scipy.ndimage.gaussian_filter` does it.

    Args:
        images: (*batch, height, width).
        sigma: standard deviation in pixels; 0 changes nothing.
        border: what lies beyond the border.
        truncate: where the filter is cut, in standard deviations.

    Example:
        >>> gaussian_filter(torch.eye(3)[None], 0.5)[0, 1]
        tensor([0.1791, 0.6415, 0.1791])
    """
    taps = gaussian_taps(sigma, truncate=truncate, like=images)
    rows, columns = (filter_matrix(taps, n, border) for n in images.shape[-2:])
    return rows @ images @ columns.mT


def correlate(images: Tensor, kernel: Tensor, *, border: Border = "mirror") -> Tensor:
    """Correlates every channel with one (k, k) kernel of odd size, as `cv2.filter2D` does it."""
    batch, channels, height, width = images.shape
    radius = kernel.shape[-1] // 2
    offset = torch.arange(-radius, radius + 1, device=images.device)
    rows = fold(torch.arange(-radius, height + radius, device=images.device), height, border)
    padded = images.index_select(-2, rows).reshape(batch * channels, 1, -1, width)
    out = torch.zeros_like(images)
    for row, taps in zip(offset + radius, kernel, strict=True):
        band = padded[:, 0, int(row) : int(row) + height]
        out += (band @ filter_matrix(taps, width, border).mT).reshape(images.shape)
    return out


def zoom_matrix(length: int, factor: float, *, like: Tensor) -> Tensor:
    """The (length, length) matrix that enlarges the middle of a row by linear interpolation."""
    inner = ceil(length / factor)
    start, size = (length - inner) // 2, round(inner * factor)
    basis = torch.eye(inner, device=like.device, dtype=like.dtype)[None]
    rows = F.interpolate(basis, size=size, mode="linear", align_corners=True)[0].mT
    trim = (size - length) // 2
    return F.pad(rows[trim : trim + length], (start, length - inner - start))


def clipped_zoom(images: Tensor, factor: float) -> Tensor:
    """Enlarges the middle of the images by `factor` and keeps their size (linear interpolation)."""
    rows, columns = (zoom_matrix(n, factor, like=images) for n in images.shape[-2:])
    return rows @ images @ columns.mT


def streak(images: Tensor, angles: Tensor, *, radius: float, sigma: float) -> Tensor:
    """Motion blur along one direction per image, as ImageMagick's `motionBlur` does it.

        y[p] = Σ_i w_i x[p + round(i (cos a, sin a))],  w_i ∝ exp(-i² / 2σ²),  i = 0 ... 2⌈radius⌉

    The trail is one-sided and pixels beyond the border are those on it. The loop runs over the
    steps of the trail, all images at once.

    Args:
        images: (batch, channels, height, width).
        angles: (batch,) in degrees, clockwise from the x axis.
        radius: half the length of the trail in pixels.
        sigma: how fast the trail fades, in pixels.
    """
    batch, channels, height, width = images.shape
    step = torch.arange(2 * ceil(radius) + 1, device=images.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (step / sigma).square())
    weights = (weights / weights.sum()).tolist()
    radians = torch.deg2rad(angles.to(torch.float64))
    dx = torch.ceil(radians.cos()[:, None] * step - 0.5).long()
    dy = torch.ceil(radians.sin()[:, None] * step - 0.5).long()
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    rows = (row + dy[..., None]).clamp_(0, height - 1) * width  # (batch, steps, height)
    columns = (column + dx[..., None]).clamp_(0, width - 1)  # (batch, steps, width)
    flat, out = images.flatten(2), torch.zeros_like(images).flatten(2)
    for i, weight in enumerate(weights):
        index = (rows[:, i, :, None] + columns[:, i, None, :]).flatten(1)[:, None]
        out.add_(flat.gather(2, index.expand(-1, channels, -1)), alpha=weight)
    return out.view(batch, channels, height, width)
