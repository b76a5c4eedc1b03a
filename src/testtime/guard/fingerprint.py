"""Uncertainty fingerprint: a second head that notices faulty hardware (2024).

    given: a trained network, a prediction head on features b(x)
    train a small head u on fault-free features: minimise mean ( max_k u(b(x))_k - 1 )²
    band [low, high] ← quantiles 0.5 % and 99.5 % of F = max_k u(b(x))_k on fault-free data,
        or mean F ± 3 standard deviations of F
    while running: one forward gives the prediction and F; a sample outside of the band is flagged
    faulty, if more than a share of the last samples is flagged

The network and its prediction stay as they are, to the bit. That F is the largest output, and the
rule of the band, are our reading of the paper; what is guaranteed of detection is nothing: a fault
that does not move the features far is not seen.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError, OptionError, ScopeError
from testtime._core.options import in_range, whole
from testtime._core.seeds import derive, generator, global_chance
from testtime.adaptation.layers import hooked, on_input
from testtime.adaptation.look import named_layer
from testtime.guard.borrow import borrowed
from testtime.guard.monitor import State, check_real
from testtime.measures.information.networks import adam, single, training

Band = Literal["quantiles", "deviations"]
DEVIATIONS = 3
"""Standard deviations from the mean to either end of the band "deviations"."""


class Reading(NamedTuple):
    """What one forward gives: the model's own output, and the fingerprint of each sample (n,)."""

    output: Any
    fingerprint: Tensor


@dataclass(frozen=True)
class FaultAlarm:
    """What `FaultMonitor` says.

    Attributes:
        raised: whether more than the allowed share of the latest samples was flagged, at any time.
        share: flagged share of the latest samples.
        flagged: (n,) bool, which samples of this batch lie outside of the band; NaN does.
    """

    raised: bool
    share: float
    flagged: Tensor

    def __bool__(self) -> bool:
        return self.raised


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Fingerprint:
    """A head on the features of a network that answers 1 while nothing is broken.

    Attributes:
        head: maps features (n, d) to (n, k); F is the largest of the k.
        low, high: the band of fault-free fingerprints.
        layer: name of the layer whose input are the features; None: the linear layer that runs last.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
        >>> x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
        >>> fingerprint = Fingerprint.fit(model, [x], epochs=40)
        >>> output, f = fingerprint.read(model, x)
        >>> torch.equal(output, model(x)), bool(((f > 0.5) & (f < 1.5)).double().mean() > 0.95)
        (True, True)

    Reference: Concurrent Self-testing of Neural Networks Using Uncertainty Fingerprint, 2024
    (arXiv 2401.01458).
    """

    head: nn.Module
    low: float
    high: float
    layer: str | None = None

    @staticmethod
    def fit(
        model: nn.Module,
        batches: Iterable[Tensor],
        *,
        layer: str | None = None,
        hidden: int = 64,
        outputs: int = 10,
        band: Band = "quantiles",
        outside: float = 0.01,
        lr: float = 2e-3,
        epochs: int = 60,
        batch_size: int = 64,
        seed: int = 0,
    ) -> "Fingerprint":
        """Trains the head on fault-free inputs; the model is not changed.

        Args:
            model: the network on fault-free hardware; what it returns is of no account.
            batches: inputs, no labels.
            layer: name of the layer whose input are the features; None: the linear layer that runs
                last.
            hidden: width of the head's hidden layer.
            outputs: values that the head gives.
            band: "quantiles" of the fault-free fingerprints; or "deviations", their mean ± 3 standard
                deviations, which a few odd samples widen. Which of them the paper has is not sure.
            outside: share of fault-free samples outside of the quantiles, half on each side; 0.01.
                The other band does not read it.
            lr: step size of Adam.
            epochs: passes over the features.
            batch_size: features in a step.
            seed: of weights and order.

        Raises:
            InputError: fewer than two samples, or features that are not finite or too large.
            ScopeError: the model has no linear layer, and none was named.
            OptionError: an option is out of its range.
        """
        whole(1, hidden=hidden, outputs=outputs, epochs=epochs, batch_size=batch_size)
        if band not in ("quantiles", "deviations"):
            raise OptionError(f"band is {band!r}; expected 'quantiles' or 'deviations'")
        in_range(0, 1, outside=outside)
        in_range(0, lr=lr)
        seen = [_forward(model, x, layer)[1] for x in batches]
        if sum(map(len, seen)) < 2:
            raise InputError("fewer than two samples were given; expected some hundreds.")
        features = torch.cat(seen).float()
        if not bool(features.isfinite().all()):
            raise InputError(
                "features hold NaN or infinite values; the model may be faulty already."
            )
        chance = generator(seed, "fingerprint")
        with global_chance(derive(seed, "fingerprint", "weights"), []), training():
            with torch.device("cpu"):
                first, last = (
                    nn.Linear(*widths, dtype=torch.float32)
                    for widths in ((features.shape[1], hidden), (hidden, outputs))
                )
            head = nn.Sequential(first, nn.ReLU(), last).to(features.device)
            descend = adam(head, lr=lr)
            for _ in range(epochs):
                order = torch.randperm(len(features), generator=chance, device="cpu")
                for part in order.split(batch_size):
                    prints = head(features[part.to(features.device)]).amax(1)
                    descend((prints - 1).square().mean())
        head.requires_grad_(False)
        with single():
            known = head(features).amax(1).double()
        if not bool(known.isfinite().all()):
            raise InputError(
                f"training left the numbers: features go up to {float(features.abs().max()):.3g}. "
                "Name a layer with smaller ones, or take a lower lr."
            )
        if band == "quantiles":
            low, high = (float(known.quantile(q)) for q in (outside / 2, 1 - outside / 2))
        else:
            mean, away = float(known.mean()), DEVIATIONS * float(known.std())
            low, high = mean - away, mean + away
        return Fingerprint(head=head, low=low, high=high, layer=layer)

    def read(self, model: nn.Module, x: Tensor) -> Reading:
        """One forward of the model, which may be faulty by now, and the fingerprints.

        The output is the model's own in eval mode; modes, flags and the random state stay.

        Raises:
            ScopeError: the layer of the features did not run.
        """
        output, features = _forward(model, x, self.layer)
        with single():
            return Reading(output, self.head(features.float()).amax(1))


