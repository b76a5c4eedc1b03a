"""What normalisation layers use: source statistics, this batch's, a mixture, or a moving average.

Only layers that stored statistics in training (batch normalisation, frozen or synchronised too)
are concerned; group, layer, instance and RMS normalisation know no batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from testtime._core.options import in_range
from testtime.adaptation.ranks import Ranks

Averages = dict[str, Tensor]
"""Moving averages: '<layer>.mean' and '<layer>.var' -> tensor, and 'seen' -> batches."""


class Moments(NamedTuple):
    """Mean and variance of each channel."""

    mean: Tensor
    var: Tensor


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """The statistics stored in training, as `model.eval()` uses them."""


@dataclass(frozen=True, kw_only=True)
class BatchStatistics:
    """Mean and biased variance of the batch in front of the layer (Nado et al. 2020)."""


@dataclass(frozen=True, kw_only=True)
class MixedStatistics:
    """A mixture of source and batch: (1 - a) source + a batch, for mean and variance alike.

    Args:
        alpha: weight of the batch; 0 is the source, 1 the batch.
        prior: instead, strength of the source in samples: a = n / (prior + n) for n samples
            (Schneider et al., NeurIPS 2020).
        unbiased: whether the batch's variance is the unbiased one, as in the published code that
            reads it from running statistics.
    """

    alpha: float | None = None
    prior: float | None = None
    unbiased: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None:
            in_range(0, 1, alpha=self.alpha)
        if self.prior is not None:
            in_range(0, prior=self.prior)

    def blend(self, source: Moments, batch: Moments, *, samples: int, values: float) -> Moments:
        """Mixes the moments of `samples` samples, `values` values a channel, into the source's."""
        share = self.alpha if self.alpha is not None else samples / ((self.prior or 0.0) + samples)
        return _mixed(source, unbiased(batch, values) if self.unbiased else batch, share)


@dataclass(frozen=True, kw_only=True)
class RunningStatistics:
    """A moving average that starts at the source: (1 - a) old + a batch, one step a batch.

    A layer that runs several times in a forward takes a step for each, as torch's does in training.

    Args:
        momentum: the step a; None is the cumulative mean, 1 / (batches seen + 1); "own" the step
            that each layer takes in training, where None counts the batches of that too, and 0.1
            for one that has no momentum.
        unbiased: whether the batch's variance is the unbiased one (torch's running statistics).
        robust: whether the forward that updates the average also normalises with it (RobustBN of
            RoTTA, gradients flow through the batch's share), or with the batch's own statistics.
    """

    momentum: float | Literal["own"] | None = 0.1
    unbiased: bool = True
    robust: bool = False

    def __post_init__(self) -> None:
        if self.momentum not in (None, "own"):
            in_range(0, 1, momentum=self.momentum)

    @property
    def as_in_training(self) -> bool:
        """Whether it is what torch's batch normalisation does in training."""
        return self.unbiased and not self.robust

    def share(self, layer: nn.Module, *, seen: int) -> float:
        """The step a of a layer on the batch after `seen` others."""
        momentum = self.momentum
        if momentum == "own":
            momentum = getattr(layer, "momentum", 0.1)
            if momentum is None:
                seen += int(getattr(layer, "num_batches_tracked", None) or 0)
        return 1 / (seen + 1) if momentum is None else momentum

    def update(
        self, old: Moments, batch: Moments, *, layer: nn.Module, seen: int, values: float
    ) -> Moments:
        """The average of a layer after one more batch; `seen` batches came before."""
        batch = unbiased(batch, values) if self.unbiased else batch
        return _mixed(old, batch, self.share(layer, seen=seen))

    def repeat(
        self,
        averages: Averages,
        before: Averages,
        after: Averages,
        *,
        layers: Mapping[str, nn.Module],
    ) -> Averages:
        """The averages of layers after a batch like the one that led from `before` to `after`.

        Its moments are m = before + (after - before) / a, so that it need not be seen again. That
        is exact for layers that run once in a forward.

        Example:
            >>> import torch
            >>> seen = [{"seen": torch.tensor(n), "norm.mean": torch.tensor(n * 1.0)} for n in (0, 1)]
            >>> layers = {"norm": nn.BatchNorm1d(1)}
            >>> RunningStatistics(momentum=0.5).repeat(seen[1], *seen, layers=layers)  # m = 2
            {'seen': tensor(2), 'norm.mean': tensor(1.5000)}
        """
        counts = [int(each["seen"]) for each in (before, averages)]
        moved = {"seen": averages["seen"] + 1}
        for name, now in averages.items():
            if name == "seen":
                continue
            layer = layers[name.rpartition(".")[0]]
            first, share = (self.share(layer, seen=count) for count in counts)
            ratio = share / first if first else 0.0
            moved[name] = now + share * (before[name] - now) + ratio * (after[name] - before[name])
        return moved


@dataclass(frozen=True, kw_only=True)
class AdaptiveMixture:
    """A mixture of source and batch whose weight the images themselves decide (AdaMixBN).

        d_ab = mean_ch (m_a - m_b)^2 + mean_ch (s_a - s_b)^2      of means m and deviations s
        weight of the source = mean_i clip(1 - d_ts / (d_ts + d_is + d_it), 0, 1)

    for the source s, the batch t (unbiased variance) and each of its images i. It is 1 where batch
    and source agree, and falls as they part.

    Reference: Zhang, Qi, Shi, Gao, DomainAdaptor, ICCV 2023.
    """

    def weight(
        self, x: Tensor, source: Moments, batch: Moments, *, values: float, ranks: Ranks
    ) -> Tensor:
        """The weight of the source, from a layer's input (B, ch, ...) and the batch's moments."""
        batch = unbiased(batch, values)
        source = Moments(*(moment.to(batch.mean.dtype) for moment in source))
        pixels = x.flatten(2) if x.dim() > 2 else x[..., None]
        own = pixels.to(batch.mean.dtype)
        alone = own.shape[-1] == 1  # a single pixel has no deviation
        images = Moments(own.mean(-1), own.var(-1, correction=0 if alone else 1))
        shift = _gap(batch, source)
        apart = shift + _gap(images, source) + _gap(images, batch)
        return ranks.mean((1 - shift / apart.clamp(min=1e-12)).clamp(0, 1))

    def blend(
        self, x: Tensor, source: Moments, batch: Moments, *, values: float, ranks: Ranks
    ) -> Moments:
        """Moments to normalise with: weight * source + (1 - weight) * batch."""
        share = self.weight(x, source, batch, values=values, ranks=ranks)
        batch = unbiased(batch, values)
        return Moments(
            share * source.mean + (1 - share) * batch.mean,
            share * source.var + (1 - share) * batch.var,
        )


def unbiased(batch: Moments, values: float) -> Moments:
    """Moments of `values` values a channel, with the unbiased variance for the biased one."""
    return Moments(batch.mean, batch.var * (values / max(values - 1, 1)))


def _mixed(old: Moments, new: Moments, share: float) -> Moments:
    """(1 - share) old + share new."""
    return Moments(
        (1 - share) * old.mean + share * new.mean, (1 - share) * old.var + share * new.var
    )


def _gap(one: Moments, other: Moments) -> Tensor:
    means = (one.mean - other.mean).square().mean(-1)
    return means + (_deviation(one) - _deviation(other)).square().mean(-1)


def _deviation(of: Moments) -> Tensor:
    # the root of zero has no slope
    return of.var.clamp(min=1e-12).sqrt()


Statistics = (
    SourceStatistics | BatchStatistics | MixedStatistics | AdaptiveMixture | RunningStatistics
)
