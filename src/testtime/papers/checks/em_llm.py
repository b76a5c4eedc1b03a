"""EM-INF's claim: less entropy makes a right token that leads more likely, without a label."""

import math
from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.methods.em_inf import lower_entropy
from testtime.measures.entropy import entropy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "12 steps of 50 tokens with logits from N(0, 1), the right one 3 to 5 above: em-inf with the "
    "code's defaults lowers the mean entropy, keeps the most probable token at every step, and "
    "raises the probability of all right tokens together more than tenfold; where the right one "
    "has the median logit, that probability falls."
)


@register("check", paper="em-llm", name="em-llm")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """EM-INF on steps with a right token."""
    return reproduce(
        "em-llm", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Entropy in nats, and log10 of how many times likelier the right tokens became."""
    random = generator(seed, "em-llm")
    noise = torch.randn(12, 50, generator=random)
    leading = noise.clone()
    leading[:, 0] = 3 + 2 * torch.rand(12, generator=random)
    after = lower_entropy(leading)
    yield "entropy before", float(entropy(leading).mean())
    yield "entropy after", float(entropy(after).mean())
    yield "best tokens kept", float((leading.argmax(-1) == after.argmax(-1)).float().mean())
    yield "right ones likelier, log10", _gain(leading, after, torch.zeros(12, dtype=torch.long))
    median = noise.median(-1).indices
    yield "right ones in the tail likelier, log10", _gain(noise, lower_entropy(noise), median)


def _gain(before: torch.Tensor, after: torch.Tensor, right: torch.Tensor) -> float:
    gain = after.log_softmax(-1) - before.log_softmax(-1)
    return float(gain.gather(-1, right[:, None]).sum()) / math.log(10)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["entropy after"] < found["entropy before"]
        and found["best tokens kept"] == 1
        and found["right ones likelier, log10"] > 1
        and found["right ones in the tail likelier, log10"] < 0
    )
