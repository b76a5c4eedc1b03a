"""Changed copies of a batch, each draw with a generator of one's own: weak ones and the papers'."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime.adaptation.outputs import map_tensors, read_logits, with_logits

if TYPE_CHECKING:
    from testtime.adaptation.engine import Engine
    from testtime.adaptation.evidence import Evidence

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Takes images (B, C, H, W) in [0, 1] and a generator, gives changed images of that shape."""


def needs_pixels(augment: Augment) -> bool:
    """Whether the copies are made of images in [0, 1]; an augmentation of the caller's is trusted."""
    return augment in (
        cotta_view,
        roid_view,
        augmix_view,
        small_augmix_view,
        weak_view,
        moco_view,
    )


def in_full(view: Augment) -> Augment:
    """The view, made outside of autocast, in which eight bits would say where a pixel goes."""

    @wraps(view)
    def made(x: Tensor, generator: torch.Generator) -> Tensor:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):
            return view(x, generator)
        with torch.autocast(kind, enabled=False):
            return view(x, generator)

    return made


def plain(x: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return x


def joined_copies(
    engine: "Engine", x: Tensor, augment: Augment, count: int
) -> Iterator[tuple[Tensor, int]]:
    """Changed copies of a batch, as many together as may share a forward; and how many these are."""
    together = engine.joinable(x)
    for first in range(0, count, together):
        copies = [augment(x, engine.generator) for _ in range(min(together, count - first))]
        yield torch.cat(copies) if len(copies) > 1 else copies[0], len(copies)


@dataclass(frozen=True, kw_only=True)
class AveragedViews:
    """The teacher's logits, averaged over changed copies where the source model is not sure.

    Small copies share a forward; batch statistics are those of one copy nevertheless.

    Args:
        count: copies.
        threshold: mean confidence of the source model below which they are made.
        augment: makes a copy.
    """

    count: int
    threshold: float
    augment: Augment
    dense: ClassVar[bool] = False

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    def wanted(self, evidence: "Evidence") -> bool:
        """Whether the source model is unsure of this batch; it is asked only if that matters."""
        if self.threshold <= 0 or self.threshold >= 1:
            return self.threshold >= 1
        confidence = at_least_single(evidence.source).softmax(-1).amax(-1)
        return float(evidence.ranks.mean(confidence)) < self.threshold

    def average(self, evidence: "Evidence", teach: Callable[[Tensor, int], Any]) -> Any:
        """Output whose logits are the mean over the copies."""
        total, output, size = 0.0, None, len(evidence.inputs)
        for copies, count in joined_copies(
            evidence.engine, evidence.inputs, self.augment, self.count
        ):
            output = teach(copies, count)
            for logits in read_logits(output).split(size):
                total = total + logits
        assert isinstance(total, Tensor)
        last = map_tensors(lambda t: t[-size:] if t.dim() else t, output)
        return with_logits(last, total / self.count)


@in_full
def cotta_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """The transform of CoTTA, RoTTA and others: one draw of parameters for a whole batch.

    Clip; brightness U[0.6, 1.4], contrast U[0.7, 1.3], saturation U[0.5, 1.5], hue U[-0.06, 0.06]
    and gamma U[0.7, 1.3] in random order; edge padding, rotation within 15 degrees, translation
    within 1/16 of the padded size, scale U[0.9, 1.1], bilinear; Gaussian blur of 5 taps, sigma
    U[0.001, 0.5]; centre crop; mirrored half of the times; noise of deviation 0.005; clip.
    Saturation and hue leave images alone that do not have three channels.

    Reference: Wang et al., Continual Test-Time Domain Adaptation, CVPR 2022, and its code.
    """
    return _jitter(x, generator, padding="replicate", rough=True)


@in_full
def roid_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """CoTTA's transform without blur and noise, padded by reflection.

    Reference: Marsden, Döbler, Yang, Universal Test-Time Adaptation, WACV 2024, and its code.
    """
    return _jitter(x, generator, padding="reflect", rough=False)


def _jitter(x: Tensor, generator: torch.Generator, *, padding: str, rough: bool) -> Tensor:
    """Colours and geometry of CoTTA's transform; blur and noise where it is to be rough."""
    from torchvision.transforms.v2 import functional as T  # noqa: PLC0415

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, device=x.device))

    coloured = x.shape[1] == 3
    x = x.clamp(0, 1)
    for change in torch.randperm(5, generator=generator, device=x.device).tolist():
        if change == 0:
            x = T.adjust_brightness(x, draw(0.6, 1.4))
        elif change == 1:
            x = _contrast(x, draw(0.7, 1.3))
        elif change == 2:
            factor = draw(0.5, 1.5)
            x = T.adjust_saturation(x, factor) if coloured else x
        elif change == 3:
            shift = draw(-0.06, 0.06)
            x = T.adjust_hue(x, shift) if coloured else x
        else:
            x = x.clamp(1e-8, 1).pow(draw(0.7, 1.3))
    height, width = x.shape[-2:]
    x = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode=padding)
    limit = [side / 16 for side in (x.shape[-1], x.shape[-2])]
    x = T.affine(
        x,
        angle=draw(-15, 15),
        translate=[round(draw(-side, side)) for side in limit],
        scale=draw(0.9, 1.1),
        shear=[0.0, 0.0],
        interpolation=T.InterpolationMode.BILINEAR,
    )
    if rough:
        x = T.gaussian_blur(x, [5, 5], [draw(0.001, 0.5)] * 2)
    x = T.center_crop(x, [height, width])
    if draw(0, 1) < 0.5:
        x = x.flip(-1)
    if rough:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x + 0.005 * noise
    return x.clamp(0, 1)


