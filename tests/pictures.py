"""Images for tests of corruptions, and how two versions of them are compared."""

import numpy as np
import torch

from testtime._core.seeds import generator
from testtime.streams.corruptions import corrupt

SIZES = (32, 64)
"""One size with the constants of CIFAR-10-C, one with those of ImageNet-C."""


def pictures(batch, channels, height, width, *, seed=0):
    """Smooth shapes with edges, textures and all grey values, each image another."""
    chance = generator(seed, "pictures")
    coarse = torch.rand(batch, channels, 4, 4, generator=chance)
    smooth = torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=True
    )
    fine = torch.rand(batch, channels, height, width, generator=chance)
    return torch.where(smooth > 0.6, smooth.sqrt(), smooth * 0.5 + 0.1 * fine).clamp(0, 1)


def run(images, name, severity, seed=0):
    return corrupt(images, name, severity, generator=generator(seed, name, severity))


def arrays(images):
    return images.permute(0, 2, 3, 1).double().numpy()


def agree(images, expected, tolerance=2e-5):
    given_images, expected = arrays(images), np.clip(np.stack(expected), 0, 1)
    assert np.abs(given_images - expected).max() < tolerance
