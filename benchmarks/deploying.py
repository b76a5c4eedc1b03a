"""What an answer waits for, and what a gate and a budget save: the figures of docs/deploying.md.

    python benchmarks/deploying.py latency --model embedded:batch
    python benchmarks/deploying.py latency --model torchvision:resnet50 --batch 16 --rounds 7
    python benchmarks/deploying.py latency --model timm:vit_small_patch16_224 --batch 16 --rounds 7
    python benchmarks/deploying.py latency --model torchvision:resnet50 --batch 64 --device cuda
    python benchmarks/deploying.py latency ... --out benchmarks/deploying.json  keeps the ratios
    python benchmarks/deploying.py stream --model torchvision:resnet50 --batch 64 --device cuda
    python benchmarks/deploying.py page           writes them into the page
    python benchmarks/deploying.py gate --model embedded:batch --samples 256
    python benchmarks/deploying.py gate --model embedded:batch --severity 3 --seeds 5
    python benchmarks/deploying.py parts --model embedded:group --samples 300 --seeds 3

`latency`: in rounds, plain inference and each way of adapting with Tent answer the same batch, one
after another; ratios are formed within a round, and median, smallest and largest are shown. The next
answer is asked for when the update behind the last one is over, as where batches come with time
between; under "no pause" it is asked for at once, and waits for that update. The parts of a deferred
answer stand beside it: a forward on batch statistics, and one that keeps what a backward needs, both
as one writes them with torch alone. `stream`: batches from pinned memory, one after another, each asked
for when the last answer is there; beside it the parts, each waited for: the copy to the device, and a
step that is not deferred. On a CPU there is no copy. `gate`: errors on the 15 corruptions one after another and on
clean data, with and without. `parts`: errors on the same corruptions where a quarter or an eighth of the
samples teach, as whole batches or as a part of each.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import testtime as tt
from between import write_between, write_json
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

NUMBERS = Path(__file__).with_name("deploying.json")
PAGE = Path(__file__).resolve().parents[1] / "docs/deploying.md"
LARGE = {
    "torchvision:resnet50": "ResNet-50", "timm:resnet50_gn": "ResNet-50, GroupNorm",
    "timm:vit_small_patch16_224": "ViT-S/16",
}  # fmt: skip
OTHERS = {"embedded:batch": "embedded:batch", "torchvision:vit_b_16": "torchvision's ViT-B/16"}
SETTINGS = "model", "batch", "threads", "device", "layout", "memory"
"""What a row is told apart by."""
IN_A_ROW = 8
"""Batches of a stream."""
MEAN = "tent, budget=0.5"
"""Whose batches differ: of its ratios the mean is shown, of all others the median."""


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
) -> dict[str, Any]:
    """Seconds until the answer is there, over those of plain inference: middle, smallest, largest."""
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
    ways["torch, the same forward without a graph"] = torch.no_grad()(bare)
    ways["torch, the same forward and its graph"] = bare
    # a bound that nothing exceeds: the cost of a gate that stays shut, also where batches are small
    shut = SourceLike(effect=1e9, samples=8)
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
    kept = "MALLOC_TRIM_THRESHOLD_" in os.environ
    return {
        "model": name, "batch": batch, "threads": torch.get_num_threads(), "device": device.type,
        "layout": str(layout).removeprefix("torch."), "memory": "kept" if kept else "default",
        "rounds": rounds, "machine": describe_machine(device),
        "inference": statistics.median(inference),
        "to_inference": {way: [middle(way, own), min(own), max(own)] for way, own in ratios.items()},
        "spending": str(ways[MEAN].plan().spending),
    }  # fmt: skip


def stream(
    name: str, batch: int, rounds: int, device: torch.device, layout: torch.memory_format
) -> dict[str, list[float]]:
    """Seconds a batch: its copy to the device, a step, and both in a stream whose updates are deferred.

    And what the stream takes of the sum of both: less than 1 where updates run behind the next copy.
    """
    model, x = make(name, batch, layout)
    model = model.to(device)
    if device.type != "cpu":
        x = x.pin_memory()

    def brought() -> Tensor:
        return x.to(device, non_blocking=True)

    def copied() -> None:
        brought()
        wait_for(device)

    whole, deferred = (tt.adapt(model, "tent", deferred=later) for later in (False, True))

    def streamed() -> None:
        for _ in range(IN_A_ROW):
            deferred(brought()).to("cpu")  # the next copy is under way before this update is over
        deferred.flush()
        wait_for(device)

    def stepped(there: Tensor) -> None:
        whole(there).to("cpu")
        wait_for(device)

    found: dict[str, list[float]] = {
        each: [] for each in ("copy", "step", "stream", "to its parts")
    }
    for number in range(rounds + 2):
        there = brought()
        wait_for(device)
        copy = statistics.median(seconds(copied) for _ in range(IN_A_ROW))
        step = statistics.median(seconds(partial(stepped, there)) for _ in range(IN_A_ROW))
        together = seconds(streamed) / IN_A_ROW
        if number > 1:
            for part, took in zip(
                found, (copy, step, together, together / (copy + step)), strict=True
            ):
                found[part].append(took)
    return found


def middle(way: str, ratios: Sequence[float]) -> float:
    """The ratio that is shown."""
    return (statistics.fmean if way == MEAN else statistics.median)(ratios)


def told(row: dict[str, Any]) -> Iterator[str]:
    """What a run of `latency` prints."""
    yield f"{row['machine']}; inference {1000 * row['inference']:.2f} ms"
    for way, ratios in row["to_inference"].items():
        yield f"| {way} | {shown(ratios)} |"
    yield row["spending"]


def shown(ratios: Sequence[float]) -> str:
    """A ratio with the smallest and the largest that were seen."""
    return "{:.2f} ({:.2f}–{:.2f})".format(*ratios)  # noqa: RUF001  (a range)


def keep(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a file, in place of one of the same settings."""
    held = json.loads(path.read_text()) if path.exists() else []
    others = [each for each in held if any(each[name] != row[name] for name in SETTINGS)]
    write_json(path, [*others, row])


