"""The claim: a fingerprint beside the prediction notices faulty weights, and seldom healthy ones."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from testtime._core.registry import register
from testtime._core.seeds import derive, generator
from testtime.guard.faults import Scaling, inject
from testtime.guard.fingerprint import FaultMonitor, Fingerprint
from testtime.guard.monitor import Monitor
from testtime.papers.digits import Images, digits
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "A network on digits whose weights change sign and are scaled by 4 at a rate: 20 samples raise "
    "the alarm for at most 5 % of healthy windows and for at least 90 % of networks at rate 0.05, "
    "and ever more with the rate; the prediction is the same to the bit with and without the "
    "fingerprint."
)
RATES = (0.01, 0.05, 0.1)
TRIALS, EPOCHS = 50, 30


@register("check", paper="uncertainty-fingerprint", name="uncertainty-fingerprint")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Alarms of healthy and faulty networks."""
    return reproduce(
        "uncertainty-fingerprint", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Percent of windows, of networks, of images."""
    known, held = digits(seed, "train"), digits(seed, "test")
    model = _trained(known, seed)
    fingerprint = Fingerprint.fit(model, [known.images], epochs=2 * EPOCHS, seed=seed)
    detector = FaultMonitor(low=fingerprint.low, high=fingerprint.high)
    chance = generator(seed, "uncertainty-fingerprint")

    def alarm(network: nn.Module) -> bool:
        window = held.images[torch.randperm(len(held.images), generator=chance)[:20]]
        return bool(Monitor(detector).update(fingerprint.read(network, window).fingerprint))

    output, healthy = fingerprint.read(model, held.images)
    with torch.no_grad():
        yield "same prediction", 100 * float((output == model(held.images)).double().mean())
    outside = Monitor(detector).update(healthy).flagged
    yield "flagged, healthy", 100 * float(outside.double().mean())
    yield "alarms, healthy", 100 * sum(alarm(model) for _ in range(TRIALS)) / TRIALS
    for rate in RATES:
        kinds = [Scaling(rate=rate / 2), Scaling(rate=rate / 2, factor=4.0)]
        faulty = [inject(model, kinds, seed=derive(seed, rate, i)) for i in range(TRIALS)]
        yield f"alarms, rate {rate}", 100 * sum(map(alarm, faulty)) / TRIALS
        yield f"accuracy, rate {rate}", sum(_accuracy(each, held) for each in faulty) / TRIALS


def _trained(known: Images, seed: int) -> nn.Module:
    chance = generator(seed, "fingerprint", "training")
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(derive(seed, "fingerprint", "weights"))
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with torch.enable_grad():
        for _ in range(EPOCHS):
            for index in torch.randperm(len(known.labels), generator=chance).split(50):
                part = known[index]
                nn.functional.cross_entropy(model(part.images), part.labels).backward()
                optimizer.step()
                optimizer.zero_grad()
    return model.eval()


def _accuracy(model: nn.Module, held: Images) -> float:
    with torch.no_grad():
        answers: Tensor = model(held.images).argmax(1)
    return 100 * float((answers == held.labels).double().mean())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    alarms = [found[f"alarms, rate {rate}"] for rate in RATES]
    return (
        found["same prediction"] == 100
        and found["alarms, healthy"] <= 5
        and alarms[1] >= 90
        and alarms == sorted(alarms)
    )
