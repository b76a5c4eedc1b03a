"""Learning to reject with a fixed predictor (Mohri et al., ICLR 2024).

    given: a frozen predictor, samples x marked good (a = 1) or bad (a = -1), the cost c of a rejection
    target:    1[a = -1] 1[r > 0] + c 1[r <= 0]                              # r > 0 accepts
    surrogate: e^( (α/2) (r - a) ) + c e^( -β r )                            # convex in r
               β = (α/2) ( e^(α/2) + ((1 - c) / c) e^(-α/2) )
    train r on (x, f(x)); sweep c for precision against coverage

With this β the surrogate's minimiser accepts exactly where P(good | x) > 1 - c, as Bayes' rule does.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import derive, generator, global_chance
from testtime.guard.borrow import borrowed
from testtime.measures.information.networks import adam, single, training

STEEP = 20.0
"""Exponents above are followed in a straight line, so that steep losses keep a finite gradient."""


def calibrated_beta(*, cost: float, alpha: float) -> float:
    """β for which the surrogate's minimiser follows Bayes' rule.

    Raises:
        OptionError: the cost is not between 0 and 1, or alpha not between 0 and 100, from where on single
            precision cannot hold the loss.

    Example:
        >>> round(calibrated_beta(cost=0.1, alpha=4.0), 2)
        17.21
    """
    in_range(1e-6, 1 - 1e-6, cost=cost)
    in_range(1e-6, 100, alpha=alpha)
    return alpha / 2 * (math.exp(alpha / 2) + (1 - cost) / cost * math.exp(-alpha / 2))


def best_score(probability: Tensor, *, cost: float, alpha: float) -> Tensor:
    """The r that minimises the surrogate where samples are good with this probability.

        r* = 2 / (α + 2β) · ln( 2 c β / ( α ( η e^(-α/2) + (1 - η) e^(α/2) ) ) )

    Raises:
        InputError: what is given is no probability.
        OptionError: an option is out of its range.

    Example:
        >>> best_score(torch.tensor([0.7, 0.75, 0.8]), cost=0.25, alpha=2.0).sign()
        tensor([-1.,  0.,  1.])
    """
    check_tensors(probability=probability)
    real = probability.is_floating_point()
    if not real or not bool(((probability >= 0) & (probability <= 1)).all()):
        raise InputError(
            f"probability holds numbers outside of [0, 1], NaN, or {probability.dtype}; expected "
            "probabilities in floating point."
        )
    beta, half = calibrated_beta(cost=cost, alpha=alpha), alpha / 2
    mixed = probability * math.exp(-half) + (1 - probability) * math.exp(half)
    return 2 / (alpha + 2 * beta) * ((2 * cost * beta / alpha) / mixed).log()


def rejection_loss(
    scores: Float[Tensor, " n"], good: Bool[Tensor, " n"], *, cost: float, alpha: float = 4.0
) -> Float[Tensor, ""]:
    """The surrogate loss, a mean over samples.

    Args:
        scores: (n,) r.
        good: (n,) bool, whether the predictor's output is good.
        cost: c of a rejection, between 0 and 1.
        alpha: steepness; 4 in the paper's experiments with text.

    Raises:
        InputError: the shapes differ, good is not bool, or there are no samples or scores are no
            finite numbers.
        OptionError: an option is out of its range.

    Example:
        >>> good = torch.tensor([True, False])
        >>> rejection_loss(torch.zeros(2), good, cost=0.25, alpha=2.0)
        tensor(1.7931)
    """
    check_tensors(scores=scores, good=good)
    if scores.shape != good.shape or good.dtype != torch.bool:
        raise InputError(
            f"scores have the shape {tuple(scores.shape)} and good {tuple(good.shape)} of "
            f"{good.dtype}; expected the same shape, and bool."
        )
    if not scores.is_floating_point() or not len(scores) or not bool(scores.isfinite().all()):
        raise InputError(
            f"{len(scores)} scores of {scores.dtype}, or NaN or infinite ones; expected at least one, "
            "finite and in floating point."
        )
    scores = at_least_single(scores)
    a = 2 * good.to(scores.dtype) - 1
    beta = calibrated_beta(cost=cost, alpha=alpha)
    return (_exp(alpha / 2 * (scores - a)) + cost * _exp(-beta * scores)).mean()


def rejection_cost(accepted: Bool[Tensor, " n"], good: Bool[Tensor, " n"], *, cost: float) -> float:
    """The target loss: the share of samples accepted though bad, and c times the share rejected.

    Raises:
        InputError: the two are not bool, of one shape, or hold no samples.
        OptionError: the cost is not within 0 and 1.

    Example:
        >>> rejection_cost(torch.tensor([True, True, False]), torch.tensor([True, False, False]), cost=0.5)
        0.5
    """
    in_range(0, 1, cost=cost)
    check_tensors(accepted=accepted, good=good)
    both_bool = accepted.dtype == good.dtype == torch.bool
    if not both_bool or accepted.shape != good.shape or not accepted.numel():
        raise InputError(
            f"accepted is {accepted.dtype} {tuple(accepted.shape)} and good {good.dtype} "
            f"{tuple(good.shape)}; expected bool of one shape, with at least one sample."
        )
    return float(((accepted & ~good).double() + cost * (~accepted).double()).mean())


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Rejector:
    """A learned rule that says when a fixed predictor should keep silent.

    Attributes:
        network: maps inputs to scores (n,) or (n, 1); above 0 accepts.
        cost: c it was trained for.

    Example:
        >>> x = torch.linspace(-1, 1, 400)[:, None]
        >>> rejector = Rejector.fit(x, x[:, 0] > 0, cost=0.2, alpha=2.0, steps=100)
        >>> rejector.accepts(torch.tensor([[-0.8], [0.8]]))
        tensor([False,  True])

    Reference: Mohri, Andor, Choi, Collins, Mao, Zhong, Learning to Reject with a Fixed Predictor:
    Application to Decontextualization, ICLR 2024.
    """

    network: nn.Module
    cost: float

    @staticmethod
    def fit(
        inputs: Tensor,
        good: Bool[Tensor, " n"],
        *,
        cost: float,
        network: nn.Module | None = None,
        alpha: float = 4.0,
        lr: float = 1e-3,
        steps: int = 600,
        batch_size: int = 512,
        seed: int = 0,
    ) -> "Rejector":
        """Trains a rejector; a network that is given is copied, and itself not changed.

        Args:
            inputs: (n, ...) what the rejector reads: inputs and outputs of the predictor, as
                logits, embeddings or features of a text.
            good: (n,) bool, whether the predictor's output is good.
            cost: c of a rejection: one accepts where a bad output is less probable than c.
            network: maps inputs to (n,) or (n, 1); by default 64 and 64 units on flat, standardised
                inputs.
            alpha: steepness; 4 in the paper's experiments with text. Lower ones train more easily.
            lr: of Adam; the paper tunes it.
            steps: of training.
            batch_size: samples of a step; all are used once before any comes again.
            seed: of weights and order.

        Raises:
            InputError: no samples, NaN, lengths that differ, only good or only bad samples.
            OptionError: an option is out of its range.
        """
        calibrated_beta(cost=cost, alpha=alpha)
        in_range(0, lr=lr)
        whole(1, steps=steps, batch_size=batch_size)
        _check(inputs, good, own=network is not None)
        inputs = inputs.detach()
        chance = generator(seed, "rejector")
        with global_chance(derive(seed, "rejector", "weights"), []), training():
            ours = copy.deepcopy(network) if network is not None else _network(inputs)
            ours = ours.requires_grad_(True).train()
            descend = adam(ours, lr=lr)
            for drawn in islice(_parts(len(good), batch_size, chance), steps):
                part = drawn.to(good.device)
                scores = _scores(ours, inputs[part])
                descend(rejection_loss(scores, good[part], cost=cost, alpha=alpha))
        return Rejector(network=ours.eval().requires_grad_(False), cost=cost)

    def score(self, inputs: Tensor) -> Float[Tensor, " n"]:
        """r of each sample; above 0 accepts. A sample that holds NaN has NaN, and is not accepted.

        Raises:
            InputError: the network does not answer one number for each sample, or is the default one
                and was fitted to inputs of another size.
        """
        check_tensors(inputs=inputs)
        if not inputs.dim():
            raise InputError("inputs are one number, without samples; expected (n, ...).")
        with borrowed(self.network), single():
            return _scores(self.network, inputs)

    def accepts(self, inputs: Tensor) -> Bool[Tensor, " n"]:
        """Which outputs of the predictor to use."""
        return self.score(inputs) > 0


class _Standardised(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        flat = at_least_single(inputs.reshape(len(inputs), -1))
        self.register_buffer("mean", flat.mean(0))
        spread = flat.std(0) if len(flat) > 1 else torch.zeros_like(flat[0])
        self.register_buffer("std", torch.where(spread > 0, spread, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x[:, None] if x.dim() == 1 else x.flatten(1)
        if flat.shape[1] != len(self.mean) or x.is_complex():
            raise InputError(
                f"inputs are {x.dtype} of the shape {tuple(x.shape)}; expected real (n, ...) with "
                f"{len(self.mean)} numbers for each sample, as the rejector was fitted to."
            )
        return (flat.to(self.mean.dtype) - self.mean) / self.std


def _network(inputs: Tensor) -> nn.Module:
    with torch.device("cpu"):
        first, middle, last = (
            nn.Linear(*widths, dtype=torch.float32)
            for widths in ((inputs[0].numel(), 64), (64, 64), (64, 1))
        )
    layers = nn.Sequential(_Standardised(inputs), first, nn.ReLU(), middle, nn.ReLU(), last)
    return layers.to(inputs.device, torch.promote_types(inputs.dtype, torch.float32))


def _parts(count: int, size: int, chance: torch.Generator) -> Iterator[Tensor]:
    """Samples of one step after another, all of them once before any comes again."""
    while True:
        yield from torch.randperm(count, generator=chance, device="cpu").split(size)


def _scores(network: nn.Module, inputs: Tensor) -> Tensor:
    scores = network(inputs)
    if scores.numel() != len(inputs):
        raise InputError(
            f"the rejector answers {tuple(scores.shape)} for {len(inputs)} samples; expected (n,) or "
            "(n, 1)."
        )
    return scores.reshape(len(inputs))


def _check(inputs: Tensor, good: Tensor, *, own: bool) -> None:
    check_tensors(inputs=inputs, good=good)
    if good.dim() != 1 or good.dtype != torch.bool or len(good) != len(inputs) or len(good) == 0:
        raise InputError(
            f"inputs have the shape {tuple(inputs.shape)} and good {tuple(good.shape)} of "
            f"{good.dtype}; expected (n, ...) and (n,) bool, with at least one sample."
        )
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise InputError("inputs hold NaN or infinite values; leave these samples out.")
    if not inputs.is_floating_point() and not own:
        raise InputError(
            f"inputs are {inputs.dtype}; the default network reads floating-point numbers. Give a "
            "network that embeds them."
        )
    if bool(good.all()) or not bool(good.any()):
        raise InputError(
            f"all {len(good)} samples are {'good' if bool(good.all()) else 'bad'}; a rejector needs "
            "both kinds."
        )


def _exp(x: Tensor) -> Tensor:
    low = x.clamp(max=STEEP)
    return low.exp() * (1 + (x - STEEP).relu())
