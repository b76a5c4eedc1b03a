"""SWEET's claim: marking unsure tokens alone is found more surely, and breaks fewer sure ones."""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.watermark import Watermark, detect
from testtime.measures.entropy import entropy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "200 tokens of a toy model that is nearly certain at 80% of them, gamma 0.25, delta 3, tau 0.9: "
    "z of sweet > z of the plain watermark > 4, and sweet gets fewer of the certain tokens wrong."
)
VOCABULARY, LENGTH, SURE, LEAD = 200, 200, 0.8, 9.5


@register("check", paper="sweet", name="sweet")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """One text of each kind: unmarked, plain watermark, sweet."""
    return reproduce(
        "sweet", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """z of each text by its own detector, and the share of certain tokens that came out wrong."""
    draw = generator(seed, "sweet", "logits")
    logits = torch.randn(LENGTH, VOCABULARY, generator=draw)
    right = torch.randint(VOCABULARY, (LENGTH,), generator=draw)
    sure = torch.rand(LENGTH, generator=draw) < SURE
    logits[sure, right[sure]] += LEAD
    plain, sweet = Watermark(vocabulary=VOCABULARY, tau=None), Watermark(vocabulary=VOCABULARY)
    entropies = [0.0, *entropy(logits).tolist()]
    for name, mark in (("unmarked", None), ("plain", plain), ("sweet", sweet)):
        tokens = _written(logits, mark, generator(seed, "sweet", name))
        yield f"z, {name}", detect(tokens, mark or sweet, entropies=entropies).z
        wrong = torch.tensor(tokens[1:])[sure] != right[sure]
        yield f"wrong, {name}", float(wrong.double().mean())


def _written(logits: torch.Tensor, mark: Watermark | None, draw: torch.Generator) -> list[int]:
    tokens = [0]
    for row in logits:
        scores = row[None] if mark is None else mark(torch.tensor([tokens]), row[None])
        tokens.append(int(torch.multinomial(scores.softmax(-1), 1, generator=draw)))
    return tokens


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["z, sweet"] > found["z, plain"] > 4 and found["wrong, sweet"] < found["wrong, plain"]
    )
