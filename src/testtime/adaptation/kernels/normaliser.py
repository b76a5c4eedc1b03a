"""What a layer does in place of its own normalisation: it uses the moments that a method chose."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testtime.adaptation.kernels.as_written import normalise_as_written
from testtime.adaptation.kernels.calls import transformed
from testtime.adaptation.kernels.moments import (
    moments,
    normalise,
    normalise_blended,
)
from testtime.adaptation.parts.statistics import (
    AdaptiveMixture,
    Averages,
    BatchStatistics,
    MixedStatistics,
    Moments,
    RunningStatistics,
    Statistics,
)
from testtime.adaptation.ranks import Ranks


@dataclass(frozen=True)
class Normaliser:
    """A pre-hook: measures the batch and makes its layer normalise with the chosen moments.

    Where a gradient must flow through the moments, and for batch statistics, the hook normalises
    itself and leaves only scale and shift to the layer; else it hands the moments over as running
    statistics.

    Args:
        layer: that it belongs to.
        name: of the layer.
        eps: that the layer adds to the variance.
        source: moments that the layer stored in training.
        statistics: what it normalises with.
        averages: moving averages before the batch, with `RunningStatistics`.
        fresh: where those after the batch are written.
        samples: of the batch; a layer may see several pieces of each.
        ranks: over whom moments are taken.
    """

    layer: nn.Module
    name: str
    eps: float
    source: Moments
    statistics: Statistics
    averages: Averages | None
    fresh: Averages | None
    samples: int
    ranks: Ranks

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        into, x, stored = module._buffers, *self._restated(args[0])
        into["running_mean"], into["running_var"] = stored
        return (x, *args[1:])

    def _restated(self, x: Tensor) -> tuple[Tensor, Moments]:
        """What the layer is given, and what it has to hold as running statistics then."""
        used = self.choose(x)
        learnt_through = torch.is_grad_enabled() and used.mean.requires_grad
        learnt_through |= transformed(x, *used)  # torch's kernel takes moments for constants
        # batch statistics take one path with and without a gradient: methods that compare two
        # forwards (OSTTA) must not see rounding in place of a difference
        if not learnt_through and not isinstance(self.statistics, BatchStatistics):
            held = (value.detach().to(self.source.mean.dtype) for value in used)
            return x, Moments(*held)
        mean = torch.zeros_like(self.source.mean)
        var = torch.ones_like(self.source.var) - self.eps
        return normalise(x, used, self.eps), Moments(mean, var)

    def in_place_of(self, module: Any) -> Callable[[Tensor], Tensor]:
        """The forward of torch's own layer, also for those who call it without the hooks.

        It passes over its input once where a gradient flows through moments that blend or move.
        """

        def forward(input: Tensor) -> Tensor:  # noqa: A002  (as torch calls it)
            x = input
            module._check_input_dim(x)
            weight, bias = module.weight, module.bias
            values = float(x.numel() // x.shape[1])
            blends = isinstance(self.statistics, MixedStatistics | RunningStatistics)
            full = x.dtype in (torch.float32, torch.float64) and blends and self.ranks.alone
            alike = full and module.weight is not None and module.bias is not None
            alike = alike and x.dtype == weight.dtype == bias.dtype
            if alike and values > 1 and (moving := self.moving(x.dtype)):
                mean, var, share = moving
                return F.batch_norm(x, mean, var, weight, bias, True, share, self.eps)
            as_written = alike and x.is_cpu and getattr(self.statistics, "robust", False)
            if not (as_written or (alike and torch.is_grad_enabled() and x.requires_grad)):
                # not by the buffers: a model may run a layer in two threads at once
                x, stored = self._restated(x)
                return F.batch_norm(x, *stored, weight, bias, False, 0.0, self.eps)
            blend = partial(self.blend, x, values=values)
            function = normalise_as_written if as_written else normalise_blended
            return function(x, weight, bias, blend, self.eps)

        return forward

    def moving(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """New averages, not yet moved, and their step, where torch's own kernel can move them."""
        statistics, old, fresh = self.statistics, self.averages, self.fresh
        if not isinstance(statistics, RunningStatistics) or not statistics.as_in_training:
            return None
        if not old or not fresh or not self.eps or old[f"{self.name}.mean"].dtype != dtype:
            return None
        mean, var = (fresh[f"{self.name}.{moment}"].clone() for moment in ("mean", "var"))
        fresh |= {f"{self.name}.mean": mean, f"{self.name}.var": var}
        return mean, var, statistics.share(self.layer, seen=int(old["seen"]))

    def choose(self, x: Tensor) -> Moments:
        """The moments to normalise with; moving averages are written to `fresh`."""
        batch, values = moments(x, self.ranks)
        return self.blend(x, batch, values=values)

    def blend(self, x: Tensor, batch: Moments, *, values: float) -> Moments:
        """The same, made of the batch's own moments, of `values` values a channel."""
        statistics, averages = self.statistics, self.averages
        if isinstance(statistics, MixedStatistics):
            samples = self.samples
            if not self.ranks.alone:
                samples = int(self.ranks.sum(x.new_tensor(float(samples))))
            return statistics.blend(self.source, batch, samples=samples, values=values)
        if isinstance(statistics, AdaptiveMixture):
            return statistics.blend(x, self.source, batch, values=values, ranks=self.ranks)
        if isinstance(statistics, RunningStatistics) and averages and self.fresh is not None:
            # a layer that runs again in this forward goes on from its last run
            old = Moments(self.fresh[f"{self.name}.mean"], self.fresh[f"{self.name}.var"])
            seen = int(averages["seen"])
            new = statistics.update(old, batch, layer=self.layer, seen=seen, values=values)
            self.fresh[f"{self.name}.mean"] = new.mean.detach()
            self.fresh[f"{self.name}.var"] = new.var.detach()
            return new if statistics.robust else batch
        return batch
