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
                torch.rand(now.shape, generator=generator, device=now.device) < self.rate,
                was.to(now.dtype),
                now,
            )
            for now, was in zip(tensors, source, strict=True)
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
        pull = torch._foreach_mul(source, 1 - self.momentum)
        return [now + was.to(now.dtype) for now, was in zip(kept, pull, strict=True)]


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
        fisher = known["fisher"]
        terms = [
            (fisher[name] * (tensor - source_tensors[name]).square()).sum()
            for name, tensor in tensors.items()
        ]
        return self.weight * torch.stack(terms).sum()


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

    def __call__(self, average: float | None, loss: float) -> tuple[float | None, bool]:
        """The average after this loss (None after a recovery), and whether to recover."""
        average = loss if average is None else 0.9 * average + 0.1 * loss
        return (None, True) if average < self.threshold else (average, False)
