"""RDumb's claim: going back to the source now and then is enough not to collapse.

It pays where the method without a reset comes to grief. At a rate that suits the stream it costs
accuracy: the last numbers show that, and nothing is claimed of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.methods.rdumb import rdumb
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.optimizer import Adam
from testtime.papers.digits import CORRUPTIONS, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Six rounds of five corruptions of digits, Adam at the high rate 5e-2: rdumb (E0 0.4 ln C, d "
    "0.4, back to the source every 48 batches) is above bn-adapt in every round and has at least "
    "tent's accuracy afterwards on clean data."
)
ROUNDS = 6


@register("check", paper="rdumb", name="rdumb")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """A long stream at a rate that is too high, and at one that is not."""
    return reproduce(
        "rdumb", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy by rounds and on clean data, in percent; the least lead over batch statistics."""
    model, held = trained(seed), digits(seed, "test")

    def rounds(adapter: tt.Adapter) -> list[float]:
        return [
            fmean(
                accuracy(adapter, stream(held, name, seed=seed, visit=visit))
                for name in CORRUPTIONS
            )
            for visit in range(ROUNDS)
        ]

    base = rounds(tt.adapt(model, "bn-adapt"))
    yield "bn-adapt", fmean(base)
    restarted = rdumb(margin=0.4, redundancy=0.4, reset_every=48)
    for name, recipe in (("tent", tent()), ("rdumb", restarted)):
        adapter = tt.adapt(model, replace(recipe, optimizer=Adam(lr=5e-2)), seed=seed)
        each = rounds(adapter)
        yield name, fmean(each)
        yield f"{name}, last round", each[-1]
        yield f"{name}, least lead", min(a - b for a, b in zip(each, base, strict=True))
        clean = stream(held, "clean", seed=seed)
        yield f"{name}, clean afterwards", accuracy(adapter.predict, clean)
    gentle = {"eta at 5e-3": eta(redundancy=0.4),
              "rdumb at 5e-3, every 24": replace(restarted, reset_every=24)}  # fmt: skip
    for name, recipe in gentle.items():
        adapter = tt.adapt(model, replace(recipe, optimizer=Adam(lr=5e-3)), seed=seed)
        yield name, fmean(rounds(adapter))


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["rdumb, least lead"] > 0
        and found["rdumb, clean afterwards"] >= found["tent, clean afterwards"]
    )
