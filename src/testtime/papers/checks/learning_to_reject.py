"""The claim: a learned rejector beats every threshold on a confidence that misleads."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import derive, generator
from testtime.guard.rejection import Rejector, rejection_cost
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Two inputs, of which one says whether the predictor is good and the other how confident it is; "
    "rejection costs 0.15: the cost of the surrogate (alpha 2) is at most 1.08 times that of Bayes' "
    "rule, and below 0.93 times that of the best threshold on confidence."
)
COST, SAMPLES, STEPS = 0.15, 3000, 600


@register("check", paper="learning-to-reject", name="learning-to-reject")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Target loss of four rules."""
    return reproduce(
        "learning-to-reject", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean cost of a sample."""
    chance = generator(seed, "learning-to-reject")
    x, _, good, _ = _draw(chance)
    rejector = Rejector.fit(
        x, good, cost=COST, alpha=2.0, steps=STEPS, seed=derive(seed, "learning-to-reject")
    )
    x, eta, good, confidence = _draw(chance)
    yield "surrogate", rejection_cost(rejector.accepts(x), good, cost=COST)
    yield "Bayes", rejection_cost(eta > 1 - COST, good, cost=COST)
    thresholds = confidence.quantile(torch.linspace(0, 1, 101)).tolist()
    yield "confidence", min(rejection_cost(confidence > t, good, cost=COST) for t in thresholds)
    yield "accept all", rejection_cost(torch.ones_like(good), good, cost=COST)


def _draw(chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs with the confidence among them, P(good), good or not, and the confidence."""
    x = 2 * torch.rand(SAMPLES, 2, generator=chance) - 1
    eta = torch.sigmoid(12 * (0.6 - x[:, 0].abs()))
    good = torch.rand(SAMPLES, generator=chance) < eta
    confidence = torch.sigmoid(2 * (0.7 - x[:, 0].abs()) + 3 * x[:, 1])
    return torch.cat([x, confidence[:, None]], 1), eta, good, confidence


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    surrogate = found["surrogate"]
    return surrogate <= 1.08 * found["Bayes"] and surrogate < 0.93 * found["confidence"]
