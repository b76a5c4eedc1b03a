"""ROID's claim: one recipe serves a long stream of changing domains, and forgets nothing."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import testtime as tt
from testtime._core.registry import register
from testtime.papers.digits import accuracy, digits, gentle_view, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five rounds of contrast, fog and invertmix on digits without a reset, Adam at 5e-3, copies "
    "that leave digits upright: roid is more than 2 points above bn-adapt on the mean of the rounds."
)
DOMAINS = ("contrast", "fog", "invertmix")
ROUNDS = 5


@register("check", paper="roid", name="roid")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """ROID beside batch statistics and Tent on a long changing stream."""
    return reproduce(
        "roid", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy over the rounds and on clean data afterwards, in percent."""
    model, held = trained(seed), digits(seed, "test")
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "bn-adapt": ("bn-adapt", {}),
        "tent": ("tent", {"lr": 5e-3}),
        "roid": ("roid", {"lr": 5e-3, "augment": gentle_view}),
        "roid, probabilities corrected": (
            "roid",
            {"lr": 5e-3, "augment": gentle_view, "correction": "probs"},
        ),
    }
    for name, (method, options) in methods.items():
        adapter = tt.adapt(model, method, seed=seed, **options)
        yield (
            name,
            fmean(
                accuracy(adapter, stream(held, domain, seed=seed, visit=visit, repeats=2))
                for visit in range(ROUNDS)
                for domain in DOMAINS
            ),
        )
        clean = stream(held, "clean", seed=seed)
        yield f"{name}, clean afterwards", accuracy(adapter.predict, clean)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["roid"] > found["bn-adapt"] + 2
