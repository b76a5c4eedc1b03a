"""The architecture of the embedded classifiers, and the normalisation that other models lack."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Group normalisation with groups of eight channels."""
    return nn.GroupNorm(channels // 8, channels)


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, each followed by a normalisation layer."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = norm(channels_out)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), norm(channels_out)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        inner = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(inner + self.shortcut(x))


class SmallResNet(nn.Module):
    """A residual network of three stages that takes pixels in [0, 1] and normalises them itself.

    Args:
        norm: makes the normalisation layer for a number of channels, e.g. `nn.BatchNorm2d`.
        classes: number of classes.
        mean: of the training pixels; the first thing the network does is to remove it.
        std: of the training pixels, by which it divides.
    """

    def __init__(
        self, norm: Norm, *, classes: int = 10, mean: float = 0.2860, std: float = 0.3530
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.stem = nn.Sequential(nn.Conv2d(1, 24, 3, 1, 1, bias=False), norm(24), nn.ReLU())
        self.stage1 = Residual(24, 32, 2, norm)
        self.stage2 = Residual(32, 64, 2, norm)
        self.stage3 = Residual(64, 96, 2, norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(96, classes)

    def forward(self, x: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b classes"]:
        x = self.stem((x - self.mean) / self.std)
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(self.pool(x).flatten(1))


class Normalised(nn.Module):
    """A model behind the normalisation that it was trained with: takes pixels in [0, 1].

    Args:
        model: takes normalised pixels.
        mean: of each channel; None where the model takes pixels as they are.
        std: of each channel, as `mean`.
    """

    def __init__(
        self, model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor | None
        self.std: Tensor | None
        for name, value in (("mean", mean), ("std", std)):
            shown = None if value is None else torch.tensor(value, device="cpu").view(-1, 1, 1)
            self.register_buffer(name, shown, persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Any:
        if self.mean is None or self.std is None:
            return self.model(x)
        return self.model((x - self.mean) / self.std)
