"""Light and colour: brightness, contrast, saturation, gamma and uneven illumination."""

import torch
from torch import Tensor

from testtime.streams.noise import signs, uniform
from testtime.streams.severity import Images, constants

RGB = 3
LUMA = (0.299, 0.587, 0.114)


def luma(images: Images) -> Tensor:
    """Grey value 0.299 R + 0.587 G + 0.114 B, one channel; images that are not RGB are returned."""
    if images.shape[1] != RGB:
        return images
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def paint(images: Images, rgb: tuple[float, float, float]) -> Tensor:
    """The colour (channels, 1, 1) for these images: its luma where they are not RGB."""
    grey = sum(part * share for part, share in zip(rgb, LUMA, strict=True))
    colour = rgb if images.shape[1] == RGB else (grey,) * images.shape[1]
    return images.new_tensor(colour)[:, None, None]


def brightness(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Adds c to the value V = max(R, G, B) of HSV; hue and saturation stay.

    With hue and saturation fixed a colour is in proportion to V, so this is x V' / V with
    V' = min(V + c, 1), and V' where V is 0. Images that are not RGB: x + c.
    """
    large, small = (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)
    c = constants(images, severity, large=large, small=small)
    if images.shape[1] != RGB:
        return images + c
    value = images.amax(dim=1, keepdim=True)
    brighter = (value + c).clamp_(max=1)
    return torch.where(value > 0, images * (brighter / value), brighter)


def contrast(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Shrinks towards the mean of each image and channel: m + c (x - m)."""
    large, small = (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)
    c = constants(images, severity, large=large, small=small)
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + c * (images - mean)


def saturate(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Changes the saturation of HSV to a S + b (pale at 1 and 2, vivid at 3 to 5).

    With hue and value fixed V - x is in proportion to S, so this is V - (V - x) S' / S. Where S is
    0 the hue counts as red, as in the original. Images that are not RGB stay as they are.
    """
    large = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
    small = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))
    factor, shift = constants(images, severity, large=large, small=small)
    if images.shape[1] != RGB:
        return images.clone()
    value = images.amax(dim=1, keepdim=True)
    below = value - images
    span = below.amax(dim=1, keepdim=True)
    saturation = (factor * span / value.clamp(min=torch.finfo(value.dtype).tiny) + shift).clamp_(
        0, 1
    )
    red = images.new_tensor((0, 1, 1))[:, None, None]
    return value * (1 - saturation * torch.where(span > 0, below / span, red))


def gamma(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Raises to the power c or 1 / c, drawn per image: darker or brighter mid-tones.

    c = 1.3, the limit of CoTTA's augmentation, at severity 1; up to 3 at severity 5.
    """
    c = (1.3, 1.6, 2.0, 2.5, 3.0)[severity - 1]
    power = c ** signs((len(images), 1, 1, 1), like=images, generator=generator)
    return images**power


def illumination(images: Images, severity: int, generator: torch.Generator) -> Images:
    """Light from one side, drawn per image: x (1 - c t), with t from 0 to 1 across the image.

    c = 0.4, the limit of CoTTA's brightness, at severity 1; at severity 5 the far corner keeps a
    tenth of its light.
    """
    c = (0.4, 0.55, 0.7, 0.8, 0.9)[severity - 1]
    batch, _, height, width = images.shape
    angle = uniform((batch, 1, 1, 1), 0, 2 * torch.pi, like=images, generator=generator)
    y = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)[:, None]
    x = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
    across, reach = x * angle.cos() + y * angle.sin(), angle.cos().abs() + angle.sin().abs()
    return images * (1 - c * (across / reach + 1) / 2)
