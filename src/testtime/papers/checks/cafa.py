"""CAFA's claim: drawing features to the Gaussian of their class helps, without any weight to tune."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import testtime as tt
from testtime._core.registry import register
from testtime.papers.digits import CORRUPTIONS, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five corruptions of digits, a fresh adapter for each, Adam at 5e-3: mean accuracy of cafa is at "
    "least 0.8 points above bn-adapt and within 1 point of tent, with the ratio taken of each sample "
    "or of the batch."
)
METHODS: dict[str, dict[str, Any]] = {
    "bn-adapt": {},
    "tent": {"method": "tent", "lr": 5e-3},
    "cafa": {"lr": 5e-3},
    "cafa, of the batch": {"method": "cafa", "lr": 5e-3, "reduction": "batch"},
}


@register("check", paper="cafa", name="cafa")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Class-aware alignment beside Tent on corrupted digits."""
    return reproduce(
        "cafa", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean accuracy in percent of each method."""
    model, held, seen = trained(seed), digits(seed, "test"), digits(seed, "train")
    known = tt.fit_source(model, [(seen.images, seen.labels)], methods="cafa")
    streams = [stream(held, name, seed=seed, repeats=2) for name in CORRUPTIONS]
    for label, options in METHODS.items():
        given = {"method": label, "source": known, "seed": seed, **options}
        yield label, fmean(accuracy(tt.adapt(model, **given), sent) for sent in streams)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return all(
        found[name] >= found["bn-adapt"] + 0.8 and abs(found[name] - found["tent"]) <= 1
        for name in ("cafa", "cafa, of the batch")
    )
