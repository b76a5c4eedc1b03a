"""OSTTA's claim: the samples whose confidence rose are the right ones to learn from.

Each domain is 24 batches, as on the rest of the bench. On twice as many, tent falls into few classes
with some seeds.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

import testtime as tt
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.methods.ostta import confidence_rose, ostta
from testtime.adaptation.methods.tent import tent
from testtime.papers.digits import Images, batches, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce
from testtime.streams.open_set import blobs

CLAIM = (
    "Digits of which half of every batch are blobs of no class, three rounds of contrast and "
    "invertmix without a reset, Adam at 5e-3: known samples that ostta selects are more often "
    "right than known samples that it rejects, and ostta has at least tent's accuracy on the known "
    "samples of the last domain."
)
DOMAINS = ("contrast", "invertmix")
ROUNDS = 3
UNKNOWN = -1


@register("check", paper="ostta", name="ostta")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """An open-set stream of digits and blobs."""
    return reproduce(
        "ostta", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy on known samples over the rounds and on the last domain, in percent."""
    model, held = trained(seed), digits(seed, "test")
    domains = [
        open_stream(held, name, seed=seed, visit=visit)
        for visit in range(ROUNDS)
        for name in DOMAINS
    ]
    adapters = {
        "bn-adapt": tt.adapt(model, "bn-adapt"),
        "tent": tt.adapt(model, tent(lr=5e-3), seed=seed),
        "ostta without diversity": tt.adapt(model, ostta(lr=5e-3, diversity=0.0), seed=seed),
        "ostta": tt.adapt(model, ostta(lr=5e-3), seed=seed),
    }
    frozen = torch.cat([adapters["bn-adapt"](b.images) for sent in domains for b in sent])
    labels = torch.cat([batch.labels for sent in domains for batch in sent])
    known = labels != UNKNOWN
    logits: list[Tensor] = []
    for name, adapter in adapters.items():
        logits = [torch.cat([adapter(batch.images) for batch in sent]) for sent in domains]
        right = [
            _percent((z.argmax(1) == y)[y != UNKNOWN])
            for z, sent in zip(logits, domains, strict=True)
            for y in [torch.cat([batch.labels for batch in sent])]
        ]
        yield name, fmean(right)
        yield f"{name}, last domain", right[-1]
    answers = torch.cat(logits)
    rose = confidence_rose(answers, frozen).bool()
    hit = answers.argmax(1) == labels
    yield "known, selected", _percent(hit[known & rose])
    yield "known, rejected", _percent(hit[known & ~rose])
    yield "all, selected", _percent(hit[rose])
    yield "all, rejected", _percent(hit[~rose])


def open_stream(held: Images, name: str, *, seed: int, visit: int) -> list[Images]:
    """24 batches of 64, half of them digits and half blobs, under the same corruption."""
    random = generator(seed, "digits-C", "unknown", name, visit)
    known = stream(held, name, seed=seed, visit=visit, size=32)
    count = 32 * len(known)
    labels = torch.full((count,), UNKNOWN)
    strange = batches(
        Images(blobs(count, 16, 16, generator=random), labels), name, random=random, size=32
    )
    return [
        Images(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]))
        for a, b in zip(known, strange, strict=True)
    ]


def _percent(hit: Tensor) -> float:
    return 100 * float(hit.double().mean())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["known, selected"] > found["known, rejected"]
        and found["ostta, last domain"] >= found["tent, last domain"]
    )
