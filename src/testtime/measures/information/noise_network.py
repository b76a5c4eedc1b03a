"""The network by which MINDE's estimators predict noise, and how it is trained.

Reference: Franzese, Bounoua, Michiardi, MINDE: Mutual Information Neural Diffusion Estimation, ICLR 2024.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from testtime._core.errors import OptionError
from testtime._core.options import in_range, whole
from testtime.measures.information.networks import Averaged, adam, linear, training
from testtime.measures.information.variational import batches, check_training

FREQUENCIES = 16
"""Frequencies, of whose sines and cosines the network reads each time."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained to predict noise, and evaluated; options of `minde`.

    Raises:
        OptionError: for an option out of its range.

    Example:
        >>> Training(importance=True, width=12, steps=1, batch_size=2, lr=0.1, decay=0, draws=1)
        Traceback (most recent call last):
        testtime._core.errors.OptionError: width is 12; expected a multiple of 8
    """

    importance: bool
    width: int
    steps: int
    batch_size: int
    lr: float
    decay: float
    draws: int
    trace: bool = False

    def __post_init__(self) -> None:
        check_training(steps=self.steps, batch_size=self.batch_size, lr=self.lr)
        whole(1, draws=self.draws)
        in_range(0, 1, decay=self.decay)
        whole(8, width=self.width)
        if self.width % 8:
            raise OptionError(f"width is {self.width}; expected a multiple of 8")

    def fit(
        self,
        samples: Sequence[Tensor],
        loss: Callable[["NoiseNetwork", list[Tensor]], Tensor],
        *,
        dims: int,
        random: torch.Generator,
    ) -> tuple[nn.Module, tuple[float, ...]]:
        """The running mean of a network that falls down `loss`, and the loss of each step if asked for.

        Args:
            samples: sets to draw a batch from in each step.
            loss: of the network and the indices of a batch of each set.
            dims: coordinates that the network predicts.
            random: of weights and batches.
        """
        values: list[float] = []
        with training():
            network = NoiseNetwork(dims, self.width, random).to(samples[0].device)
            averaged = Averaged(network, decay=self.decay)
            descend = adam(network, lr=self.lr, decay_over=self.steps)
            indices = [batches(len(own), self.batch_size, self.steps, random) for own in samples]
            for chosen in zip(*indices, strict=True):
                value = loss(network, list(chosen))
                descend(value)
                averaged.follow(network)
                if self.trace:
                    values.append(float(value.detach()))
        return averaged.network, tuple(values)


class NoiseNetwork(nn.Module):
    """Predicts the noise of all coordinates: one residual block on [h, skip], zero at first.

    Example:
        >>> network = NoiseNetwork(3, 16, torch.Generator().manual_seed(0))
        >>> network(torch.ones(2, 3), torch.ones(2, 2)).abs().sum()
        tensor(0., grad_fn=<SumBackward0>)
    """

    frequencies: Tensor

    def __init__(self, dims: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.enter = linear(dims, width, generator)
        self.times = nn.Sequential(
            linear(4 * FREQUENCIES, width, generator),
            nn.SiLU(),
            linear(width, 2 * width, generator),
        )
        self.first = nn.Sequential(_norm(width), nn.SiLU(), linear(width, width, generator))
        self.second = nn.Sequential(
            _norm(2 * width), nn.SiLU(), linear(2 * width, width, generator)
        )
        self.third = nn.Sequential(_norm(width), nn.SiLU(), linear(width, width, generator))
        self.leave = nn.Sequential(_norm(width), nn.SiLU(), linear(width, dims, generator))
        for parameter in self.leave[2].parameters():
            nn.init.zeros_(parameter)
        self.register_buffer(
            "frequencies",
            math.pi
            * torch.logspace(-1, 7, FREQUENCIES, base=2.0, dtype=torch.float32, device="cpu"),
        )

    def forward(self, z: Tensor, tau: Tensor) -> Tensor:
        angles = (tau[..., None] * self.frequencies).flatten(1)
        early, late = self.times(torch.cat([angles.sin(), angles.cos()], 1)).chunk(2, 1)
        skip = self.enter(z)
        h = skip + self.first(skip) + early
        h = h + self.third(self.second(torch.cat([h, skip], 1)) + late)
        return self.leave(h)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, width, device="cpu", dtype=torch.float32)
