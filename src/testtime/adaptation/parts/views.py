"""Changed copies of a batch, each draw with a generator of one's own: weak ones and the papers'."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single, places_of
from testtime._core.errors import InputError
from testtime.adaptation.outputs import map_tensors, read_logits, with_logits
from testtime.adaptation.parts.pixels import blended, grey, moved, turn_hue, warp
from testtime.adaptation.parts.scales import averaged_pixels

if TYPE_CHECKING:
    from testtime.adaptation.engine import Engine
    from testtime.adaptation.evidence import Evidence

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Takes images (B, C, H, W) in [0, 1] and a generator, gives changed images of that shape."""


_of_pixels: list[Augment] = []


def needs_pixels(augment: Augment) -> bool:
    """Whether the copies are made of images in [0, 1]; an augmentation of the caller's is trusted."""
    return augment in _of_pixels


def of_pixels(view: Augment) -> Augment:
    """Decorator: the view needs images in [0, 1], as `needs_pixels` tells.

    It is made outside of autocast, in which eight bits would say where a pixel goes.
    """

    @wraps(view)
    def made(x: Tensor, generator: torch.Generator) -> Tensor:
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind):
            return view(x, generator)
        with torch.autocast(kind, enabled=False):
            return view(x, generator)

    _of_pixels.append(made)
    return made


