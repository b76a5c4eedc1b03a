"""Whether data look like the source's: in its normalisation layers, and in how sure its model is."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.errors import NeedsSource, StateError
from testtime._core.options import in_range, whole
from testtime.adaptation.kernels.batch_statistics import row_sums
from testtime.adaptation.layers import NormLayer, hooked, norm_layers, on_input
from testtime.adaptation.outputs import rows
from testtime.measures.entropy import entropy

if TYPE_CHECKING:
    from testtime.adaptation.fitting import SourceBatch

LAYERS = 4
"""Normalisation layers that are watched: the first, the last, and between them at equal steps."""
LONG = 4
"""How many times as many samples are judged as well, whose mean is twice as certain: by half the bound."""
CALM = 256
"""Samples that looked like the source's from which their entropy is known, where nobody told it."""
Sums = dict[str, Any]
"""Over samples: `count` of each signal; `sum` and `square` by channel, one signal beside another."""
Reference = tuple[Tensor, Tensor, Tensor]
"""Mean and variance of a signal on source data, and what is added to the variance, by channel."""


def summaries(layer: NormLayer, x: Tensor) -> Tensor:
    """Mean and mean square of each channel of each sample of a layer's input: (n, 2 channels).

    Example:
        >>> layer = NormLayer("norm", torch.nn.BatchNorm2d(1), "batch", ())
        >>> summaries(layer, torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[2., 5.]])
    """
    if x.is_nested:  # as torch's encoders leave padding out
        return torch.cat([summaries(layer, sample[None]) for sample in x.unbind()])
    x = at_least_single(x.detach())
    own = next((t for t in layer.module._parameters.values() if t is not None), None)
    own = layer.module._buffers.get("running_mean") if own is None else own
    width = 0 if own is None else own.numel()
    if x.dim() > 2 and x.shape[1] != width and x.shape[-1] == width:
        x = x.movedim(-1, 1)
    x = x.flatten(2) if x.dim() > 2 else x[..., None]
    return torch.cat(row_sums(x), 1).div_(x.shape[2])


@contextmanager
def summarised(layers: Sequence[NormLayer], into: dict[str, Tensor]) -> Iterator[None]:
    """While it lasts, a forward notes the `summaries` of what enters each layer, by its name."""

    def see(layer: NormLayer) -> Any:
        return lambda _, args: into.update({layer.name: summaries(layer, args[0])})

    with hooked(on_input(layer.module, see(layer)) for layer in layers):
        yield


def effect(
    count: Tensor | float, sums: Tensor, squares: Tensor, mean: Tensor, variance: Tensor, floor: Any
) -> Tensor:
    """How far samples lie from a reference in each channel: Cohen's d squared, unbiased.

    Args:
        count: of the samples.
        sums: of what they show, (..., channels).
        squares: of its square.
        mean: of the reference.
        variance: of the reference, between samples; NaN: that of the samples at hand.
        floor: added to the variance, so that channels that are always the same say nothing.

    Example:
        >>> mean, variance = torch.tensor([0.0, 0.0]), torch.tensor([1.0, torch.nan])
        >>> effect(2.0, torch.tensor([4.0, 4.0]), torch.tensor([10.0, 10.0]), mean, variance, 0.0)
        tensor([3.0000, 1.5000])
    """
    average = sums / count
    own = (squares / count - average.square()).clamp(min=0) * count / (count - 1)
    against = torch.where(variance.isnan(), own, variance) + floor
    return ((average - mean).square() - own / count) / against


def summed(signals: Iterable[Tensor]) -> Sums:
    """Sums over the samples of signals of (n, channels) each, one signal beside another."""
    signals = list(signals)
    return {
        "count": [float(len(own)) for own in signals],
        "sum": torch.cat([own.sum(0) for own in signals]),
        "square": torch.cat([own.square().sum(0) for own in signals]),
    }


def pooled(old: Sums | None, fresh: Sums, most: int, signal: Tensor) -> Sums:
    """Sums over the last `most` samples, about: older ones fade where the fresh are fewer.

    A signal of which nothing is fresh, as of a layer that did not run, is forgotten: nothing would
    ever make its older samples fade.

    Args:
        old: until now.
        fresh: of a batch.
        most: samples of each signal.
        signal: whose channel each is, (channels,).
    """
    if old is None:
        return fresh
    counts = list(zip(old["count"], fresh["count"], strict=True))
    shares = [min(1.0, max(most - new, 0.0) / n) if n and new else 0.0 for n, new in counts]
    share = fresh["sum"].new_tensor(shares)[signal]
    return {
        "count": [own * count + new for own, (count, new) in zip(shares, counts, strict=True)],
        "sum": share * old["sum"] + fresh["sum"],
        "square": share * old["square"] + fresh["square"],
    }