def _contrast(x: Tensor, factor: float) -> Tensor:
    """Moves each image away from, or towards, the mean of its grey version."""
    grey = x
    if x.shape[1] == 3:
        grey = (x * x.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    mean = grey.mean((1, 2, 3), keepdim=True)
    return (factor * x + (1 - factor) * mean).clamp(0, 1)


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to four pixels, black coming in, and half of them mirrored.

    The usual weak augmentation of small images: a random crop after padding by four.

    Raises:
        InputError: when the batch holds no images.
    """
    if x.dim() != 4:
        raise InputError(
            f"crop_and_flip moves images (batch, channels, height, width); given {tuple(x.shape)}. "
            "Give augment= a function of your own."
        )
    count, _, height, width = x.shape
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator, device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = left + torch.arange(width, device=x.device)
    each = torch.arange(count, device=x.device)[:, None, None]
    moved = F.pad(x, (4, 4, 4, 4))[each, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    mirrored = torch.rand(count, 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(mirrored, moved.flip(-1), moved)


@in_full
def augmix_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """AugMix-like copies as MEMO draws them, all images at once, each with draws of its own.

    A random crop and mirror image; then a mixture, with Dirichlet(1, 1, 1) weights, of three chains
    of one to three operations (equalising contrast stretch, rotation within 30 / 10 degrees,
    solarising, shears within 0.03, translations within a thirtieth, posterising), and a Beta(1, 1)
    mixture of that with the crop.

    Reference: Hendrycks et al., AugMix, ICLR 2020; Zhang et al., MEMO, NeurIPS 2022, and its code.
    """
    crop = _crop_and_mirror(at_least_single(x).clamp(0, 1), generator)
    return _augmix(crop, generator).to(x.dtype)


def small_augmix_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """The same for small images, as MEMO draws copies for CIFAR-10.

    The crop is of full size, out of the image with a black margin of an eighth of it: four pixels
    of 32. A crop to 8 % of the area would leave nothing of a small image.

    Reference: Zhang et al., MEMO, NeurIPS 2022, and its code for CIFAR-10.
    """
    crop = _shift_and_mirror(at_least_single(x).clamp(0, 1), generator)
    return _augmix(crop, generator).to(x.dtype)


def _augmix(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mixtures of each image with three chains of operations on it."""
    count = len(x)
    weights = -_uniform(x, (3, count), generator).clamp(min=1e-12).log()
    weights = weights / weights.sum(0)  # exponentials over their sum are Dirichlet(1, 1, 1)
    keep = _uniform(x, (count,), generator).view(-1, 1, 1, 1)
    mixture = torch.zeros_like(x)
    for weight in weights:
        chain = x
        depth = torch.randint(1, 4, (count,), generator=generator, device=x.device)
        for level in range(3):
            changed = _random_operation(chain, generator)
            chain = torch.where((depth > level).view(-1, 1, 1, 1), changed, chain)
        mixture = mixture + weight.view(-1, 1, 1, 1) * chain
    return keep * x + (1 - keep) * mixture


def _uniform(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)


def _warp(x: Tensor, matrix: Tensor, fill: float | None = 0.5) -> Tensor:
    """Resamples each image by its own affine matrix (B, 2, 3) in units of the image."""
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    if fill is None:
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return F.grid_sample(x - fill, grid, align_corners=False) + fill


@in_full
def weak_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """TeSLA's weak copies: crops of 80 to 100 % of each image, resized; half are mirrored."""
    crop = _crop_and_mirror(at_least_single(x).clamp(0, 1), generator, least=0.8)
    return crop.to(x.dtype)


def _crop_and_mirror(x: Tensor, generator: torch.Generator, *, least: float = 0.08) -> Tensor:
    """Random crops of `least` to 100 % of the area, aspect 3/4 to 4/3, resized; half mirrored."""
    area = least + (1 - least) * _uniform(x, (len(x),), generator)
    aspect = torch.exp((2 * _uniform(x, (len(x),), generator) - 1) * math.log(4 / 3))
    wide = (area * aspect).sqrt().clamp(max=1)
    high = (area / aspect).sqrt().clamp(max=1)
    place = 2 * _uniform(x, (2, len(x)), generator) - 1
    mirror = torch.where(_uniform(x, (len(x),), generator) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(wide)
    rows = [wide * mirror, zero, place[0] * (1 - wide), zero, high, place[1] * (1 - high)]
    return _warp(x, torch.stack(rows, 1).view(-1, 2, 3), fill=None)


def _random_operation(x: Tensor, generator: torch.Generator) -> Tensor:
    """One operation for each image, drawn alike out of eight."""
    count = len(x)
    which = torch.randint(0, 8, (count,), generator=generator, device=x.device)
    level = 0.1 + 0.9 * _uniform(x, (count,), generator)
    sign = torch.where(_uniform(x, (count,), generator) < 0.5, -1.0, 1.0)
    size = sign * level
    angle = torch.where(which == 1, size * math.radians(3), 0.0)
    one, cos, sin = torch.ones_like(size), angle.cos(), angle.sin()
    shear_x = torch.where(which == 3, size * 0.03, 0.0)
    shear_y = torch.where(which == 4, size * 0.03, 0.0)
    right = torch.where(which == 5, size * 2 / 30, 0.0)
    down = torch.where(which == 6, size * 2 / 30, 0.0)
    rows = [cos * one, sin + shear_x, right, -sin + shear_y, cos * one, down]
    moved = _warp(x, torch.stack(rows, 1).view(-1, 2, 3))
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = (x - low) / (high - low).clamp(min=1 / 255)
    inverted = torch.where(x >= 1 - level.view(-1, 1, 1, 1) / 10, 1 - x, x)
    steps = 15.0  # four bits a channel
    coarse = (x * steps).floor() / steps
    kind = which.view(-1, 1, 1, 1)
    out = torch.where(kind == 0, stretched, moved)
    out = torch.where(kind == 2, inverted, out)
    return torch.where(kind == 7, coarse, out)


@in_full
def moco_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """The transform of MoCo v2 as SADE uses it on small images, each with draws of its own.

    A crop after padding with black by an eighth of the size; in 80 % of cases brightness, contrast
    and saturation by U[0.6, 1.4] and hue by U[-0.1, 0.1], in an order drawn once for the batch;
    grey in 20 %; Gaussian blur, sigma U[0.1, 2], in 20 %; mirrored in half of them. Saturation, hue
    and grey leave images alone that do not have three channels.

    Reference: Chen et al., Improved Baselines with Momentum Contrastive Learning, 2020; Zhang et
    al. (SADE), NeurIPS 2022, and its code.
    """
    dtype = x.dtype
    x = _shift_and_mirror(at_least_single(x).clamp(0, 1), generator)
    shape = (len(x), 1, 1, 1)
    factors = 0.6 + 0.8 * _uniform(x, (3, *shape), generator)
    turn = 0.2 * _uniform(x, shape, generator) - 0.1
    jittered = x
    for change in torch.randperm(4, generator=generator, device=x.device).tolist():
        if change == 0:
            jittered = (jittered * factors[0]).clamp(0, 1)
        elif change == 1:
            mean = _grey(jittered).mean((1, 2, 3), keepdim=True)
            jittered = (mean + factors[1] * (jittered - mean)).clamp(0, 1)
        elif change == 2:
            grey = _grey(jittered)
            jittered = (grey + factors[2] * (jittered - grey)).clamp(0, 1)
        else:
            jittered = _turn_hue(jittered, turn)
    x = torch.where(_uniform(x, shape, generator) < 0.8, jittered, x)
    x = torch.where(_uniform(x, shape, generator) < 0.2, _grey(x), x)
    sigma = 0.1 + 1.9 * _uniform(x, (len(x), 1), generator)
    x = torch.where(_uniform(x, shape, generator) < 0.2, _blur(x, sigma), x)
    return x.to(dtype)


def _shift_and_mirror(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crops of the same size from images with a black margin; half are mirrored."""
    count, channels, height, width = x.shape
    margin = max(height // 8, 1), max(width // 8, 1)
    padded = F.pad(x, (margin[1], margin[1], margin[0], margin[0]))
    starts = [
        torch.randint(0, 2 * side + 1, (count, 1), generator=generator, device=x.device)
        for side in margin
    ]
    rows = starts[0] + torch.arange(height, device=x.device)
    columns = starts[1] + torch.arange(width, device=x.device)
    mirrored = _uniform(x, (count, 1), generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(count, device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _grey(x: Tensor) -> Tensor:
    """Grey versions of colour images, in as many channels."""
    if x.shape[1] != 3:
        return x
    weights = x.new_tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True).expand_as(x)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of colour images, by way of HSV; a full circle is 1."""
    if x.shape[1] != 3:
        return x
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, 1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    place = (x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1) + sixth + 6 * turn) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blurs each image with a Gaussian of its own width (B, 1), of 13 taps."""
    count, channels, height, width = x.shape
    taps = (-0.5 * (torch.arange(-6, 7, device=x.device) / sigma).square()).exp()
    taps = (taps / taps.sum(1, keepdim=True)).to(x.dtype).repeat_interleave(channels, 0)
    flat = x.reshape(1, count * channels, height, width)
    for weight, pad in (
        (taps[:, None, None, :], (6, 6, 0, 0)),
        (taps[:, None, :, None], (0, 0, 6, 6)),
    ):
        flat = F.conv2d(F.pad(flat, pad, mode="replicate"), weight, groups=count * channels)
    return flat.view_as(x)
