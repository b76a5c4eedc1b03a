"""STAMP's claim: a memory of trusted samples keeps the unknown out, and tells it from the known.

The stream takes 144 steps without a reset, so the paper's schedule of 150, which is that of a domain of
CIFAR-10-C, ends with it; a steady rate shows what the falling one costs.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.stamp import stamp
from testtime.adaptation.methods.tent import tent
from testtime.measures.detection import auroc
from testtime.measures.entropy import entropy
from testtime.papers.checks.ostta import DOMAINS, UNKNOWN, open_stream
from testtime.papers.digits import Images, digits, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "The open-set stream of ostta's check (half of every batch is of no class), stamp with six views "
    "and SGD at 0.1: at alpha 0.25 less than a quarter of its memory is unknown, and its outlier "
    "score has a higher AUROC than the entropy of bn-adapt and of tent (Adam, 5e-3); at alpha 0.5 "
    "its accuracy on the known samples of the last domain is at most 2 points below tent's."
)
ROUNDS = 3


@register("check", paper="stamp", name="stamp")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """An open-set stream of digits and blobs, and what of it STAMP remembers."""
    return reproduce(
        "stamp", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """AUROC over the stream, accuracy on the last domain's known samples, share of the memory."""
    model, held = trained(seed), digits(seed, "test")
    domains = [
        open_stream(held, name, seed=seed, visit=visit)
        for visit in range(ROUNDS)
        for name in DOMAINS
    ]
    known = bytes_of_known(domains)
    adapters = {
        "bn-adapt": tt.adapt(model, "bn-adapt"),
        "tent": tt.adapt(model, tent(lr=5e-3), seed=seed),
        "stamp at 0.25": tt.adapt(model, stamp(views=6, augment=nudge), seed=seed),
        "stamp at 0.5": tt.adapt(model, stamp(views=6, augment=nudge, margin=0.5), seed=seed),
        "stamp at 0.5, steady rate": tt.adapt(
            model, stamp(views=6, augment=nudge, margin=0.5, period=10**6), seed=seed
        ),
    }
    for name, adapter in adapters.items():
        scores: list[Tensor] = []
        shares: list[float] = []
        hit = torch.zeros(0)
        for sent in domains:
            logits = []
            for batch in sent:
                logits.append(adapter(batch.images))
                score = adapter.events[-1].measured.get("outlier")
                scores.append(score if isinstance(score, Tensor) else entropy(logits[-1]))
                memory = adapter.snapshot().memory
                if memory and memory["labels"]:
                    kept = [image.numpy().tobytes() for image in memory["images"]]
                    shares.append(fmean(image not in known for image in kept))
            labels = torch.cat([batch.labels for batch in sent])
            hit = (torch.cat(logits).argmax(1) == labels)[labels != UNKNOWN]
        labels = torch.cat([batch.labels for sent in domains for batch in sent])
        yield f"{name}, AUROC", 100 * float(auroc(torch.cat(scores), labels == UNKNOWN))
        yield f"{name}, last domain", 100 * float(hit.double().mean())
        if name.startswith("stamp"):
            yield f"{name}, unknown in memory", fmean(shares) if shares else 0.0


def nudge(x: Tensor, random: torch.Generator) -> Tensor:
    """The images, rolled by at most one pixel."""
    return x.roll(torch.randint(-1, 2, (2,), generator=random).tolist(), (2, 3))


def bytes_of_known(domains: list[list[Images]]) -> set[bytes]:
    """The images of the stream that are of a class, as bytes."""
    return {
        image.numpy().tobytes()
        for sent in domains
        for batch in sent
        for image in batch.images[batch.labels != UNKNOWN]
    }


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    others = (found["bn-adapt, AUROC"], found["tent, AUROC"])
    return (
        found["stamp at 0.25, unknown in memory"] < 0.25
        and found["stamp at 0.25, AUROC"] > max(others)
        and found["stamp at 0.5, last domain"] >= found["tent, last domain"] - 2
    )
