"""EATA's claim: few, reliable samples and a Fisher penalty keep a fast learner from forgetting."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import torch

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.eata import eata
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.optimizer import Adam
from testtime.papers.digits import CORRUPTIONS, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Six rounds of five corruptions of digits without a reset, Adam at the high rate 5e-2: eata "
    "(beta 2000, Fisher information of 512 source images, d 0.4) has at least tent's accuracy, "
    "over all rounds and afterwards on clean data, learns from less than every sample, and ends "
    "nearer to the source, weighed by Fisher information, than with beta 0."
)
ROUNDS = 6


@register("check", paper="eata", name="eata")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Tent, ETA and EATA on a long stream, with a rate that is too high."""
    return reproduce(
        "eata", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy over the rounds and on clean data, in percent; samples used, and the distance."""
    model, held = trained(seed), digits(seed, "test")
    images = digits(seed, "train").images[:512]
    known = tt.fit_source(model, images.split(64), methods=["eata"])
    recipes = {
        "tent": tent(),
        "eta": eata(redundancy=0.4, beta=0.0),
        "eata": eata(redundancy=0.4, beta=2000.0),
    }
    for name, recipe in recipes.items():
        adapter = tt.adapt(model, replace(recipe, optimizer=Adam(lr=5e-2)), seed=seed, source=known)
        rounds = [
            fmean(
                accuracy(adapter, stream(held, corruption, seed=seed, visit=visit))
                for corruption in CORRUPTIONS
            )
            for visit in range(ROUNDS)
        ]
        yield name, fmean(rounds)
        yield f"{name}, last round", rounds[-1]
        yield (
            f"{name}, clean afterwards",
            accuracy(adapter.predict, stream(held, "clean", seed=seed)),
        )
        yield f"{name}, samples used", 100 * fmean(e.used / e.samples for e in adapter.events)
        yield f"{name}, Fisher distance", _distance(adapter, known)


def _distance(adapter: tt.Adapter, known: tt.SourceKnowledge) -> float:
    own = dict(adapter.model.named_parameters())
    terms = [
        (known["fisher"][name] * (tensor - own[name]).square()).sum()
        for name, tensor in adapter.snapshot().tensors.items()
    ]
    return float(torch.stack(terms).sum())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["eata"] >= found["tent"]
        and found["eata, clean afterwards"] >= found["tent, clean afterwards"]
        and found["eata, samples used"] < 100
        and found["eata, Fisher distance"] < found["eta, Fisher distance"]
    )
