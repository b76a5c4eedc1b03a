"""The claim: expected pairs of members tell unknown inputs at least as well as the mean's entropy."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from testtime._core.registry import register
from testtime._core.seeds import derive, generator
from testtime.guard.predictive_uncertainty import ensemble_logits, predictive_uncertainty
from testtime.measures.detection import auroc
from testtime.papers.digits import Images, digits
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Two members (.999, .001) and (.001, .999): mutual information 0.685, epistemic 3.446, total "
    "3.454 nats. Five networks trained on digits 0 to 4: total is never below the mean's entropy, "
    "and its AUROC for digits 5 to 9 at most half a point below."
)
MEMBERS, EPOCHS = 5, 20


@register("check", paper="predictive-uncertainty", name="predictive-uncertainty")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Exact numbers, and AUROC of unknown digits."""
    return reproduce(
        "predictive-uncertainty", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Nats, and AUROC in percent."""
    two = torch.tensor([[0.999, 0.001], [0.001, 0.999]], dtype=torch.float64).log()
    exact = predictive_uncertainty(two)
    yield "two members, mutual information", float(exact.mutual_information)
    yield "two members, epistemic", float(exact.epistemic)
    yield "two members, total", float(exact.total)
    known, held = digits(seed, "train"), digits(seed, "test")
    known = known[known.labels < 5]
    members = [_member(known, derive(seed, "member", i)) for i in range(MEMBERS)]
    found = predictive_uncertainty(ensemble_logits(members, held.images).double())
    unknown = held.labels >= 5
    yield "largest lead of entropy over total", float((found.entropy - found.total).max())
    yield "AUROC, total", 100 * float(auroc(found.total, unknown))
    yield "AUROC, entropy", 100 * float(auroc(found.entropy, unknown))
    yield "AUROC, epistemic", 100 * float(auroc(found.epistemic, unknown))
    yield "AUROC, mutual information", 100 * float(auroc(found.mutual_information, unknown))


def _member(known: Images, seed: int) -> nn.Module:
    chance = generator(seed, "training")
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for index in torch.randperm(len(known.labels), generator=chance).split(50):
                part = known[index]
                nn.functional.cross_entropy(model(part.images), part.labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    exact = {"mutual information": 0.6852, "epistemic": 3.4465, "total": 3.4544}
    return (
        all(abs(found[f"two members, {name}"] - value) < 5e-4 for name, value in exact.items())
        and found["largest lead of entropy over total"] <= 1e-6
        and found["AUROC, total"] >= found["AUROC, entropy"] - 0.5
    )
