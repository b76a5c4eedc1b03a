"""VCoTTA's claim: a Bayesian student between two priors beats CoTTA, and is better calibrated."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

import testtime as tt
from testtime._core.registry import register
from testtime.adaptation.methods.vcotta import vcotta
from testtime.adaptation.parts.gaussians import RHO, Gaussians, kl_gaussians
from testtime.measures.calibration import brier_score
from testtime.papers.digits import Images, digits, gentle_view, stream, trained
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Three rounds of contrast, fog and invertmix on digits without a reset, Adam at 1e-3, four "
    "views that leave digits upright, no warm-up: vcotta has at least cotta's accuracy and at most its Brier score, and ends "
    "nearer to the source, in divergence of its Gaussians, than without the divergence in its loss."
)
DOMAINS = ("contrast", "fog", "invertmix")
ROUNDS = 3


@register("check", paper="vcotta", name="vcotta")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """A changing stream, with and without the divergence."""
    return reproduce(
        "vcotta", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent and Brier score over all rounds; nats from the source afterwards."""
    model, held = trained(seed), digits(seed, "test")
    sent = [
        batch
        for visit in range(ROUNDS)
        for domain in DOMAINS
        for batch in stream(held, domain, seed=seed, visit=visit)
    ]
    adapters = {
        "bn-adapt": tt.adapt(model, "bn-adapt"),
        "cotta": tt.adapt(model, "cotta", views=4, augment=gentle_view, seed=seed),
        "vcotta": tt.adapt(model, vcotta(views=4, augment=gentle_view), seed=seed),
        "vcotta without divergence": tt.adapt(
            model, vcotta(views=4, augment=gentle_view, weight=0.0), seed=seed
        ),
    }
    for name, adapter in adapters.items():
        right, score = judged(adapter, sent)
        yield name, right
        yield f"{name}, Brier score", score
        if name.startswith("vcotta"):
            yield f"{name}, nats from the source", distance(adapter, model)


def judged(adapter: tt.Adapter, sent: list[Images]) -> tuple[float, float]:
    """Accuracy in percent and Brier score of the answers to a stream."""
    probs = torch.cat([adapter(batch.images).softmax(1) for batch in sent])
    labels = torch.cat([batch.labels for batch in sent])
    right = (probs.argmax(1) == labels).double().mean()
    return 100 * float(right), float(brier_score(probs, labels))


def distance(adapter: tt.Adapter, model: nn.Module) -> float:
    """KL(q || q_source) of the student's Gaussians."""
    state = adapter.snapshot()
    assert state.memory is not None
    rhos = state.memory["rhos"]
    source = {name: torch.full_like(rho, RHO) for name, rho in rhos.items()}
    prior = Gaussians(dict(model.named_parameters()), source)
    return float(kl_gaussians(Gaussians(state.tensors, rhos), prior))


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    nats = "nats from the source"
    return (
        found["vcotta"] >= found["cotta"]
        and found["vcotta, Brier score"] <= found["cotta, Brier score"]
        and found[f"vcotta, {nats}"] < found[f"vcotta without divergence, {nats}"]
    )