@final
@dataclass(frozen=True, kw_only=True)
class FaultMonitor:
    """Watches fingerprints, for use in `Monitor`: are more of the latest outside than there may be?

    A batch is fingerprints (n,). The share that is allowed is a rule of thumb, with no bound on
    false alarms over a long run; for one, watch flags with `Risk`.

    Args:
        low: lower end of the band of a `Fingerprint`.
        high: its upper end.
        window: latest samples that are counted; 20.
        limit: share of them that may be flagged; 0.2.

    Raises:
        OptionError: an option is out of its range, or low is above high.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> monitor = Monitor(FaultMonitor(low=0.9, high=1.1))
        >>> bool(monitor.update(torch.ones(20))), bool(monitor.update(torch.full((20,), torch.nan)))
        (False, True)
    """

    low: float
    high: float
    window: int = 20
    limit: float = 0.2

    def __post_init__(self) -> None:
        whole(1, window=self.window)
        in_range(0, 1, limit=self.limit)
        in_range(-math.inf, low=self.low, high=self.high)
        if self.low > self.high:
            raise OptionError(f"low is {self.low} and high {self.high}; expected low <= high")

    def init(self) -> State:
        """No sample seen."""
        return {
            "latest": torch.zeros(0, dtype=torch.bool, device="cpu"),
            "raised": torch.tensor(False, device="cpu"),
        }

    def step(self, state: State, fingerprints: Tensor) -> tuple[State, FaultAlarm]:
        """Counts flags, sample by sample, once the window is full.

        Raises:
            InputError: fingerprints are not (n,) with at least one sample.
        """
        check_real("fingerprints", fingerprints)
        if fingerprints.dim() != 1 or len(fingerprints) == 0:
            raise InputError(
                f"fingerprints have the shape {tuple(fingerprints.shape)}; expected (n,), n > 0."
            )
        inside = (fingerprints >= self.low) & (fingerprints <= self.high)
        flagged = ~inside.detach().cpu()  # NaN is inside of nothing
        latest = torch.cat([state["latest"], flagged])
        raised = bool(state["raised"])
        if len(latest) >= self.window:
            counts = latest.unfold(0, self.window, 1).sum(1)
            raised |= bool((counts > self.limit * self.window).any())
        latest = latest[-self.window :].clone()
        share = float(latest.double().mean())
        state = {"latest": latest, "raised": torch.tensor(raised, device="cpu")}
        return state, FaultAlarm(raised, share, flagged)


def _forward(model: nn.Module, x: Tensor, layer: str | None) -> tuple[Any, Tensor]:
    """The model's output, and the features (n, d) that entered the layer."""
    chosen, entered = named_layer(model, layer), list[Tensor]()
    watched = [chosen] if chosen else [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = (on_input(each, lambda _, args: entered.append(args[0].detach())) for each in watched)
    with hooked(hooks), borrowed(model):
        output = model(x)
    if not entered:
        raise ScopeError(
            "no linear layer ran, so there are no features; name the layer whose input they are."
        )
    features = entered[-1].flatten(1)
    if len(features) != len(x):
        raise ScopeError(
            f"the layer sees {tuple(entered[-1].shape)} for {len(x)} samples; name another one."
        )
    return output, features
