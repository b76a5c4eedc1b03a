"""What normalisation layers are given: means of channels, and how far they moved."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from testtime._core.arrays import at_least_single
from testtime.adaptation.layers import NormLayer, hooked, on_input


def level(layer: NormLayer, inputs: Tensor) -> Tensor:
    """Mean input of each channel of a normalisation layer, for each sample: (B, channels)."""
    widths = [parameter.numel() for parameter in layer.module.parameters(recurse=False)]
    inputs = at_least_single(inputs)
    if inputs.dim() == 2:
        return inputs
    if layer.kind == "layer" and inputs.shape[1] not in widths:  # channels are last
        return inputs.flatten(1, -2).mean(1)
    return inputs.flatten(2).mean(2)


def _note(
    layer: NormLayer, into: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    into.append(level(layer, args[0]))


@contextmanager
def watched(layers: list[NormLayer], into: list[Tensor]) -> Iterator[None]:
    """While it lasts, the `level` of each normalisation layer is appended at each forward."""
    hooks = (  # before the library's own, which normalise
        on_input(layer.module, partial(_note, layer, into), prepend=True) for layer in layers
    )
    with hooked(hooks):
        yield


def shift(changed: list[Tensor], plain: list[Tensor], count: int) -> Tensor:
    """(count,) mean over layers and channels of the squared difference of levels.

    Where a layer sees several pieces of each image (windows), their mean; layers that see no
    samples are left out.
    """
    terms = [
        (ours - theirs).square().mean(-1).view(count, -1).mean(1)
        for ours, theirs in zip(changed, plain, strict=True)
        if ours.shape == theirs.shape and len(ours) % count == 0
    ]
    return torch.stack(terms).mean(0) if terms else torch.zeros((), device="cpu")
