"""USCD's claim: what the lame prompt says as well is subtracted, where the model is unsure."""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.methods.uscd import contrast, unsure
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "2,000 positions of 200 tokens; a distractor at +4, which the lame prompt favours, the right "
    "token at +4.5 in 40% of them and at +9.5 in the others: at a collision probability of 0.6, "
    "contrast raises the mean probability and the accuracy of the right token by more than 0.05 "
    "each, and leaves sure rows bit for bit."
)


@register("check", paper="uscd", name="uscd")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """With and without contrast."""
    return reproduce(
        "uscd", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Probability and accuracy of the right token, token 0."""
    random = generator(seed, "uscd")
    z, lame = (torch.randn(2000, 200, generator=random) for _ in range(2))
    hard = torch.rand(2000, generator=random) < 0.4
    z[:, 0] += torch.where(hard, 4.5, 9.5)
    z[:, 1] += 4
    lame[:, 1] += 4
    found = contrast(z, lame, collision=0.6)
    sure = ~unsure(z, collision=0.6)
    yield "probability, plain", float(z.softmax(-1)[:, 0].mean())
    yield "probability, uscd", float(found.softmax(-1)[:, 0].mean())
    yield "accuracy, plain", float((z.argmax(-1) == 0).float().mean())
    yield "accuracy, uscd", float((found.argmax(-1) == 0).float().mean())
    yield "sure rows changed", float((found[sure] != z[sure]).any(-1).sum())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    gains = [found[f"{n}, uscd"] - found[f"{n}, plain"] for n in ("probability", "accuracy")]
    return min(gains) > 0.05 and found["sure rows changed"] == 0
