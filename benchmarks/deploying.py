"""What an answer waits for, and what a gate and a budget save: the figures of docs/deploying.md.

    python benchmarks/deploying.py latency --model embedded:batch
    python benchmarks/deploying.py latency --model torchvision:resnet50 --batch 16 --rounds 7
    python benchmarks/deploying.py latency --model timm:vit_small_patch16_224 --batch 16 --rounds 7
    python benchmarks/deploying.py latency --model torchvision:resnet50 --batch 64 --device cuda
    python benchmarks/deploying.py gate --model embedded:batch --samples 256
    python benchmarks/deploying.py gate --model embedded:batch --severity 3 --seeds 5

`latency`: in rounds, plain inference and each way of adapting with Tent answer the same batch, one
after another; ratios are formed within a round, and median, smallest and largest are shown. The next
answer is asked for when the update behind the last one is over, as where batches come with time
between; under "no pause" it is asked for at once, and waits for that update. The parts of a deferred
answer stand beside it: a forward on batch statistics, and one that keeps what a backward needs, both
as one writes them with torch alone. `gate`: errors on the 15 corruptions one after another and on
clean data, with and without.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import testtime as tt
from testtime._core.devices import wait_for
from testtime._core.errors import ScopeError
from testtime._core.outcomes import Outcome
from testtime.adaptation.shortcuts import TRIES
from testtime.adaptation.source_like import SourceLike
from testtime.bench.machine import describe_machine
from testtime.bench.metrics import Score
from testtime.bench.models import load_model
from testtime.streams.data import load_data, stack
from testtime.streams.scenarios import Scenario
from textbook import configured


def make(name: str, batch: int, layout: torch.memory_format) -> tuple[nn.Module, Tensor]:
    """A model and a batch for it; random weights where none are embedded: time does not see them."""
    model, x = _make(name, batch)
    return model.to(memory_format=layout), x.contiguous(memory_format=layout)


def _make(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    if name.startswith("embedded:"):
        return load_model(name), stack(load_data("fashion-mnist:sample"), range(batch))[0]
    import timm  # noqa: PLC0415
    import torchvision  # noqa: PLC0415

    torch.manual_seed(0)
    library, _, own = name.partition(":")
    build = torchvision.models.get_model if library == "torchvision" else timm.create_model
    model = build(own)
    return model.eval(), torch.randn(batch, 3, 224, 224)


def latency(
    name: str, batch: int, rounds: int, device: torch.device, layout: torch.memory_format
) -> None:
    """Seconds until the answer is there, over those of plain inference."""
    model, x = make(name, batch, layout)
    model = model.to(device)
    if device.type != "cpu":
        x = x.pin_memory()

    def taken(way: Callable[[Tensor], Tensor]) -> float:
        return seconds(lambda: way(x.to(device, non_blocking=True)).to("cpu"))

    ways: dict[str, Any] = {
        "tent": tt.adapt(model, "tent"),
        "tent, deferred": tt.adapt(model, "tent", deferred=True),
        "tent, deferred, no pause": tt.adapt(model, "tent", deferred=True),
        "tent, every=1000": tt.adapt(model, "tent", every=1000),
        "tent, budget=0.5": tt.adapt(model, "tent", budget=0.5),
    }
    with suppress(ScopeError):  # it takes batch statistics, and does nothing else
        ways["bn-adapt"] = tt.adapt(model, "bn-adapt")
    bare, _ = configured(model)
    ways["torch, batch statistics"] = torch.no_grad()(bare)
    ways["torch, batch statistics and a graph"] = bare
    shut = SourceLike(
        effect=1e9
    )  # a bound that nothing exceeds: the cost of a gate that stays shut
    known = None
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):  # no statistics are stored
        known = tt.fit_source(model, x.to(device).split(max(batch // 2, 2)), gate=True)
    ways["tent, gate shut"] = tt.adapt(model, "tent", source=known, gate=shut)
    for way in ("tent, deferred", "tent, deferred, no pause"):
        for _ in range(2 * TRIES):  # until it has measured which forward answers sooner
            taken(ways[way])
            ways[way].flush()
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    inference: list[float] = []
    for number in range(rounds + 3):
        plain = (taken(partial(infer, model)) + taken(partial(infer, model))) / 2
        inference.append(plain)
        for way, adapter in ways.items():
            own = taken(adapter)
            if "no pause" in way:  # as in a stream that never waits: from the third answer on
                own = [taken(adapter), taken(adapter)][-1]
            getattr(adapter, "flush", bool)()
            wait_for(device)
            if number > 2:
                ratios[way].append(own / plain)
    print(f"{describe_machine(device)}; inference {1000 * statistics.median(inference):.2f} ms")
    for way, own in ratios.items():
        mean = statistics.fmean(own) if "budget" in way else statistics.median(own)
        print(f"| {way} | {mean:.2f} | {min(own):.2f} to {max(own):.2f} |")
    print(ways["tent, budget=0.5"].plan().spending)


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Plain inference."""
    with torch.inference_mode():
        return model(x)


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gate(
    name: str, batch: int, samples: int, severity: int = 5, seed: int = 0
) -> list[tuple[str, str, float, int, int]]:
    """Error with and without a gate, and how many batches of how many were spared."""
    found: list[tuple[str, str, float, int, int]] = []
    data = load_data("fashion-mnist:sample")
    train = load_data("fashion-mnist:sample", split="train")
    model, known = load_model(name), None
    if name == "embedded:group":
        loader = [stack(train, range(i, i + 50)) for i in range(0, 1000, 50)]
        known = tt.fit_source(model, loader, gate=True)
    ways = {
        "source": tt.adapt(model, "source"),
        "tent": tt.adapt(model, "tent"),
        "tent, gated": tt.adapt(model, "tent", source=known, gate=True),
    }
    scenario = Scenario(batch_size=batch, samples=samples, severity=severity)
    stream = scenario.stream(data, seed=seed)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).split(batch)
    clean = [stack(data, part) for part in order]
    shifted = [(each.inputs, each.labels) for each in stream]
    for kind, batches in (("15 corruptions", shifted), ("clean", clean)):
        for way, adapter in ways.items():
            adapter.reset()
            score, spared = Score(), 0
            for x, labels in batches:
                score.add(adapter(x), labels)
                spared += adapter.events[-1].outcome is Outcome.LIKE_SOURCE
            found.append((kind, way, score.result()["error"], spared, len(batches)))
    return found


def main() -> None:
    """Parses and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("latency", "gate"))
    parser.add_argument("--model", default="embedded:batch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--severity", type=int, default=5, help="of gate")
    parser.add_argument("--seeds", type=int, default=1, help="of gate: how many streams")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; of latency")
    parser.add_argument("--channels-last", action="store_true", help="model and batch; of latency")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.what == "latency":
        layout = torch.channels_last if given.channels_last else torch.contiguous_format
        latency(given.model, given.batch, given.rounds, torch.device(given.device), layout)
    else:
        more: list[float] = []
        for seed in range(given.seeds):
            rows = gate(given.model, given.batch, given.samples, given.severity, seed)
            for kind, way, error, spared, batches in rows:
                print(f"| {kind} | {way} | {error:.2f} | {spared} of {batches} |")
            shifted = {way: error for kind, way, error, *_ in rows if kind != "clean"}
            more.append(shifted["tent, gated"] - shifted["tent"])
        print(f"gated less ungated: {statistics.fmean(more):+.2f}, at most {max(more):+.2f}")


if __name__ == "__main__":
    main()
