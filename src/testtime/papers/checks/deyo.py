"""DeYO's claim: samples that depend on shape teach better where a background misleads.

The networks learn less of the background than the claim presumes: the worst group is right on about
nine images of ten before anything adapts. At 1e-3 deyo is above tent or level with it but for the
worst group of one seed; at 5e-3 each leads on some seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import testtime as tt
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.methods.deyo import deyo
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.optimizer import Adam
from testtime.papers.digits import Images, digits, hits, train
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Is a digit at least 5? A bright background says so for 90 % of the training images and 10 % "
    "of the test images. With Adam at lr 1e-3 and at 5e-3, deyo (tau_ent and E0 ln 2, tau_plpd "
    "0.3, 4 x 4 patches) is above tent in average and in worst-group accuracy."
)
RATES = (1e-3, 5e-3)


@register("check", paper="deyo", name="deyo")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Digits whose background misleads."""
    return reproduce(
        "deyo", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Average and worst-group accuracy of the source, and of each method at each rate."""
    random = generator(seed, "digits", "background")
    learnt, _ = with_background(digits(seed, "train"), agrees=0.9, random=random)
    model = train(learnt, seed=seed, classes=2)
    test = digits(seed, "test")
    order = torch.randperm(3 * len(test.labels), generator=random) % len(test.labels)
    sent, group = with_background(test[order], agrees=0.1, random=random)
    yield from scores("source", model, sent, group)
    yield from scores("bn-adapt", tt.adapt(model, "bn-adapt"), sent, group)
    shaped = deyo(entropy_margin=1.0, weight_margin=1.0, drop_margin=0.3, patches=4)
    for rate in RATES:
        for name, recipe in (("tent", tent()), ("deyo", shaped)):
            adapter = tt.adapt(model, replace(recipe, optimizer=Adam(lr=rate)), seed=seed)
            yield from scores(f"{name} at {rate:g}", adapter, sent, group)


def with_background(
    held: Images, *, agrees: float, random: torch.Generator
) -> tuple[Images, Tensor]:
    """Images of the task on bright or dark ground, and the group (0 to 3) of each."""
    labels = (held.labels >= 5).long()
    same = torch.rand(len(labels), generator=random) < agrees
    bright = torch.where(same, labels, 1 - labels)
    images = 0.65 * held.images + 0.35 * bright.view(-1, 1, 1, 1)
    return Images(images, labels), 2 * labels + bright


def scores(
    name: str, answer: Callable[[Tensor], Any], sent: Images, group: Tensor, size: int = 64
) -> Iterator[tuple[str, float]]:
    """Average and worst-group accuracy in percent over the stream."""
    parts = [sent[i : i + size] for i in range(0, len(sent.labels) - size + 1, size)]
    right = 100 * torch.cat(list(hits(answer, parts))).double()
    group = group[: len(right)]
    yield f"{name}, average", float(right.mean())
    yield f"{name}, worst group", min(float(right[group == g].mean()) for g in range(4))


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return all(
        found[f"deyo at {rate:g}, {what}"] > found[f"tent at {rate:g}, {what}"]
        for rate in RATES
        for what in ("average", "worst group")
    )
