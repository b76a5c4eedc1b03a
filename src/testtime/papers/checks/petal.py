"""PETAL's claim, as far as digits can show it: CoTTA's answers, with chosen weights returned."""

from collections.abc import Iterator, Sequence
from statistics import fmean

import torch

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.cotta import cotta
from testtime.adaptation.methods.petal import petal
from testtime.papers.digits import digits, gentle_view, scores, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Three rounds of contrast, fog and invertmix on digits without a reset, Adam at 1e-3, four upright "
    "views, a posterior of ten epochs at 1e-2: petal's accuracy is at most half a point below "
    "cotta's and its NLL at most 0.015 above, and 3 % of the weights return to the source with "
    "each step. (The paper's claim, to be better than CoTTA on long streams, is not asked: at this "
    "size they are alike.)"
)
DOMAINS = ("contrast", "fog", "invertmix")
ROUNDS = 3


@register("check", paper="petal", name="petal")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """CoTTA and PETAL on a changing stream."""
    return reproduce(
        "petal", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent, NLL and Brier score over the rounds, and the share that returned."""
    model, held, source = trained(seed), digits(seed, "test"), digits(seed, "train")
    loader = list(zip(source.images.split(64), source.labels.split(64), strict=True))
    sent = [
        batch
        for visit in range(ROUNDS)
        for domain in DOMAINS
        for batch in stream(held, domain, seed=seed, visit=visit)
    ]
    for name, recipe in (
        ("cotta", cotta(views=4, augment=gentle_view)),
        ("petal", petal(views=4, passes=10, augment=gentle_view)),
    ):
        known = tt.fit_source(model, loader, methods=[recipe])
        adapter = tt.adapt(model, recipe, seed=seed, source=known)
        answer = Counting(adapter)
        for score, value in scores(answer, sent).items():
            yield f"{name}, {score}", value
        clean = scores(adapter.predict, stream(held, "clean", seed=seed))
        yield f"{name}, clean afterwards", clean["accuracy"]
        if name == "petal":
            yield "returned, percent", 100 * fmean(answer.shares)


class Counting:
    """An adapter that notes after each step what share of the weights is the source's."""

    def __init__(self, adapter: tt.Adapter) -> None:
        self.adapter = adapter
        self.shares: list[float] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.adapter(x)
        self.shares.append(returned(self.adapter))
        return logits


def returned(adapter: tt.Adapter) -> float:
    """Share of the adapted entries that equal the source's bit for bit."""
    own = dict(adapter.model.named_parameters())
    same = [(t == own[name]).flatten() for name, t in adapter.snapshot().tensors.items()]
    return float(torch.cat(same).double().mean())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["petal, accuracy"] >= found["cotta, accuracy"] - 0.5
        and found["petal, NLL"] <= found["cotta, NLL"] + 0.015
        and abs(found["returned, percent"] - 3) < 0.1
    )
