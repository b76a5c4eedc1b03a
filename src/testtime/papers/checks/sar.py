"""SAR's claim: when sorted labels collapse entropy minimisation, recovery brings the model back.

ETA itself survives here, and nothing is asserted of it: where labels are sorted its predictions
resemble those that taught before, and its margin for redundancy (0.4 for ten classes) keeps most of
them from teaching. Without that margin, a filter of entropy alone, it collapses like Tent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

import testtime as tt
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.optimizer import SGD
from testtime.papers.digits import Images, accuracy, batches, digits, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Digits in noise and haze, a network with GroupNorm, labels sorted, SGD. At lr 2e-2, in the "
    "last of four passes tent, eta without its filter of redundant samples, and sar without "
    "recovery have collapsed (at most 12 % right) and sar is at least 20 points above tent; it "
    "stays below the source. At lr 1e-2, tent on one sorted pass ends below the source."
)
PASSES = 4
COLLAPSED = ("tent", "eta without redundancy", "sar without recovery")


@register("check", paper="sar", name="sar")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Collapse on sorted labels, and recovery from it."""
    return reproduce(
        "sar", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent of the last of four passes, and of one pass at half the rate."""
    model, held = trained(seed, norm="group", noise=0.15), digits(seed, "test")
    passes = [sorted_pass(held, seed=seed, visit=visit) for visit in range(PASSES)]
    yield "source", accuracy(model, passes[-1])
    recipes = {
        "tent": replace(tent(), optimizer=SGD(lr=2e-2, momentum=0.9)),
        "eta": eta(lr=2e-2),
        "eta without redundancy": eta(lr=2e-2, redundancy=1.0),
        "sar without recovery": replace(sar(lr=2e-2), recovery=None),
        "sar": sar(lr=2e-2),
    }
    for name, recipe in recipes.items():
        adapter = tt.adapt(model, recipe, seed=seed)
        yield name, [accuracy(adapter, sent) for sent in passes][-1]
        if name == "sar":
            yield "recoveries", float(sum(e.outcome is Outcome.RECOVERED for e in adapter.events))
    slow = tt.adapt(model, replace(tent(), optimizer=SGD(lr=1e-2, momentum=0.9)), seed=seed)
    yield "source, one pass", accuracy(model, passes[0])
    yield "tent at 1e-2, one pass", accuracy(slow, passes[0])


def sorted_pass(held: Images, *, seed: int, visit: int) -> list[Images]:
    """Three noisy copies of every image, one class after another."""
    random = generator(seed, "digits-C", "sorted", visit)
    order = torch.randperm(3 * len(held.labels), generator=random) % len(held.labels)
    order = order[held.labels[order].argsort(stable=True)]
    return batches(held[order], "dim", random=random)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        max(found[name] for name in COLLAPSED) <= 12
        and found["tent"] + 20 <= found["sar"] < found["source"]
        and found["tent at 1e-2, one pass"] < found["source, one pass"]
    )