def write_page(rows: Sequence[dict[str, Any]], page: Path) -> None:
    """The tables of the page, from the rows of a file."""
    plain = {"batch": 16, "threads": 2, "device": "cpu", "layout": "contiguous_format"}

    def found(**settings: Any) -> dict[str, Any]:
        return next(r for r in rows if all(r[name] == value for name, value in settings.items()))

    for name, models, own in (
        ("large", LARGE, {**plain, "memory": "default"}),
        ("others", OTHERS, {"threads": 1, "memory": "default"}),
    ):
        columns = [found(model=model, **own)["to_inference"] for model in models]
        lines = [f"| | {' | '.join(models.values())} |", f"|---|{'---:|' * len(columns)}"]
        for way in columns[0]:
            cells = [shown(column[way]) if way in column else "" for column in columns]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        write_between(page, name, lines)
    ways = "tent", "tent, deferred", "bn-adapt"
    lines = [f"| | inference, ms | {' | '.join(ways)} |", f"|---|---:|{'---:|' * len(ways)}"]
    for label, layout, memory in (
        ("default", "contiguous_format", "default"), ("memory kept", "contiguous_format", "kept"),
        ("channels_last", "channels_last", "default"), ("both", "channels_last", "kept"),
    ):  # fmt: skip
        row = found(**plain | {"model": next(iter(LARGE)), "layout": layout, "memory": memory})
        cells = [f"{1000 * row['inference']:.0f}", *(shown(row["to_inference"][w]) for w in ways)]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    write_between(page, "layout", lines)


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


def parts(
    name: str, batch: int, samples: int, severity: int, seeds: int
) -> Iterator[tuple[str, list[float]]]:
    """Mean errors of each method: learning from all, and from each share, in batches and in parts."""
    data, model = load_data("fashion-mnist:sample"), load_model(name)
    scenario = Scenario(batch_size=batch, samples=samples, severity=severity)
    streams = [
        [(each.inputs, each.labels) for each in scenario.stream(data, seed=seed)]
        for seed in range(seeds)
    ]

    def error(method: str, answer: Callable[[tt.Adapter, int, Tensor], Tensor]) -> float:
        errors: list[float] = []
        for stream in streams:
            adapter, score = tt.adapt(model, method), Score()
            for number, (x, labels) in enumerate(stream):
                score.add(answer(adapter, number, x), labels)
            errors.append(score.result()["error"])
        return statistics.fmean(errors)

    def seldom(share: int, adapter: tt.Adapter, number: int, x: Tensor) -> Tensor:
        return adapter(x) if number % share == 0 else adapter.predict(x)

    def a_part(share: int, adapter: tt.Adapter, number: int, x: Tensor) -> Tensor:
        answer = adapter.predict(x)
        adapter(x[::share])
        return answer

    yield "source", [error("source", partial(seldom, 1))]
    for method in ("eta", "sar", "deyo", "tent"):
        ways = [partial(seldom, 1)]
        ways += [partial(way, share) for share in (4, 8) for way in (seldom, a_part)]
        yield method, [error(method, way) for way in ways]


def main() -> None:
    """Parses and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("latency", "stream", "gate", "parts", "page"))
    parser.add_argument("--model", default="embedded:batch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--severity", type=int, default=5, help="of gate and parts")
    parser.add_argument("--seeds", type=int, default=1, help="of gate and parts: how many streams")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; of latency and stream")
    parser.add_argument(
        "--channels-last", action="store_true", help="model and batch; of these two"
    )
    parser.add_argument("--out", type=Path, help="a file that keeps what latency found")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    layout = torch.channels_last if given.channels_last else torch.contiguous_format
    settings = given.model, given.batch, given.rounds, torch.device(given.device), layout
    if given.what == "page":
        write_page(json.loads(NUMBERS.read_text()), PAGE)
    elif given.what == "stream":
        *parts_of_it, ratio = stream(*settings).items()
        print(describe_machine(torch.device(given.device)))
        for part, took in parts_of_it:
            print(f"| {part} | {1000 * statistics.median(took):.2f} ms |")
        print(f"| {ratio[0]} | {shown([f(ratio[1]) for f in (statistics.median, min, max)])} |")
    elif given.what == "latency":
        row = latency(*settings)
        print(*told(row), sep="\n")
        if given.out is not None:
            keep(given.out, row)
    elif given.what == "parts":
        print("| | all | 1/4: batches | of each | 1/8: batches | of each |")
        asked = given.model, given.batch, given.samples, given.severity, given.seeds
        for method, errors in parts(*asked):
            print(f"| {method} | {' | '.join(f'{error:.2f}' for error in errors)} |", flush=True)
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
