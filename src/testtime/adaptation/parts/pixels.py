"""What changed copies are made of: colours and places of pixels, as functions of images alone.

Images are (B, C, H, W) in [0, 1]. Only pixels that are looked at are computed.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def grey(x: Tensor) -> Tensor:
    """Grey versions (B, 1, H, W) of colour images; other images as they are.

    Example:
        >>> grey(torch.ones(1, 3, 1, 1))
        tensor([[[[0.9999]]]])
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def blended(x: Tensor, base: Tensor, factor: float) -> Tensor:
    """Images moved away from a base, or towards it: factor x + (1 - factor) base, in [0, 1].

    Example:
        >>> blended(torch.tensor([0.9]), torch.tensor([0.5]), 0.5)
        tensor([0.7000])
    """
    return (x * factor).add_(base, alpha=1 - factor).clamp_(0, 1)


def turn_hue(x: Tensor, turn: Tensor | float) -> Tensor:
    """Turns the hue of colour images, by a sixth of a circle at most.

    A channel is v - c clip(2 - d, 0, 1), with value v, chroma c and the distance d, in sixths of the
    circle, of the colour's hue from the one that lies opposite to the channel.

    Args:
        x: images; those that do not have three channels stay as they are.
        turn: for all, or (B, 1, 1, 1); a full circle is 1.

    Example:
        >>> turn_hue(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), 1 / 6).flatten()  # red, yellow
        tensor([1., 1., 0.])
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.split(1, 1)
    value = torch.maximum(red, green).maximum(blue)
    chroma = value - torch.minimum(red, green).minimum(blue)
    inverse = 1 / torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        red == value,
        (green - blue) * inverse,
        torch.where(green == value, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    hue = hue + 6 * turn  # from -2 to 6
    turned = [
        torch.addcmul(
            value, torch.minimum(one, other).neg_().add_(2).clamp_(0, 1), chroma, value=-1
        )
        for one, other in (
            (hue + 3, (hue - 3).abs_()),
            ((hue + 1).abs_(), (hue - 5).abs_()),
            ((hue - 1).abs_(), 7 - hue),
        )
    ]
    return torch.cat(turned, 1)


def warp(x: Tensor, matrix: Tensor, fill: float | None = 0.5) -> Tensor:
    """Resamples each image by its own affine matrix (B, 2, 3) in units of half the image.

    Args:
        x: images.
        matrix: takes a place in the result to one in the image.
        fill: what lies outside; None: the image, mirrored.
    """
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    if fill is None:
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return F.grid_sample(x - fill, grid, align_corners=False).add_(fill)


def moved(
    x: Tensor,
    *,
    angle: float,
    shift: tuple[float, float],
    scale: float,
    padding: str,
    blur: float | None = None,
) -> Tensor:
    """Images that were padded by half of their size, turned, shifted, scaled, blurred and cropped.

    What the crop does not show is not computed.

    Args:
        x: images.
        angle: in degrees, clockwise.
        shift: in pixels, to the right and down.
        scale: above 1 things grow.
        padding: mode of `torch.nn.functional.pad`.
        blur: deviation of a Gaussian of 5 taps, in pixels; None: no blur.
    """
    height, width = x.shape[-2:]
    margins = [min(2, side // 2) if blur else 0 for side in (width, height)]
    sides = F.pad(x, [width // 2] * 2 + [height // 2] * 2, mode=padding)
    cos, sin = (turn(math.radians(angle)) / scale for turn in (math.cos, math.sin))
    columns, rows = (
        torch.arange(side + 2 * margin, dtype=x.dtype, device=x.device) - (side - 1) / 2 - margin
        for side, margin in zip((width, height), margins, strict=True)
    )
    columns, rows = columns - shift[0], (rows - shift[1])[:, None]
    across, down = (2 / side for side in (sides.shape[-1], sides.shape[-2]))
    grid = torch.stack(
        [
            across * cos * columns + across * sin * rows,
            down * cos * rows - down * sin * columns,
        ],
        -1,
    )
    out = F.grid_sample(sides, grid.expand(len(x), -1, -1, -1), align_corners=False)
    if not blur:
        return out
    missing = [2 - margin for margin in margins]  # of images of less than four pixels a side
    if any(missing):
        out = F.pad(out, [missing[0]] * 2 + [missing[1]] * 2, mode="reflect")
    taps = [math.exp(-0.5 * (place / blur) ** 2) for place in range(3)]
    middle, near, far = (tap / (taps[0] + 2 * sum(taps[1:])) for tap in taps)
    for side in (-1, -2):
        size = out.shape[side] - 4
        one, two, three, four, five = (out.narrow(side, place, size) for place in range(5))
        out = (three * middle).add_(two + four, alpha=near).add_(one + five, alpha=far)
    return out
