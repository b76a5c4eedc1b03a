"""EDT's claim: at equal diversity where many answers are right, fewer errors where one is."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.methods.edt import entropy_temperature
from testtime.measures.entropy import entropy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "2,000 closed positions (4 candidates, the right one 1.5 to 4 logits above) and 2,000 open ones "
    "(40 valid, N(0, 1)): for T0 in (0.6, 0.8, 1) and theta in (0.5, 1, 2), edt is right more often "
    "on closed positions than the fixed temperature that has the same mean entropy on open ones."
)
GRID = [(t0, theta) for t0 in (0.6, 0.8, 1.0) for theta in (0.5, 1.0, 2.0)]


@register("check", paper="edt", name="edt")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Entropy-based against fixed temperature."""
    return reproduce(
        "edt", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Probability of the right token on closed positions, for each cell of the grid."""
    random = generator(seed, "edt")
    closed = torch.randn(2000, 4, generator=random)
    closed[:, 0] = closed[:, 1:].amax(-1) + 1.5 + 2.5 * torch.rand(2000, generator=random)
    opened = torch.randn(2000, 40, generator=random)
    for t0, theta in GRID:
        hot, cold = (
            z / entropy_temperature(z, highest=t0, theta=theta)[:, None] for z in (opened, closed)
        )
        fixed = _same_entropy(opened, float(entropy(hot).mean()))
        yield f"edt, T0 {t0}, theta {theta}", float(cold.softmax(-1)[:, 0].mean())
        yield f"fixed, T0 {t0}, theta {theta}", float((closed / fixed).softmax(-1)[:, 0].mean())


def _same_entropy(logits: Tensor, wanted: float) -> float:
    low, high = 0.01, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        if float(entropy(logits / middle).mean()) < wanted:
            low = middle
        else:
            high = middle
    return high


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return all(
        found[f"edt, T0 {a}, theta {b}"] > found[f"fixed, T0 {a}, theta {b}"] for a, b in GRID
    )
