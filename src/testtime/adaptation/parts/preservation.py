"""What keeps source knowledge?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from testtime._core.options import in_range
from testtime.adaptation.parts.knowledge import Fisher


@dataclass(frozen=True, kw_only=True)
class StochasticRestoration:
    """Each entry of the adapted tensors returns to its source value with a probability.

    Args:
        rate: the probability; 0.01 in CoTTA for CIFAR, 0.001 for ImageNet.
    """

    rate: float

    def __post_init__(self) -> None:
        in_range(0, 1, rate=self.rate)

    def __call__(
        self, tensors: list[Tensor], source: list[Tensor], generator: torch.Generator
    ) -> list[Tensor]:
        if not self.rate:
            return tensors
        return [
            torch.where(
                torch.rand(now.shape, generator=generator, device=now.device, dtype=torch.float32)
                < self.rate,
                was.to(now.dtype),
                now,
            )
            for now, was in zip(tensors, source, strict=True)
        ]


def quantile(tensors: list[Tensor], share: float) -> Tensor:
    """The quantile of all entries of some tensors, linear between two; without sorting them.

    Exact for any number of entries, where `torch.quantile` takes 16 million. A sample says between
    which values it lies, and the few entries between them are sorted (Floyd and Rivest, 1975).

    Args:
        tensors: of any shapes, without NaN.
        share: of the entries that lie below, from 0 to 1.

    Example:
        >>> quantile([torch.tensor([4.0, 1.0]), torch.tensor([[2.0]])], 0.25)
        tensor(1.5000)
    """
    entries = torch.cat([tensor.flatten() for tensor in tensors])
    place = share * (len(entries) - 1)
    rank = int(place)
    sample = entries[:: round(len(entries) ** (1 / 3))].sort().values
    middle, spread = rank * len(sample) // len(entries), 2 * math.isqrt(len(sample))
    low, high = sample[max(0, middle - spread)], sample[min(middle + spread, len(sample) - 1)]
    under = entries < low
    before, near = int(under.count_nonzero()), entries[(entries <= high) ^ under]
    if not before <= rank < before + len(near) - 1:  # the sample misled
        before, near = 0, entries
    near = near.sort().values[rank - before :][:2]
    return near[0] + (near[-1] - near[0]) * (place - rank)


@dataclass(frozen=True, kw_only=True)
class LeastImportant:
    """Entries whose squared gradient is below a quantile of all: little hangs on them now.

    Args:
        share: of the entries; 0.03 in PETAL and PSMT for CIFAR, 0.003 in PETAL for ImageNet.
    """

    share: float

    def __post_init__(self) -> None:
        in_range(0, 1, share=self.share)

    def masks(self, grads: list[Tensor]) -> list[Tensor]:
        """Where the entries are, for each tensor."""
        importance = torch._foreach_mul(grads, grads)
        threshold = quantile(list(importance), self.share)
        return [values < threshold for values in importance]


@dataclass(frozen=True, kw_only=True)
class SelectedRestoration:
    """Returns the least important entries of the adapted tensors to the source after each step.

    Args:
        chosen: which they are.
    """

    chosen: LeastImportant

    def __call__(
        self, tensors: list[Tensor], source: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor]:
        return put_back(tensors, source, self.chosen.masks(grads))


def put_back(tensors: list[Tensor], source: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Tensors with the source's values where the masks say so."""
    return [
        torch.where(mask, was.to(now.dtype), now)
        for now, was, mask in zip(tensors, source, masks, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class SourcePull:
    """Averages what adapts with the source after each step: m tensors + (1 - m) source.

    Args:
        momentum: m; 0.99 in ROID.
    """

    momentum: float

    def __post_init__(self) -> None:
        in_range(0, 1, momentum=self.momentum)

    def __call__(self, tensors: list[Tensor], source: list[Tensor]) -> list[Tensor]:
        if self.momentum == 1:
            return tensors
        kept = torch._foreach_mul(tensors, self.momentum)
        torch._foreach_add_(kept, torch._foreach_mul(source, 1 - self.momentum))
        return list(kept)


@dataclass(frozen=True, kw_only=True)
class FisherPenalty:
    """Distance from the source, weighed by Fisher information: weight * sum_j F_j (t_j - s_j)^2.

    Args:
        weight: beta of EATA; 2000 for ImageNet, 1 for CIFAR.
    """

    weight: float
    needs: ClassVar[tuple[Fisher, ...]] = (Fisher(),)

    def __post_init__(self) -> None:
        in_range(0, weight=self.weight)

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        source_tensors: Mapping[str, Tensor],
        known: Mapping[str, Mapping[str, Tensor]],
    ) -> Tensor:
        return self.weight * weighted_distance(tensors, source_tensors, known["fisher"])


def weighted_distance(
    tensors: Mapping[str, Tensor], centres: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Tensor:
    """sum_j w_j (t_j - c_j)^2 over all entries of all tensors."""
    terms = [
        (weights[name] * (tensor - centres[name]).square()).sum()
        for name, tensor in tensors.items()
    ]
    return torch.stack(terms).sum()


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Back to the source when the moving average of the loss has fallen below a threshold.

        e <- 0.9 e + 0.1 loss        (e = loss the first time)

    Args:
        threshold: in nats; 0.2 in SAR, made for 1000 classes (0.029 ln C).
    """

    threshold: float

    def __post_init__(self) -> None:
        in_range(-math.inf, threshold=self.threshold)

    def __call__(self, average: float | None, loss: float) -> tuple[float, bool]:
        """The average after this loss, and whether to recover, which forgets it."""
        average = loss if average is None else 0.9 * average + 0.1 * loss
        return average, average < self.threshold
