"""Changed copies, written down one operation after the other on whole images."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T


def jitter(x: Tensor, generator: torch.Generator, *, padding: str, rough: bool) -> Tensor:
    """The transform of CoTTA's code, with one draw of parameters for the batch."""

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    x = x.clamp(0, 1)
    coloured = x.shape[1] == 3
    for change in torch.randperm(5, generator=generator).tolist():
        if change == 0:
            x = T.adjust_brightness(x, draw(0.6, 1.4))
        elif change == 1:
            factor = draw(0.7, 1.3)
            grey = T.rgb_to_grayscale(x) if coloured else x
            x = (factor * x + (1 - factor) * grey.mean((1, 2, 3), keepdim=True)).clamp(0, 1)
        elif change == 2:
            factor = draw(0.5, 1.5)
            x = T.adjust_saturation(x, factor) if coloured else x
        elif change == 3:
            turn = draw(-0.06, 0.06)
            x = T.adjust_hue(x, turn) if coloured else x
        else:
            x = x.clamp(1e-8, 1).pow(draw(0.7, 1.3))
    size = x.shape[-2:]
    x = F.pad(x, [size[1] // 2] * 2 + [size[0] // 2] * 2, mode=padding)
    limits = [x.shape[-1] / 16, x.shape[-2] / 16]
    x = T.affine(
        x,
        angle=draw(-15, 15),
        translate=[round(draw(-limit, limit)) for limit in limits],
        scale=draw(0.9, 1.1),
        shear=[0.0, 0.0],
        interpolation=T.InterpolationMode.BILINEAR,
    )
    if rough:
        x = T.gaussian_blur(x, [5, 5], [draw(0.001, 0.5)] * 2)
    x = T.center_crop(x, list(size))
    if draw(0, 1) < 0.5:
        x = x.flip(-1)
    if rough:
        x = x + 0.005 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x.clamp(0, 1)


def augmix(x: Tensor, generator: torch.Generator) -> Tensor:
    """AugMix of MEMO's code: every image through every operation, and one of them taken."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=x.dtype)

    count = len(x)
    weights = -uniform(3, count).log()
    weights = weights / weights.sum(0)
    keep = uniform(count)
    mixture = torch.zeros_like(x)
    for weight in weights:
        chain = x.clone()
        depth = torch.randint(1, 4, (count,), generator=generator)
        for step in range(3):
            which = torch.randint(0, 8, (count,), generator=generator)
            level = 0.1 + 0.9 * uniform(count)
            sign = torch.where(uniform(count) < 0.5, -1.0, 1.0)
            for i in range(count):
                if depth[i] > step:
                    size = float(sign[i] * level[i])
                    chain[i] = operation(chain[i], int(which[i]), float(level[i]), size)
        mixture += weight.view(-1, 1, 1, 1) * chain
    return keep.view(-1, 1, 1, 1) * x + (1 - keep.view(-1, 1, 1, 1)) * mixture


def operation(x: Tensor, which: int, level: float, size: float) -> Tensor:
    """One of the eight operations on one image."""
    if which == 0:
        low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
        return (x - low) / (high - low).clamp(min=1 / 255)
    if which == 2:
        return torch.where(x >= 1 - level / 10, 1 - x, x)
    if which == 7:
        return (x * 15).floor() / 15
    angle = math.radians(3 * size) if which == 1 else 0.0
    rows = [[math.cos(angle), math.sin(angle), 0.0], [-math.sin(angle), math.cos(angle), 0.0]]
    if which in (3, 4):
        rows[which - 3][4 - which] = 0.03 * size
    if which in (5, 6):
        rows[which - 5][2] = 2 / 30 * size
    grid = F.affine_grid(x.new_tensor([rows]), [1, *x.shape], align_corners=False)
    return F.grid_sample((x - 0.5)[None], grid, align_corners=False)[0] + 0.5
