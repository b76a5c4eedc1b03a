"""Whether data look like the source's: in its normalisation layers, and in how sure its model is."""

import math
from collections.abc import Iterator, Sequence
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


def effect(found: Sums, mean: Tensor, variance: Tensor | None, floor: Tensor | float) -> Tensor:
    """How far samples lie from a reference: the mean over channels of Cohen's d squared, unbiased.

    Args:
        found: count of samples, `sum` and `square` of their summaries.
        mean: of the reference.
        variance: of the reference, between samples; None: that of the samples at hand.
        floor: added to the variance, so that channels that are always the same say nothing.

    Example:
        >>> found = {"count": 2.0, "sum": torch.tensor([4.0]), "square": torch.tensor([10.0])}
        >>> effect(found, torch.tensor([0.0]), torch.tensor([1.0]), 0.0)
        tensor(3.)
    """
    count = found["count"]
    average = found["sum"] / count
    own = (found["square"] / count - average.square()).clamp(min=0) * count / (count - 1)
    against = (own if variance is None else variance) + floor
    return (((average - mean).square() - own / count) / against).mean()


def pooled(old: Sums | None, samples: Tensor, most: int) -> Sums:
    """Sums over the last `most` samples, about: older ones fade where these are fewer."""
    fresh: Sums = {
        "count": float(len(samples)), "sum": samples.sum(0), "square": samples.square().sum(0),
    }  # fmt: skip
    if old is None or len(samples) >= most:
        return fresh
    share = min(1.0, (most - len(samples)) / old["count"])
    return {name: share * old[name] + fresh[name] for name in fresh}


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
        self._watched: list[tuple[str, Tensor, Tensor | None, Tensor]] = []
        self._entropy: tuple[Tensor, Tensor] | None = None
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
        self._watched = [(layer.name, *_reference(layer, known)) for layer in self._layers]
        if known:
            self._entropy = known["entropy.mean"], known["entropy.var"]

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
        seen = {**self._seen, "entropy": at_least_single(values)[:, None]}
        latest, longer = (
            {name: pooled(old.get(name), own, most) for name, own in seen.items()}
            for old, most in zip(self._recent, (self.samples, LONG * self.samples), strict=True)
        )
        told = self._told()
        references = [*self._watched, *([] if told is None else [("entropy", *told, 1e-6)])]
        references = [ref for ref in references if latest.get(ref[0], {"count": 0})["count"] > 1]
        nought = 0 * seen["entropy"].sum()  # no number where an entropy is none
        moved = [
            effect(latest[name], longer[name]["sum"] / longer[name]["count"], variance, floor)
            for name, _, variance, floor in references
        ]
        apart = [
            [self._apart(own[name], *reference) for name, *reference in references]
            for own in (latest, longer)
        ]
        most = torch.stack([torch.stack([*each, nought]).max() for each in (moved, *apart)])
        away, now, most = most.tolist()  # in one wait for the device
        if away > self.effect**2:
            longer, most = latest, now
        self.found = math.sqrt(max(now, most, 0.0)) if references else math.inf
        if math.isnan(now):
            return True
        self._recent = latest, longer
        few = latest["entropy"]["count"] < self.samples / 4
        opened = few or self.found > self.effect
        if not opened and self._entropy is None and (self._calm or {"count": 0})["count"] < CALM:
            self._calm = pooled(self._calm, seen["entropy"], CALM + len(values))
        return opened

    def _apart(self, found: Sums, mean: Tensor, variance: Tensor | None, floor: Any) -> Tensor:
        """The squared effect, in units of what `samples` may show."""
        more = min(max(found["count"] / self.samples, 1.0), LONG)
        return more * effect(found, mean, variance, floor)

    def _told(self) -> tuple[Tensor, Tensor] | None:
        """Mean and variance of the source's entropy, once they are known."""
        if self._entropy is not None:
            return self._entropy
        if self._calm is None or self._calm["count"] < CALM:
            return None
        mean = self._calm["sum"] / self._calm["count"]
        return mean, self._calm["square"] / self._calm["count"] - mean.square()

    def reset(self) -> None:
        """Forgets the stream."""
        self._recent: tuple[dict[str, Sums], dict[str, Sums]] = {}, {}
        self._calm: Sums | None = None

    def state_dict(self) -> dict[str, Any]:
        """The samples that are judged together, and the entropy of those that were calm."""
        return {"recent": list(self._recent), "calm": self._calm}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            StateError: another version kept other things.
        """
        if not isinstance(state["recent"], list | tuple) or len(state["recent"]) != 2:
            raise StateError(
                "recent holds one sum; expected two, of the latest samples and of more. It was kept by "
                "another version of testtime. Begin anew: reset()."
            )
        latest, longer = state["recent"]
        self._recent, self._calm = (latest, longer), state["calm"]


def _reference(
    layer: NormLayer, known: dict[str, Tensor] | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mean and variance of summaries on source data, and what is added to the variance."""
    if known:
        variance = known[f"{layer.name}.var"]
        return known[f"{layer.name}.mean"], variance, 1e-6 + 1e-3 * variance.mean()
    buffers = layer.module._buffers
    mean, var = (at_least_single(buffers[f"running_{what}"]) for what in ("mean", "var"))  # pyright: ignore[reportArgumentType]
    energy = var + mean.square()
    # channels that are nearly constant in training: a deviation of the layer's own eps is none
    floor = torch.cat([1e-3 * var + layer.eps, 1e-3 * energy.square() + layer.eps])
    return torch.cat([mean, energy]), None, floor


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
