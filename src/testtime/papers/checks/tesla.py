"""TeSLA's claim: flipped self-learning on hard images beats Tent, and stays calibrated.

The learned policy is hard on digits of 16 pixels: it turns, inverts and posterises them. Where the claim
is missed it is by half a point or less against tent, on one seed of five; the flipped loss and its
calibration hold with all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

import testtime as tt
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.methods.tesla import augmented, sub_policies, tesla
from testtime.adaptation.parts.objective import teacher_cross_entropy
from testtime.measures.calibration import calibration_error
from testtime.measures.entropy import entropy
from testtime.papers.digits import CORRUPTIONS, Images, digits, gentle_view, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Five corruptions of digits, each from the source on, with the learned policy, weak copies that "
    "leave digits upright and no queue, Adam at 1e-3: tesla with mu 0.9 is above tent at 5e-3; with mu 0.99 its flipped loss "
    "is at least as accurate as the normal cross-entropy and better calibrated; and the learned "
    "policy's images are harder for the teacher, by its entropy, than plain ones."
)
PASSES = 2


@register("check", paper="tesla", name="tesla")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """The five corruptions, with and without the flip."""
    return reproduce(
        "tesla", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Means over corruptions: accuracy and calibration error in percent, entropies in nats."""
    model, held = trained(seed), digits(seed, "test")
    recipes = {
        "tent": tent(lr=5e-3),
        "tesla": tesla(momentum=0.9, augment=gentle_view),
        "tesla, mu 0.99": tesla(augment=gentle_view),
        "tesla, mu 0.99, not flipped": replace(
            tesla(augment=gentle_view), objective=teacher_cross_entropy
        ),
    }
    for name, recipe in recipes.items():
        found: list[tuple[float, ...]] = []
        for corruption in CORRUPTIONS:
            sent = stream(held, corruption, seed=seed, repeats=PASSES)
            adapter = tt.adapt(model, recipe, seed=seed)
            found.append(judged(adapter, sent))
            if name == "tesla":
                found[-1] += hardness(adapter, sent[-1].images, seed=seed)
        titles = (
            "",
            ", calibration error",
            ", entropy of plain images",
            ", entropy of hard images",
        )
        for title, values in zip(titles, zip(*found, strict=True), strict=False):
            yield f"{name}{title}", fmean(values)


def judged(adapter: tt.Adapter, sent: list[Images]) -> tuple[float, float]:
    """Accuracy and calibration error of the answers to a stream, in percent."""
    probs = torch.cat([adapter(batch.images).softmax(1) for batch in sent])
    confidence, answers = probs.max(1)
    hit = answers == torch.cat([batch.labels for batch in sent])
    return 100 * float(hit.double().mean()), 100 * float(calibration_error(confidence, hit))


def hardness(adapter: tt.Adapter, x: Tensor, *, seed: int) -> tuple[float, float]:
    """Mean entropy of the teacher's answers to images as they are, and under the policy."""
    random = generator(seed, "tesla", "hardness")
    memory = adapter.snapshot().memory
    assert memory is not None
    drawn = torch.multinomial(
        memory["selection"].softmax(0), len(x), replacement=True, generator=random
    )
    sizes = memory["sizes"].sigmoid()[drawn]
    hard = augmented(x, sub_policies(sizes.shape[1])[drawn], sizes, random)
    plain, strained = (float(entropy(adapter.predict(each)).mean()) for each in (x, hard))
    return plain, strained


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    error = "calibration error"
    flipped, normal = "tesla, mu 0.99", "tesla, mu 0.99, not flipped"
    return (
        found["tesla"] > found["tent"]
        and found[flipped] >= found[normal]
        and found[f"{flipped}, {error}"] < found[f"{normal}, {error}"]
        and found["tesla, entropy of hard images"] > found["tesla, entropy of plain images"]
    )
