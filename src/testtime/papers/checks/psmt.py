"""PSMT's claim: a teacher and a student that choose their weights beat CoTTA, and say how sure."""

from collections.abc import Iterator, Sequence

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.bn_adapt import bn_adapt
from testtime.adaptation.methods.cotta import cotta
from testtime.adaptation.methods.psmt import psmt
from testtime.papers.digits import digits, gentle_view, scores, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Three rounds of contrast, fog and invertmix on digits without a reset, Adam at 1e-3, four "
    "upright views, with changed copies as the paper has them: psmt is more than a point above cotta, and "
    "its NLL and Brier score are lower."
)
DOMAINS = ("contrast", "fog", "invertmix")
ROUNDS = 3


@register("check", paper="psmt", name="psmt")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """CoTTA and PSMT on a changing stream."""
    return reproduce(
        "psmt", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent, NLL and Brier score over the rounds; accuracy on clean data."""
    model, held = trained(seed), digits(seed, "test")
    loader = digits(seed, "train").images.split(64)
    sent = [
        batch
        for visit in range(ROUNDS)
        for domain in DOMAINS
        for batch in stream(held, domain, seed=seed, visit=visit)
    ]
    recipes = {
        "bn-adapt": bn_adapt(),
        "cotta": cotta(views=4, augment=gentle_view),
        "psmt without penalty": psmt(views=4, beta=0.0, augment=gentle_view),
        "psmt": psmt(views=4, augment=gentle_view),
    }
    for name, recipe in recipes.items():
        known = tt.fit_source(model, loader, methods=[recipe])
        adapter = tt.adapt(model, recipe, seed=seed, source=known)
        for score, value in scores(adapter, sent).items():
            yield f"{name}, {score}", value
        clean = scores(adapter.predict, stream(held, "clean", seed=seed))
        yield f"{name}, clean afterwards", clean["accuracy"]


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["psmt, accuracy"] > found["cotta, accuracy"] + 1
        and found["psmt, NLL"] < found["cotta, NLL"]
        and found["psmt, Brier score"] < found["cotta, Brier score"]
    )
