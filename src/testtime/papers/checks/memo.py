"""MEMO's claim: a step towards agreement of an image's augmented copies, and nothing is kept.

A network of this size is not expected to gain accuracy by it; the check asks that it loses none.
The copies are those of the paper's code for CIFAR-10, which leaves small images their size; its mirror
images, half of all, are no digits. The number with moved copies, of which nothing is claimed, shows
the step without them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import testtime as tt
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.methods.memo import memo
from testtime.adaptation.parts.views import small_augmix_view
from testtime.papers.digits import Images, accuracy, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "250 digits in shot noise, a network with GroupNorm, 16 copies, SGD at 5e-3: one step lowers "
    "the marginal entropy of more than 95 % of the images, memo is within 1.5 points of the "
    "source, and with fixed copies the order of the images changes no answer."
)
IMAGES, COPIES, RATE = 250, 16, 5e-3


@register("check", paper="memo", name="memo")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """One image at a time, from the source each time."""
    return reproduce(
        "memo", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy and the share of images whose marginal entropy falls, in percent."""
    model, held = trained(seed, norm="group", noise=0.15), digits(seed, "test")
    sent = stream(held, "shot", seed=seed, size=IMAGES)[:1]
    yield "source", accuracy(model, sent)
    adapter = tt.adapt(model, memo(lr=RATE, views=COPIES, augment=small_augmix_view), seed=seed)
    yield "memo", accuracy(adapter, sent)
    adapter = tt.adapt(model, memo(lr=RATE, views=COPIES, augment=moved), seed=seed)
    yield "memo, moved copies", accuracy(adapter, sent)
    yield "entropy fell", share_that_fell(model, sent[0], seed=seed)
    yield "largest change by order", change_by_order(model, sent[0].images)


def share_that_fell(model: torch.nn.Module, sent: Images, *, seed: int) -> float:
    """In percent: images whose copies agree more after a step on them than before."""
    random = generator(seed, "digits", "copies")
    adapter = tt.adapt(
        model, replace(memo(lr=RATE), procedure=None)
    )  # the batch is one image's copies
    fell = 0
    for image in sent.images.split(1):
        copies = small_augmix_view(image.expand(COPIES, -1, -1, -1), random)
        adapter.reset()
        for _ in range(2):
            adapter(copies)
        before, after = (event.measured["loss"] for event in list(adapter.events)[-2:])
        assert before is not None
        assert after is not None
        fell += int(after < before)
    return 100 * fell / len(sent.labels)


def change_by_order(model: torch.nn.Module, images: Tensor) -> float:
    """Largest difference of a logit when the images come in reverse; the copies are not drawn."""
    adapter = tt.adapt(model, memo(lr=RATE, views=COPIES, augment=rolled))
    return float((adapter(images) - adapter(images.flip(0)).flip(0)).abs().max())


def rolled(x: Tensor, random: torch.Generator) -> Tensor:
    """The i-th copy is moved by i mod 4 columns and i // 4 rows."""
    return torch.stack([image.roll((i // 4, i % 4), (-2, -1)) for i, image in enumerate(x)])


def moved(x: Tensor, random: torch.Generator) -> Tensor:
    """Each copy is moved by at most two pixels: no crops, no mirror images."""
    shifts = torch.randint(-2, 3, (len(x), 2), generator=random).tolist()
    return torch.stack([image.roll(s, (-2, -1)) for image, s in zip(x, shifts, strict=True)])


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["entropy fell"] > 95
        and abs(found["memo"] - found["source"]) <= 1.5
        and found["largest change by order"] == 0
    )
