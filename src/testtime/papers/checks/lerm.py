"""LERM's claim: what keeps predictions diverse does not let them fall into one class.

The collapse holds with every seed. On digits lerm is ahead of or level with tent in nine comparisons of
ten; in the other, in batches of 16, it is nine answers of 7,920 behind.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

import testtime as tt
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.methods.lerm import lerm
from testtime.adaptation.methods.tent import tent
from testtime.measures.entropy import entropy, marginal_entropy
from testtime.measures.label_encoding import label_encoding_risk
from testtime.papers.digits import CORRUPTIONS, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Three blobs and a linear model that begins with too much of one class: after 300 steps of Adam "
    "without labels, entropy minimisation answers (nearly) one class (accuracy below 40 %, entropy "
    "of the mean prediction below 0.6 ln 3), and label-encoding risk minimisation all three (above "
    "75 %, above 0.9 ln 3). On corrupted digits, Adam at 5e-3, lerm has at least tent's mean "
    "accuracy, with batches of 16 and of 64."
)
STEPS = 300


@register("check", paper="lerm", name="lerm")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Collapse of a linear model on blobs, and adaptation on digits."""
    return reproduce(
        "lerm", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent; the entropy of the mean prediction in units of ln 3."""
    for name, objective in (("entropy", mean_entropy), ("lerm", label_encoding_risk)):
        right, spread = blobs(seed, objective)
        yield f"blobs, {name}", right
        yield f"blobs, {name}, spread", spread
    model, held = trained(seed), digits(seed, "test")
    for size in (16, 64):
        for name, recipe in (
            ("bn-adapt", replace(tent(), objective=None, optimizer=None)),
            ("tent", tent(lr=5e-3)),
            ("lerm", lerm(lr=5e-3)),
        ):
            yield (
                f"{name}, batches of {size}",
                fmean(
                    accuracy(
                        tt.adapt(model, recipe, seed=seed),
                        stream(held, corruption, seed=seed, repeats=2, size=size),
                    )
                    for corruption in CORRUPTIONS
                ),
            )


def mean_entropy(logits: Tensor) -> Tensor:
    """What entropy minimisation minimises."""
    return entropy(logits).mean()


def blobs(seed: int, objective: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Accuracy and spread of a linear model on 300 points around three centres, after training."""
    random = generator(seed, "blobs")
    angle = 2 * math.pi / 3 * torch.arange(3)
    centres = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)
    labels = torch.arange(300) % 3
    x = centres[labels] + torch.randn(300, 2, generator=random)
    weight = (0.5 * centres).requires_grad_()
    bias = torch.tensor([3.0, 0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    with torch.enable_grad():
        for _ in range(STEPS):
            optimizer.zero_grad()
            objective(x @ weight.T + bias).backward()
            optimizer.step()
    with torch.no_grad():
        logits = x @ weight.T + bias
        right = (logits.argmax(1) == labels).double().mean()
        return 100 * float(right), float(marginal_entropy(logits)) / math.log(3)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["blobs, entropy"] < 40
        and found["blobs, entropy, spread"] < 0.6
        and found["blobs, lerm"] > 75
        and found["blobs, lerm, spread"] > 0.9
        and all(
            found[f"lerm, batches of {size}"] >= found[f"tent, batches of {size}"]
            for size in (16, 64)
        )
    )
