"""Spatter: drops of water (severities 1 to 3) or mud (4 and 5) on the lens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from testtime.streams.filters import correlate, gaussian_filter
from testtime.streams.light import paint
from testtime.streams.noise import normal
from testtime.streams.severity import Images, constants, stretch

WATER = (175 / 255, 238 / 255, 238 / 255)
MUD = (63 / 255, 42 / 255, 20 / 255)
EMBOSS = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))
FURTHEST = 20


def spatter(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Drops where blurred noise exceeds a threshold (mean, std, size, threshold, strength, mud).

    Water takes its relief from the distance to the drops' edges, as in the original. That calls
    OpenCV, whose distance is approximate (within 2 %); here it is exact. Images that are not RGB
    get the grey value of the colours.
    """
    large = (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    )
    small = (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    )
    mean, std, size, threshold, strength, mud = constants(
        images, severity, large=large, small=small
    )
    longer = stretch(images)
    batch, _, height, width = images.shape
    layer = mean + std * normal((batch, 1, height, width), like=images, generator=generator)
    layer = gaussian_filter(layer, size * longer)
    if mud:
        splash = gaussian_filter((layer > threshold).to(images.dtype), strength * longer)
        splash = splash.masked_fill(splash < 0.8, 0)
        return images * (1 - splash) + paint(images, MUD) * splash
    layer = layer.masked_fill(layer < threshold, 0).clamp_(0, 1).mul_(255).floor_()
    drops = layer * relief(layer)
    drops = drops / drops.amax(dim=(2, 3), keepdim=True).clamp(min=1)
    return images + strength * drops * paint(images, WATER)


def relief(layer: Tensor) -> Tensor:
    """Light and shade of drops (batch, 1, height, width), from an 8-bit layer of them.

    The distance to the nearest edge, at most 20, is smoothed, equalised and embossed.
    """
    mean3 = layer.new_full((3, 3), 1 / 9)
    distance = distance_to(edges(layer), furthest=FURTHEST, dtype=layer.dtype)
    shade = equalise(correlate(distance, mean3).add_(1e-4).floor_())
    shade = correlate(shade, layer.new_tensor(EMBOSS)).clamp_(0, 255).round_()
    return correlate(shade, mean3).round_()


def edges(layer: Tensor, *, low: float = 50, high: float = 150) -> Tensor:
    """Canny's edges of 8-bit images, as a bool tensor: Sobel, thinning, hysteresis."""
    sobel = layer.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    gx, gy = correlate(layer, sobel, border="nearest"), correlate(layer, sobel.mT, border="nearest")
    strength = gx.abs() + gy.abs()
    around = F.pad(strength, (1, 1, 1, 1))
    height, width = layer.shape[-2:]

    def beside(dy: int, dx: int) -> Tensor:
        return around[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    flat, steep = gy.abs() < 0.4142 * gx.abs(), gy.abs() > 2.4142 * gx.abs()
    same = gx * gy >= 0
    before = torch.where(same, beside(-1, -1), beside(-1, 1))
    after = torch.where(same, beside(1, 1), beside(1, -1))
    before = torch.where(flat, beside(0, -1), torch.where(steep, beside(-1, 0), before))
    after = torch.where(flat, beside(0, 1), torch.where(steep, beside(1, 0), after))
    straight = flat | steep
    thin = (strength > before) & ((strength > after) | (straight & (strength == after)))
    weak, found = thin & (strength > low), thin & (strength > high)
    while True:
        grown = weak & dilate(found)
        if torch.equal(grown, found):
            return found
        found = grown


def dilate(marked: Tensor) -> Tensor:
    """Marks the eight neighbours of each marked pixel too.

    Example:
        >>> dilate(torch.eye(4, dtype=torch.bool)[:1].expand(2, -1)[None]).long().tolist()
        [[[1, 1, 0, 0], [1, 1, 0, 0]]]
    """
    tall = F.pad(marked, (0, 0, 1, 1))
    wide = F.pad(tall[..., :-2, :] | tall[..., 1:-1, :] | tall[..., 2:, :], (1, 1))
    return wide[..., :-2] | wide[..., 1:-1] | wide[..., 2:]


def distance_to(marked: Tensor, *, furthest: int, dtype: torch.dtype) -> Tensor:
    """Euclidean distance of each pixel to the nearest marked one, cut at `furthest`."""
    far = float(furthest**2)
    squared = torch.where(marked, 0.0, far).to(dtype)
    for dim in (-2, -1):
        length, nearest = squared.shape[dim], squared.clone()
        for k in range(1, min(furthest, length)):
            moved, left = squared + float(k * k), length - k
            for here, there in ((0, k), (k, 0)):
                part = nearest.narrow(dim, here, left)
                torch.minimum(part, moved.narrow(dim, there, left), out=part)
        squared = nearest
    return squared.sqrt()


def equalise(levels: Tensor) -> Tensor:
    """Spreads 8-bit levels so that all occur alike often, image by image (cv2.equalizeHist)."""
    batch = len(levels)
    index = levels.long().flatten(1)
    first = torch.arange(batch, device=levels.device)[:, None] * 256
    counts = torch.bincount((index + first).flatten(), minlength=batch * 256).view(batch, 256)
    upto = counts.cumsum(dim=1)
    lowest = counts.gather(1, index.amin(dim=1, keepdim=True))
    total = upto[:, -1:]
    table = (upto - lowest).to(levels.dtype) * 255 / (total - lowest).clamp(min=1)
    table = torch.where(total == lowest, index[:, :1].to(levels.dtype), table.round())
    return table.gather(1, index).view(levels.shape)