def plain(x: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return x


def joined_copies(
    engine: "Engine", x: Tensor, augment: Augment, count: int
) -> Iterator[tuple[Tensor, int]]:
    """Changed copies of a batch, as many together as may share a forward; and how many these are."""
    together = engine.shortcuts.joinable(x)
    for first in range(0, count, together):
        copies = [augment(x, engine.generator) for _ in range(min(together, count - first))]
        yield torch.cat(copies) if len(copies) > 1 else copies[0], len(copies)


@dataclass(frozen=True, kw_only=True)
class AveragedViews:
    """The teacher's logits, averaged over changed copies where the source model is not sure.

    Small copies share a forward; batch statistics are those of one copy nevertheless. Copies for
    dense logits are the images at other scales and mirrored, and each pixel is averaged, or not, by
    itself: see `averaged_pixels`.

    Args:
        count: copies.
        threshold: mean confidence of the source model below which they are made.
        augment: makes a copy.
    """

    count: int
    threshold: float
    augment: Augment

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    def wanted(self, evidence: "Evidence") -> bool:
        """Whether the source model is unsure of this batch; it is asked only if that matters."""
        if self.threshold <= 0 or self.threshold >= 1 or evidence.engine.dense:
            return self.threshold > 0
        confidence = at_least_single(evidence.source).softmax(-1).amax(-1)
        return float(evidence.ranks.mean(confidence)) < self.threshold

    def average(self, evidence: "Evidence", teach: Callable[[Tensor, int], Any]) -> Any:
        """Output whose logits are the mean over the copies; of pixels, those of the mean softmax."""
        if evidence.engine.dense:
            return averaged_pixels(evidence, lambda x: teach(x, 1), threshold=self.threshold)
        parts, output, size = [], None, len(evidence.inputs)
        for copies, count in joined_copies(
            evidence.engine, evidence.inputs, self.augment, self.count
        ):
            output = teach(copies, count)
            parts += read_logits(output).split(size)
        last = map_tensors(lambda t: t[-size:] if t.dim() else t, output)
        return with_logits(last, torch.stack(parts).mean(0))


@of_pixels
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


@of_pixels
def roid_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """CoTTA's transform without blur and noise, padded by reflection.

    Reference: Marsden, Döbler, Yang, Universal Test-Time Adaptation, WACV 2024, and its code.
    """
    return _jitter(x, generator, padding="reflect", rough=False)


def _jitter(x: Tensor, generator: torch.Generator, *, padding: str, rough: bool) -> Tensor:
    """Colours and geometry of CoTTA's transform; blur and noise where it is to be rough."""

    order = torch.randperm(5, generator=generator, device=x.device)
    drawn = torch.rand(
        11 if rough else 10, generator=generator, device=x.device, dtype=torch.float32
    )
    told = torch.cat([order.to(drawn), drawn]).tolist()  # one wait for the device, not twelve
    changes, left = told[:5], iter(told[5:])

    def draw(low: float, high: float) -> float:
        return low + (high - low) * next(left)

    coloured = x.shape[1] == 3
    out = x.clamp(0, 1)
    for change in changes:
        if change == 0:
            out = (out * draw(0.6, 1.4)).clamp_(0, 1)
        elif change == 1:
            out = blended(out, grey(out).mean((1, 2, 3), keepdim=True), draw(0.7, 1.3))
        elif change == 2:
            factor = draw(0.5, 1.5)
            out = blended(out, grey(out), factor) if coloured else out
        elif change == 3:
            out = turn_hue(out, draw(-0.06, 0.06))
        else:
            out = out.clamp(1e-8, 1).pow_(draw(0.7, 1.3))
    height, width = out.shape[-2:]
    angle = draw(-15, 15)
    limits = [(side + 2 * (side // 2)) / 16 for side in (width, height)]
    across, down = (float(round(draw(-limit, limit))) for limit in limits)
    scale = draw(0.9, 1.1)
    blur = draw(0.001, 0.5) if rough else None
    out = moved(out, angle=angle, shift=(across, down), scale=scale, padding=padding, blur=blur)
    if draw(0, 1) < 0.5:
        out = out.flip(-1)
    if rough:
        noise = torch.randn(out.shape, generator=generator, device=x.device, dtype=x.dtype)
        out = out.add_(noise, alpha=0.005)
    return out.clamp_(0, 1)


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
    mirrored = (
        torch.rand(count, 1, 1, 1, generator=generator, device=x.device, dtype=torch.float32) < 0.5
    )
    return torch.where(mirrored, moved.flip(-1), moved)


@of_pixels
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


@of_pixels
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
    depths: list[Tensor] = []
    drawn: list[list[Tensor]] = [[], [], []]
    for _ in range(3):
        depths.append(torch.randint(1, 4, (count,), generator=generator, device=x.device))
        for level in drawn:
            level.append(_draw_operation(x, generator))
    depth = torch.cat(depths)
    chains = x.repeat(3, 1, 1, 1)
    for number, level in enumerate(drawn):
        which, size, sign = torch.cat(level, 1)
        _operate(chains, which, size, sign, depth > number)
    mixture = torch.zeros_like(x)
    for weight, chain in zip(weights, chains.chunk(3), strict=True):
        mixture = mixture + weight.view(-1, 1, 1, 1) * chain
    return keep * x + (1 - keep) * mixture


def _uniform(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)


def _sign(x: Tensor, generator: torch.Generator) -> Tensor:
    """-1 or 1 for each image."""
    return torch.where(_uniform(x, (len(x),), generator) < 0.5, -1.0, 1.0).to(x.dtype)


@of_pixels
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
    mirror = _sign(x, generator)
    zero = torch.zeros_like(wide)
    rows = [wide * mirror, zero, place[0] * (1 - wide), zero, high, place[1] * (1 - high)]
    return warp(x, torch.stack(rows, 1).view(-1, 2, 3), fill=None)


def _draw_operation(x: Tensor, generator: torch.Generator) -> Tensor:
    """For each image one operation out of eight, its strength, and its sign: (3, B)."""
    which = torch.randint(0, 8, (len(x),), generator=generator, device=x.device)
    level = 0.1 + 0.9 * _uniform(x, (len(x),), generator)
    return torch.stack([which.to(x.dtype), level, _sign(x, generator)])


def _operate(x: Tensor, which: Tensor, level: Tensor, sign: Tensor, wanted: Tensor) -> None:
    """Does to each image that is wanted its operation, in place."""

    group = torch.full_like(which, 3)
    for number, kind in enumerate((0, 2, 7)):
        group = group.masked_fill(which == kind, number)
    stretched, inverted, coarse, warped = places_of(group.masked_fill(~wanted, 4), 4)
    if len(own := stretched):
        now = x[own]
        low, high = now.amin((2, 3), keepdim=True), now.amax((2, 3), keepdim=True)
        x[own] = (now - low).div_((high - low).clamp(min=1 / 255))
    if len(own := inverted):
        now = x[own]
        x[own] = torch.where(now >= 1 - level[own].view(-1, 1, 1, 1) / 10, 1 - now, now)
    if len(own := coarse):  # four bits a channel
        x[own] = (x[own] * 15).floor_().div_(15)
    if len(own := warped):
        kind, size = which[own], (sign * level)[own]

        def of(number: int, scale: float) -> Tensor:
            return torch.where(kind == number, size * scale, 0.0)

        angle = of(1, math.radians(3))
        cos, sin = angle.cos(), angle.sin()
        rows = [cos, sin + of(3, 0.03), of(5, 2 / 30), of(4, 0.03) - sin, cos, of(6, 2 / 30)]
        x[own] = warp(x[own], torch.stack(rows, 1).view(-1, 2, 3))


@of_pixels
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
            mean = grey(jittered).mean((1, 2, 3), keepdim=True)
            jittered = (mean + factors[1] * (jittered - mean)).clamp(0, 1)
        elif change == 2:
            base = grey(jittered)
            jittered = (base + factors[2] * (jittered - base)).clamp(0, 1)
        else:
            jittered = turn_hue(jittered, turn)
    x = torch.where(_uniform(x, shape, generator) < 0.8, jittered, x)
    x = torch.where(_uniform(x, shape, generator) < 0.2, grey(x), x)
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
