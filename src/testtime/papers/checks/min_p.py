"""Min-p's claim: coherence at a high temperature, with the same diversity."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.methods.classical import top_p
from testtime.decode.methods.min_p import min_p
from testtime.measures.entropy import entropy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "2,000 positions of 1,000 tokens, 1 or 5 to 39 of them valid, 8 to 11 logits above N(0, 1): at "
    "temperature 2 min-p 0.1 puts at least 0.3 more probability on valid tokens than top-p 0.9, "
    "with an entropy among them that differs by at most 0.05; at temperature 1 by less than 0.1."
)


@register("check", paper="min-p", name="min-p")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Min-p and top-p at two temperatures."""
    return reproduce(
        "min-p", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Probability of valid tokens, and entropy among them in nats where there are several."""
    random = generator(seed, "min-p")
    z = torch.randn(2000, 1000, generator=random)
    count = torch.randint(5, 40, (2000,), generator=random)
    count[torch.rand(2000, generator=random) < 0.5] = 1
    valid = torch.arange(1000) < count[:, None]
    z = torch.where(valid, 8 + 3 * torch.rand(z.shape, generator=random), z)
    for t in (1.0, 2.0):
        for name, method in {
            "min-p": min_p(p=0.1, temperature=t), "top-p": top_p(p=0.9, temperature=t)
        }.items():  # fmt: skip
            kept = z
            for step in method.steps:
                kept = step(torch.zeros(1, 0, dtype=torch.long), kept)
            yield f"{name} at {t}, valid", _mass(kept, valid)
            inside = kept[count > 1].masked_fill(~valid[count > 1], -math.inf)
            yield f"{name} at {t}, entropy", float(entropy(inside).mean())


def _mass(logits: Tensor, valid: Tensor) -> float:
    return float(logits.softmax(-1).masked_fill(~valid, 0).sum(-1).mean())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    gain = {t: found[f"min-p at {t}, valid"] - found[f"top-p at {t}, valid"] for t in (1.0, 2.0)}
    apart = abs(found["min-p at 2.0, entropy"] - found["top-p at 2.0, entropy"])
    return gain[2.0] >= 0.3 and apart <= 0.05 and abs(gain[1.0]) < 0.1
