"""LAME's claim: where consecutive samples share labels, agreement among neighbours helps.

It helps every time, but where the source is right on more than nine blurred images in ten there are
not always three points left to gain.
"""

from collections.abc import Iterator, Sequence

import testtime as tt
from testtime._core.registry import register
from testtime.papers.digits import accuracy, correlated, digits, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Digits in fog and blurred, a network with GroupNorm: with labels in Dirichlet order (0.05) "
    "lame is at least 3 points above the source for each corruption; on the shuffled stream it is "
    "within 3 points of the source."
)
DOMAINS = ("fog", "blur")


@register("check", paper="lame", name="lame")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Correlated and shuffled labels."""
    return reproduce(
        "lame", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent of source and LAME, for each corruption and order."""
    model, held = trained(seed, norm="group"), digits(seed, "test")
    for name in DOMAINS:
        streams = {
            "correlated": correlated(held, name, seed=seed, delta=0.05),
            "shuffled": stream(held, name, seed=seed, repeats=2),
        }
        for order, sent in streams.items():
            for method in ("source", "lame"):
                yield f"{method}, {order} {name}", accuracy(tt.adapt(model, method), sent)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    gain = {
        (order, name): found[f"lame, {order} {name}"] - found[f"source, {order} {name}"]
        for order in ("correlated", "shuffled")
        for name in DOMAINS
    }
    return all(
        value >= 3 if order == "correlated" else abs(value) <= 3
        for (order, _), value in gain.items()
    )
