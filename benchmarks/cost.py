"""What adapting costs: seconds and peak memory of every method, as ratios in one run.

    python benchmarks/cost.py --out benchmarks/cost.json
    python benchmarks/cost.py --models resnet50_gn --methods tent,sar --rounds 10

For each model, in rounds: plain inference, a forward with the minimal backward (the floor of Tent),
the textbook forms and every method answer the same batches, one after another in a new order each
round, so that a slow moment of the machine meets all alike. Ratios are formed within a round; the
table shows their median and, in brackets, the smallest and largest. Memory is the largest sum of
tensors that a step holds beyond what lay there before it, read off the allocator, exact and the same
each time. Methods of many passes are measured in one round.

MEMO adapts to one image at a time, so its times are those of one image, set against a batch of one.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import testtime as tt
from testtime.adaptation.parts.views import cotta_view
from testtime.bench.models import load_model
from testtime.streams.data import load_data
from textbook import TEXTBOOK, cotta, minimal, plain

Step = Callable[[Tensor], Any]
SLOW = (
    "cotta",
    "memo",
    "psmt",
    "petal",
    "vcotta",
    "tesla",
    "stamp",
    "dent",
    "simatta",
    "roid",
    "rmt",
)
METHODS = (
    "source", "bn-adapt", "tent", "eta", "eata", "sar", "deyo", "ostta", "lame", "cotta", "rotta",
    "memo", "rdumb", "roid", "rmt", "psmt", "petal", "vcotta", "cafa", "adanpc", "lerm", "stamp",
    "domainadaptor",
)  # fmt: skip
"""All that work on any classifier of images, with no more than a loader of source data."""
BATCH = {"embedded": 200, "resnet50": 16, "resnet50_gn": 16, "vit_s": 16}


class Confident(nn.Module):
    """A network of random weights, its logits so scaled that about a third of samples may teach."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.scale


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and two batches for it."""
    torch.manual_seed(0)
    size = BATCH[name]
    if name == "embedded":
        data = load_data("fashion-mnist:sample")
        x = torch.stack([data[i][0] for i in range(2 * size)])
        return load_model("embedded:batch"), (x + 0.2 * torch.randn(x.shape)).clamp(0, 1)
    import timm  # noqa: PLC0415

    known = {"resnet50": "resnet50", "resnet50_gn": "resnet50_gn", "vit_s": "vit_small_patch16_224"}
    model = timm.create_model(known[name], pretrained=False).eval()
    x = torch.rand(2 * size, 3, 224, 224)
    with torch.no_grad():
        spread = model(x[:size]).std(1).mean()
    return Confident(model, float(4 / spread)).eval(), x


def contestants(model: nn.Module, x: Tensor, methods: list[str]) -> dict[str, Step]:
    """What is measured, by name."""
    steps: dict[str, Step] = {"inference": plain(model), "minimal step": minimal(model)}
    steps |= {f"textbook {name}": maker(model) for name, maker in TEXTBOOK.items()}
    if "cotta" in methods:
        random = torch.Generator().manual_seed(0)
        steps["textbook cotta"] = cotta(model, lambda x: cotta_view(x, random), views=32)
    for name in methods:
        source = None
        if tt.methods()[name].needs:
            labels = model(x).argmax(1).split(len(x) // 2)
            source = tt.fit_source(
                model, list(zip(x.split(len(x) // 2), labels, strict=True)), methods=[name]
            )
        steps[name] = tt.adapt(model, name, source=source)
    return steps


def seconds(step: Step, x: Tensor) -> float:
    """Time of one step."""
    start = time.perf_counter()
    step(x)
    return time.perf_counter() - start


def peak_megabytes(step: Step, x: Tensor) -> float:
    """The largest sum of tensors that a step holds beyond what lay there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(x)
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    held = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top / 2**20