class SourceLike:
    """A gate that opens when what comes in is further from the source than a medium effect.

    It watches the inputs of four normalisation layers of the source model, as mean and mean square
    of each channel, and the entropy of its predictions. Each is compared with the source in units
    of the deviation between samples (Cohen's d), so that the bound means the same for every model,
    layer and batch size. The reference is what `fit_source(..., gate=True)` knows; else the
    statistics that batch normalisation stored in training, and for the entropy the first samples
    that looked like the source by these.

    Four times as many samples are judged, too, with half the bound, which shows milder shifts and is
    as rarely wrong. Of these the older are forgotten where the latest lie apart from them.

    Args:
        effect: d from which a shift counts; 0.5 is what Cohen calls a medium effect.
        samples: that are judged together, the latest ones; larger batches are judged alone. A
            stream of smaller batches is learnt from until a quarter of them are there.

    Reference: Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988.
    """

    def __init__(self, *, effect: float = 0.5, samples: int = 64) -> None:
        in_range(0, effect=effect)
        whole(8, samples=samples)
        self.effect, self.samples = effect, samples
        self.found = 0.0
        self._layers: list[NormLayer] = []
        self._references: list[Reference] = []
        self._entropy: Reference | None = None
        self._seen: dict[str, Tensor] = {}
        self.reset()

    def begin(self, layers: Sequence[NormLayer], known: dict[str, Tensor] | None) -> None:
        """Takes up its references.

        Args:
            layers: of the model, in order of execution.
            known: what `Signals` found on source data, or None.

        Raises:
            NeedsSource: nothing is known of the source, and no layer stored statistics.
        """
        layers = [
            layer
            for layer in layers
            if (f"{layer.name}.mean" in known if known else layer.has_statistics)
        ]
        if not layers:
            raise NeedsSource(
                "the gate has nothing to compare with: no layer of this model stored statistics of "
                "the source. Give source=tt.fit_source(model, loader, gate=True), with a loader of "
                "about 2000 source samples."
            )
        steps = min(LAYERS, len(layers))
        places = [round(i * (len(layers) - 1) / max(steps - 1, 1)) for i in range(steps)]
        self._layers = [layers[place] for place in dict.fromkeys(places)]
        self._references = [_reference(layer, known) for layer in self._layers]
        means = [mean for mean, *_ in [*self._references, self._told()]]
        self._widths = [len(mean) for mean in means]
        self._signal = torch.cat([torch.full_like(m, i).long() for i, m in enumerate(means)])
        if known:
            self._entropy = _of_entropy(known["entropy.mean"], known["entropy.var"])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The forward inside is the one that the next `update` judges."""
        self._seen = {}
        with summarised(self._layers, self._seen):
            yield

    def update(self, values: Tensor, /) -> bool:
        """Whether the batch, with those before it where it is small, lies apart from the source.

        One that holds what is no number does, and is not remembered.
        """
        fresh = summed([*self._shown(), at_least_single(values)[:, None]])
        latest, longer = (
            pooled(old, fresh, most, self._signal)
            for old, most in zip(self._recent, (self.samples, LONG * self.samples), strict=True)
        )
        moved, now, most = self._apart(latest, longer)
        if moved > self.effect**2:
            longer, most = latest, now
        self.found = math.sqrt(max(now, most, 0.0))
        if math.isnan(now):
            return True
        self._recent = latest, longer
        *layers, entropies = latest["count"]
        nothing = max(layers) < 2 and not self._knows_entropy
        few = entropies < self.samples / 4 or nothing
        opened = few or self.found > self.effect
        if not opened and not self._knows_entropy:
            own = {name: every[-1:] for name, every in fresh.items()}
            self._calm = pooled(self._calm, own, CALM + len(values), 0 * self._signal[:1])
        return opened

    def _shown(self) -> Iterator[Tensor]:
        """What each layer showed in the last forward; no samples where it did not run."""
        for layer, (mean, *_) in zip(self._layers, self._references, strict=True):
            yield self._seen.get(layer.name, mean.new_zeros(0, len(mean)))

    def _apart(self, latest: Sums, longer: Sums) -> tuple[float, float, float]:
        """The largest of the signals' squared effects; no number where an entropy is none.

        Args:
            latest: sums over `samples`.
            longer: over `LONG` times as many.

        Returns:
            Of the latest beside the longer; then of each beside the source, in units of what
            `samples` may show.
        """
        rows = latest, latest, longer
        references = zip(*self._references, self._told(), strict=True)
        mean, variance, floor = (torch.cat(each) for each in references)
        counts = mean.new_tensor([own["count"] for own in rows])
        sums, squares = (torch.stack([own[name] for own in rows]) for name in ("sum", "square"))
        count = counts[:, self._signal]
        means = torch.stack([sums[2] / count[2], mean, mean])
        channels = effect(count, sums, squares, means, variance, floor)
        channels = torch.where(count > 1, channels, 0 * sums)
        signals = torch.stack([each.mean(1) for each in channels.split(self._widths, 1)], 1)
        signals[1:] *= (counts[1:] / self.samples).clamp(1, LONG)
        moved, now, most = signals.amax(1).tolist()  # in one wait for the device
        return moved, now, most

    @property
    def _knows_entropy(self) -> bool:
        return self._entropy is not None or _count(self._calm) >= CALM

    def _told(self) -> Reference:
        """The source's entropy; until it is known, one that nothing lies apart from."""
        if self._entropy is not None:
            return self._entropy
        if self._calm is None or not self._knows_entropy:
            nothing = torch.zeros_like(self._references[0][0][:1])
            return nothing, nothing + math.inf, nothing
        mean = self._calm["sum"] / _count(self._calm)
        return _of_entropy(mean, self._calm["square"] / _count(self._calm) - mean.square())

    def reset(self) -> None:
        """Forgets the stream."""
        self._recent: tuple[Sums | None, Sums | None] = None, None
        self._calm: Sums | None = None

    def state_dict(self) -> dict[str, Any]:
        """The samples that are judged together, and the entropy of those that were calm."""
        return {"recent": list(self._recent), "calm": self._calm}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            StateError: another version kept other things.
        """
        recent = state["recent"]
        if len(recent) != 2 or any(own is not None and "sum" not in own for own in recent):
            raise StateError(
                f"recent holds {recent!r:.60}; expected two sums, of the latest samples and of more. It "
                "was kept by another version of testtime. Begin anew: reset()."
            )
        latest, longer = state["recent"]
        self._recent, self._calm = (latest, longer), state["calm"]


def _reference(layer: NormLayer, known: dict[str, Tensor] | None) -> Reference:
    """Of a layer's summaries."""
    if known:
        mean, variance = (known[f"{layer.name}.{what}"] for what in ("mean", "var"))
        return mean, variance, torch.full_like(mean, 1e-6) + 1e-3 * variance.mean()
    buffers = layer.module._buffers
    mean, var = (at_least_single(buffers[f"running_{what}"]) for what in ("mean", "var"))  # pyright: ignore[reportArgumentType]
    energy = var + mean.square()
    # channels that are nearly constant in training: a deviation of the layer's own eps is none
    floor = torch.cat([1e-3 * var + layer.eps, 1e-3 * energy.square() + layer.eps])
    return torch.cat([mean, energy]), torch.full_like(floor, math.nan), floor


