"""CoTTA's claim: all weights can adapt to an endless stream without forgetting the source."""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch

import testtime as tt
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.papers.digits import accuracy, digits, gentle_view, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five rounds of contrast, fog and invertmix on digits without a reset, Adam at 1e-3, four "
    "views that leave digits upright: cotta is above bn-adapt on the mean of the rounds, its clean "
    "accuracy afterwards is at least the source's less 0.5, and after 200 steps on noise at 1e-2 "
    "its weights are nearer to the source with restoration (0.01) than without."
)
DOMAINS = ("contrast", "fog", "invertmix")
ROUNDS = 5
STEPS = 200


@register("check", paper="cotta", name="cotta")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """A long changing stream, and steps on noise."""
    return reproduce(
        "cotta", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy over the rounds and on clean data, in percent; distances to the source."""
    model, held = trained(seed), digits(seed, "test")
    clean = stream(held, "clean", seed=seed)
    yield "source, clean", accuracy(model, clean)
    for name, options in (
        ("bn-adapt", {}),
        ("cotta", {"lr": 1e-3, "views": 4, "augment": gentle_view}),
    ):
        adapter = tt.adapt(model, name, seed=seed, **options)
        rounds = [
            accuracy(adapter, stream(held, domain, seed=seed, visit=visit))
            for visit in range(ROUNDS)
            for domain in DOMAINS
        ]
        yield name, fmean(rounds)
        yield f"{name}, clean afterwards", accuracy(adapter.predict, clean)
    for restore in (0.0, 0.01):
        yield f"distance, restoration {restore:g}", drift(model, restore=restore, seed=seed)


def drift(model: torch.nn.Module, *, restore: float, seed: int) -> float:
    """How far the student's weights are from the source after steps on noise."""
    adapter = tt.adapt(model, "cotta", lr=1e-2, restore=restore, threshold=0.0, seed=seed)
    random = generator(seed, "digits", "noise")
    for _ in range(STEPS):
        adapter(torch.rand(64, 1, 16, 16, generator=random))
    own = dict(model.named_parameters())
    tensors = adapter.snapshot().tensors
    return float(torch.stack([(t - own[name]).norm() for name, t in tensors.items()]).norm())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["cotta"] > found["bn-adapt"]
        and found["cotta, clean afterwards"] >= found["source, clean"] - 0.5
        and found["distance, restoration 0.01"] < found["distance, restoration 0"]
    )