def measure(name: str, methods: list[str], rounds: int) -> list[dict[str, Any]]:
    """Rows of one model: a contestant, its ratios, its passes."""
    model, x = make(name)
    first, second = x.split(BATCH[name])
    steps = contestants(model, x, methods)
    times: dict[str, list[float]] = {key: [] for key in steps}
    single: list[float] = []
    order = list(steps)
    generator = torch.Generator().manual_seed(0)
    memory = {}
    for key, step in track(steps.items(), f"{name}: memory", console=Console(stderr=True)):
        batch = first[:1] if key == "memo" else first
        step(batch)  # the first call also looks at the model
        memory[key] = peak_megabytes(step, batch)
    for number in track(range(rounds), f"{name}: seconds", console=Console(stderr=True)):
        single.append(seconds(steps["inference"], second[:1]))
        for place in torch.randperm(len(order), generator=generator).tolist():
            key = order[place]
            if key.removeprefix("textbook ") in SLOW and number:
                continue
            times[key].append(seconds(steps[key], second[:1] if key == "memo" else second))
    return [row(name, key, steps[key], times, single, memory) for key in steps]


def row(
    model: str, key: str, step: Step, times: dict[str, list[float]], single: list[float],
    memory: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """One line of the table."""

    def against(base: list[float]) -> list[float]:
        ratios = sorted(a / b for a, b in zip(times[key], base, strict=False))
        return [statistics.median(ratios), ratios[0], ratios[-1]]

    counts = getattr(step, "counts", None)
    inference = single if key == "memo" else times["inference"]
    return {
        "model": model,
        "batch": 1 if key == "memo" else BATCH[model],
        "name": key,
        "milliseconds": 1000 * statistics.median(times[key]),
        "to_inference": against(inference),
        "to_minimal": None if key == "memo" else against(times["minimal step"]),
        "megabytes": memory[key],
        "memory_to_minimal": memory[key] / memory["minimal step"],
        "forwards": counts and counts.forwards / counts.samples,
        "backwards": counts and counts.backwards / counts.samples,
    }


def overhead(rounds: int = 300) -> dict[str, float]:
    """Milliseconds that a call costs beyond the work itself, on the embedded model, two images.

    For `source` beyond inference, for `tent` beyond the textbook's step: the smallest of many, since
    whatever else the machine does only adds to it.
    """
    model, x = make("embedded")
    x = x[:2]
    pairs = {
        "source": (tt.adapt(model, "source"), plain(model)),
        "tent": (tt.adapt(model, "tent"), TEXTBOOK["tent"](model)),
    }
    found = {}
    for name, (ours, other) in pairs.items():
        own, base = [], []
        for _ in range(rounds):
            own.append(seconds(ours, x))
            base.append(seconds(other, x))
        found[name] = 1000 * (min(own[10:]) - min(base[10:]))
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """A table for each model."""

    def spread(values: list[float] | None) -> str:
        return "" if values is None else f"{values[0]:.2f} ({values[1]:.2f}-{values[2]:.2f})"

    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        table = Table(title=f"{model}, batch {own[0]['batch']}", box=None, header_style="bold")
        table.add_column("")
        for column in ("ms", "to inference", "to minimal step", "MB", "MB ratio", "fwd / bwd"):
            table.add_column(column, justify="right")
        for r in own:
            passes = "" if r["forwards"] is None else f"{r['forwards']:.1f} / {r['backwards']:.1f}"
            table.add_row(
                r["name"], f"{r['milliseconds']:.1f}", spread(r["to_inference"]),
                spread(r["to_minimal"]), f"{r['megabytes']:.0f}",
                f"{r['memory_to_minimal']:.2f}", passes,
            )  # fmt: skip
        console = Console()
        console.width = max(console.width, 110)
        console.print(table)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "testtime": tt.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="embedded,resnet50,vit_s")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the rows")
    chosen = parser.parse_args()
    rows = [
        row
        for name in chosen.models.split(",")
        for row in measure(name, chosen.methods.split(","), chosen.rounds)
    ]
    show(rows)
    beyond = overhead()
    print("overhead of a call, ms:", {name: round(value, 3) for name, value in beyond.items()})
    if chosen.out:
        found = {"machine": machine(), "overhead_ms": beyond, "rows": rows}
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
