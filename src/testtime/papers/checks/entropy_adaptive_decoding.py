"""EAD's claim: the entropy knows where the large model is worth its cost."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.methods.ead import Switch
from testtime.measures.entropy import entropy_of_probs
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "A stream of 20,000 tokens in easy and hard segments of 30 on average, right with .97/.55 by "
    "the small and .98/.80 by the large model: ead (window 5, dwell 0, 0.8 bits) is right more "
    "often, by at least 0.02, than sending as many tokens to the large model at random."
)
RIGHT = {"small": (0.97, 0.55), "large": (0.98, 0.80)}


@register("check", paper="entropy-adaptive-decoding", name="entropy-adaptive-decoding")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Switching by entropy and at random."""
    return reproduce(
        "entropy-adaptive-decoding", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int, tokens: int = 20_000) -> Iterator[tuple[str, float]]:
    """Expected accuracy of the tokens, and the share of the large model."""
    random = generator(seed, "ead")
    turns = torch.rand(tokens, generator=random) < 1 / 30
    hard = turns.cumsum(0) % 2
    right = {who: torch.tensor(p)[hard] for who, p in RIGHT.items()}
    bits = {who: _bits(p, random) for who, p in right.items()}
    switch = Switch(threshold=0.8, window=5, dwell=0)
    active, large = switch.begin(float(bits["small"][0])), []
    for step in range(tokens):
        large.append(active)
        active = switch.large_next(float(bits["large" if active else "small"][step]))
    chosen = torch.tensor(large)
    share = float(chosen.float().mean())
    mean = {who: float(p.mean()) for who, p in right.items()}
    yield "ead", float(torch.where(chosen, right["large"], right["small"]).mean())
    yield "at random", share * mean["large"] + (1 - share) * mean["small"]
    yield "large alone", mean["large"]
    yield "small alone", mean["small"]
    yield "share of the large model", share


def _bits(right: Tensor, random: Generator) -> Tensor:
    """Entropy of distributions that give the right token its probability, and 20 others the rest."""
    others = -torch.rand(len(right), 20, generator=random).clamp(min=1e-9).log()  # Dirichlet(1)
    others = others / others.sum(-1, keepdim=True) * (1 - right[:, None])
    return entropy_of_probs(torch.cat([right[:, None], others], -1)) / math.log(2)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["ead"] >= found["at random"] + 0.02
