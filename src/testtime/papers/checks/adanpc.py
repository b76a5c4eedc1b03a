"""AdaNPC's claim: a memory that takes test samples in follows a shift that comes step by step."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, rotate

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.adanpc import adanpc
from testtime.papers.digits import Images, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Digits rotated by 0, 10, ..., 60 degrees in turn, 25 neighbours: remembering test samples whose "
    "vote is at least 0.5 gives at least 5 points more mean accuracy over 30 to 60 degrees than the "
    "memory of the source alone."
)
ANGLES = (0, 10, 20, 30, 40, 50, 60)
BETAS = {"adanpc, source memory": 1.1, "adanpc": 0.5}


@register("check", paper="adanpc", name="adanpc")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Rotation in steps, with and without a growing memory."""
    return reproduce(
        "adanpc", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean accuracy in percent from 30 degrees on, of the model and of both memories."""
    model, held, seen = trained(seed), digits(seed, "test"), digits(seed, "train")
    known = tt.fit_source(model, [(seen.images, seen.labels)], methods="adanpc")
    sent = [rotated(held, angle, seed=seed) for angle in ANGLES]
    yield "source", late([accuracy(model, one) for one in sent])
    for name, beta in BETAS.items():
        method = adanpc(k=25, beta=beta, confidence="score")
        adapter = tt.adapt(model, method, source=known, seed=seed)
        yield name, late([accuracy(adapter, one) for one in sent])


def rotated(held: Images, angle: int, *, seed: int) -> list[Images]:
    """Batches of the digits in an order of their own, turned."""
    return [
        Images(turn(batch.images, angle), batch.labels)
        for batch in stream(held, "clean", seed=seed, visit=angle)
    ]


def turn(images: Tensor, angle: float) -> Tensor:
    """Images turned by that many degrees, with bilinear interpolation."""
    return rotate(images, angle, InterpolationMode.BILINEAR)


def late(accuracies: list[float]) -> float:
    """Their mean from 30 degrees on."""
    return fmean(accuracies[ANGLES.index(30) :])


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["adanpc"] >= found["adanpc, source memory"] + 5
