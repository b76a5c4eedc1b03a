"""RMT's claim: a symmetric loss and prototypes make a mean teacher that lasts."""

from collections.abc import Iterator, Sequence
from statistics import fmean

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.bn_adapt import bn_adapt
from testtime.adaptation.methods.cotta import cotta
from testtime.adaptation.methods.rmt import rmt
from testtime.papers.digits import accuracy, digits, gentle_view, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Three rounds of contrast, fog and invertmix on digits without a reset, Adam at 1e-3, upright copies, no "
    "warm-up: rmt without replay is more than 2 points above bn-adapt on the mean of the rounds, "
    "and above rmt without its contrastive loss."
)
DOMAINS = ("contrast", "fog", "invertmix")
ROUNDS = 3


@register("check", paper="rmt", name="rmt")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """RMT, source-free and with replay, on a changing stream."""
    return reproduce(
        "rmt", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy over the rounds and on clean data afterwards, in percent."""
    model, held, source = trained(seed), digits(seed, "test"), digits(seed, "train")
    loader = list(zip(source.images.split(64), source.labels.split(64), strict=True))
    recipes = {
        "bn-adapt": bn_adapt(),
        "cotta": cotta(views=4, augment=gentle_view),
        "rmt without contrast": rmt(contrast=0.0, augment=gentle_view),
        "rmt": rmt(augment=gentle_view),
        "rmt with replay": rmt(replay=1.0, augment=gentle_view),
    }
    for name, recipe in recipes.items():
        known = tt.fit_source(model, loader, methods=[recipe])
        adapter = tt.adapt(model, recipe, seed=seed, source=known)
        yield (
            name,
            fmean(
                accuracy(adapter, stream(held, domain, seed=seed, visit=visit))
                for visit in range(ROUNDS)
                for domain in DOMAINS
            ),
        )
        clean = stream(held, "clean", seed=seed)
        yield f"{name}, clean afterwards", accuracy(adapter.predict, clean)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["rmt"] > found["bn-adapt"] + 2 and found["rmt"] > found["rmt without contrast"]