def _of_entropy(mean: Tensor, variance: Tensor) -> Reference:
    mean, variance = mean.reshape(1), variance.reshape(1)
    return mean, variance, torch.full_like(mean, 1e-6)


def _count(sums: Sums | None) -> float:
    """Samples of the only signal."""
    return 0.0 if sums is None else sums["count"][0]


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What `SourceLike` knows of source data: summaries of normalisation layers, and entropy."""

    name: ClassVar[str] = "signals"

    def add(self, total: dict[str, Tensor], batch: "SourceBatch") -> dict[str, Tensor]:
        """Sums up each summary and its square."""
        found: dict[str, Tensor] = {}
        with summarised(norm_layers(batch.engine.loan.model), found):
            _, logits = batch.engine.frozen(batch.inputs)
        found["entropy"] = relative(rows(logits))[:, None]
        new = dict(total)
        for name, each in found.items():
            own = each.double()
            for what, value in ((".sum", own.sum(0)), (".square", own.square().sum(0))):
                new[name + what] = new.get(name + what, 0) + value
            count = f"{name}.count"
            new[count] = new.get(count, 0) + torch.tensor(float(len(own)), device=own.device)
        return new

    def finish(self, total: dict[str, Tensor], *, samples: int, batches: int) -> dict[str, Tensor]:
        """Mean and variance between samples, in float32."""
        known: dict[str, Tensor] = {}
        for name in (key.removesuffix(".count") for key in total if key.endswith(".count")):
            mean = total[f"{name}.sum"] / total[f"{name}.count"]
            variance = total[f"{name}.square"] / total[f"{name}.count"] - mean.square()
            known |= {f"{name}.mean": mean.float(), f"{name}.var": variance.clamp(min=0).float()}
        return known


def relative(logits: Tensor) -> Tensor:
    """Entropy of each prediction over that of a uniform one, from 0 to 1.

    Example:
        >>> relative(torch.zeros(1, 4))
        tensor([1.])
    """
    return entropy(logits) / most_entropy(logits)


def most_entropy(logits: Tensor) -> float:
    """Entropy of a uniform prediction; that of two classes where there is but one.

    Example:
        >>> most_entropy(torch.zeros(1, 2))
        0.6931471805599453
    """
    return math.log(max(logits.shape[1], 2))
