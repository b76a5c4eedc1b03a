"""What adapting costs: seconds and peak memory of every method, as ratios in one run.

    python benchmarks/cost.py --models resnet50 --batch 16 --methods tent,sar --out cost.json
    python benchmarks/cost.py --measure memory --out cost.json     # needs no quiet machine
    python benchmarks/cost.py --device cuda --rounds 20 --out cost.json
    python benchmarks/cost.py --page docs/performance.md --out cost.json
    python benchmarks/cost.py --compare old.json new.json

For each model, in rounds: plain inference, a forward with the minimal backward (the floor of Tent),
the textbook form of each method and the method answer the same batches, one after another in a new
order each round, so that a slow moment of the machine meets all alike. Ratios are formed within a
round; the table shows their median and, in brackets, the smallest and largest. Memory is the largest
sum of tensors that a step holds beyond what lay there before it, read off the allocator, exact and
the same each time; on a GPU what its libraries take to work in counts too. Methods of many passes are
measured in one round on a CPU, unless `--rounds` says how many.

Methods that choose who teaches are set so that a third of the samples do, and stay there: their
rate is zero, so that the network of random weights does not run away. CoTTA and the like make 8
views in place of 32. RoTTA keeps a batch in memory in place of 64 images, so that it learns in every
step. SimATTA takes ten steps a batch. MEMO adapts to one image at a time, so its times are those of
one image, set against a batch of one. Rows are joined to those that `--out` holds already.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import testtime as tt
from between import write_json
from compare import compare, join, page, show
from names import names_of
from settings import setting
from testtime._core.devices import wait_for
from testtime.adaptation.methods.tent import tent
from testtime.bench.models import load_model
from testtime.measures.entropy import entropy
from testtime.streams.data import load_data
from textbook import TEXTBOOK, minimal, plain

Step = Callable[[Tensor], Any]
SLOW = (
    "cotta", "memo", "psmt", "petal", "vcotta", "tesla", "stamp", "dent", "simatta", "roid", "rmt",
)  # fmt: skip
METHODS = (
    "source", "bn-adapt", "tent", "eta", "eata", "sar", "deyo", "ostta", "lame", "cotta", "rotta",
    "memo", "rdumb", "roid", "rmt", "psmt", "petal", "vcotta", "cafa", "adanpc", "lerm", "stamp",
    "domainadaptor", "dent", "tesla", "sade", "simatta",
)  # fmt: skip
"""All that work on any classifier of images; `foa` is for transformers, and `sqrl` for tables."""
OF_BATCH_NORMS = ("bn-adapt", "domainadaptor", "dent")
"""Methods whose textbook forms, at least, are for networks with BatchNorm."""
ROUNDS = 5
"""Where nobody says how many."""
BATCH = {"embedded": 200}
"""Images where nobody says how many; else 16."""
TIMM = {"vit_s": "vit_small_patch16_224"}
"""What timm calls a network that has another name here."""
VIEWS = 8
ALONE = ("memo", "textbook memo")
"""What adapts to one image at a time, and is measured on one."""


class Confident(nn.Module):
    """A network of random weights, its logits so scaled that predictions are neither sure nor not.

    Args:
        model: the network.
        scale: of its logits.
        mean: of its logits, which is taken away, so that it predicts many classes.
    """

    def __init__(self, model: nn.Module, scale: float, mean: Tensor | float = 0.0) -> None:
        super().__init__()
        self.model, self.scale, self.mean = model, scale, mean

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) - self.mean) * self.scale


def make(name: str, size: int, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A model in eval mode and two batches for it."""
    torch.manual_seed(0)
    if name == "embedded":
        data = load_data("fashion-mnist:sample")
        x = torch.stack([data[i][0] for i in range(2 * size)])
        x = (x + 0.2 * torch.randn(x.shape)).clamp(0, 1)
        return load_model("embedded:batch").to(device), x.to(device)
    import timm  # noqa: PLC0415

    model = timm.create_model(TIMM.get(name, name), pretrained=False).eval()
    x = torch.rand(2 * size, 3, 224, 224) * torch.linspace(0.3, 1, 2 * size).view(-1, 1, 1, 1)
    model, x = model.to(device), x[torch.randperm(2 * size)].to(device)
    with torch.no_grad():
        _measured(model)(x[:size])  # stored statistics are the data's, as of a trained network
        logits = model.eval()(x[:size])
    mean = logits.mean(0)
    return Confident(model, float(4 / (logits - mean).std(1).mean()), mean).eval(), x


def _measured(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train().momentum = None
    return model


def third(model: nn.Module, x: Tensor) -> float:
    """The entropy, in units of ln C, that a third of the batch lies below under its statistics."""
    with torch.no_grad():
        logits = tt.adapt(model, "tent", lr=0.0)(x)
    return float(entropy(logits).quantile(1 / 3)) / math.log(logits.shape[1])


def options_of(name: str, margin: float, size: int) -> dict[str, Any]:
    """Options of a method and its textbook form: a third teaches, views are few, memories small."""
    third = {"lr": 0.0, "margin": margin}
    chosen = {
        "eta": {**third, "redundancy": 1.0},
        "sar": third,
        "deyo": {"lr": 0.0, "entropy_margin": margin, "drop_margin": -1.0},
        "cotta": {"views": VIEWS},
        "rotta": {"capacity": size, "every": size},  # every step learns then
        "simatta": {"steps": 10},  # and not until its loss stands still
    }
    alike = {"eata": "eta", "rdumb": "eta", "psmt": "cotta", "petal": "cotta"}
    return chosen.get(alike.get(name, name), {})


def contestants(model: nn.Module, x: Tensor, size: int, methods: list[str]) -> dict[str, Step]:
    """What is measured, by name."""
    steps: dict[str, Step] = {"inference": plain(model), "minimal step": minimal(model)}
    margin = third(model, x[size:])
    for name in methods:
        batch_norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        if name in OF_BATCH_NORMS and not batch_norms:
            continue
        own, data, options = setting(name, model, x, size)
        options |= options_of(name, margin, size)
        if name in TEXTBOOK:
            more = {"source": data} if data else {}
            steps[f"textbook {name}"] = TEXTBOOK[name](own, **more, **options)
        if name == "cotta":  # no views, as where the source is sure, and it is not even asked
            steps["cotta, source sure"] = tt.adapt(own, name, threshold=0.0, **options)
        if name == "tent":
            steps["tent, kept in bfloat16"] = tt.adapt(
                own, replace(tent(), activations=torch.bfloat16)
            )
        source = tt.fit_source(own, data, methods=[name]) if data else None
        steps[name] = tt.adapt(own, name, source=source, **options)
    return steps


def seconds(step: Step, x: Tensor) -> float:
    """Time of one step, until its device has done it."""
    wait_for(x.device)
    start = time.perf_counter()
    step(x)
    wait_for(x.device)
    return time.perf_counter() - start


def peak_megabytes(step: Step, x: Tensor) -> float:
    """The largest sum of tensors that a step holds beyond what lay there before."""
    if x.device.type == "cuda":
        wait_for(x.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        wait_for(x.device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
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


def measure(
    name: str,
    size: int,
    methods: list[str],
    rounds: int | None,
    wanted: list[str],
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Rows of one model: a contestant, its ratios, its passes.

    Five rounds where nobody says how many, one of them for methods of many passes on a CPU.
    """
    few, rounds = rounds or (1 if device == "cpu" else ROUNDS), rounds or ROUNDS
    model, x = make(name, size, device)
    steps = contestants(model, x, size, methods)
    second = x[size:]
    for key, step in steps.items():
        told(f"{name}, {size}: {key}, first steps")
        for _ in range(2 if "seconds" in wanted or key not in SLOW else 1):
            step(taken(key, second))
    memory: dict[str, float] = {}
    if "memory" in wanted:
        memory["inference of one"] = peak_megabytes(steps["inference"], second[:1])
        for key, step in steps.items():
            told(f"{name}, {size}: {key}, memory")
            memory[key] = peak_megabytes(step, taken(key, second))
    times: dict[str, list[float]] = {key: [] for key in steps}
    single: list[float] = []
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds if "seconds" in wanted else 0):
        told(f"{name}, {size}: round {number + 1} of {rounds}")
        steps["inference"](second[:1])  # memory that a large step gave back comes again
        single.append(seconds(steps["inference"], second[:1]))
        order = list(steps)
        for place in torch.randperm(len(order), generator=generator).tolist():
            key = order[place]
            if any(slow in key for slow in SLOW) and number >= few:
                continue
            times[key].append(seconds(steps[key], taken(key, second)))
    return [row(name, size, key, steps[key], times, single, memory, device) for key in steps]


def taken(key: str, x: Tensor) -> Tensor:
    """Of a batch, what a contestant is given."""
    return x[:1] if key in ALONE else x


def told(text: str) -> None:
    """Says on the terminal how far it is."""
    print(text, file=sys.stderr, flush=True)


def row(
    model: str, size: int, key: str, step: Step, times: dict[str, list[float]],
    single: list[float], memory: dict[str, float], device: str,
) -> dict[str, Any]:  # fmt: skip
    """One line of the table; without what was not measured."""

    def against(base: list[float]) -> list[float]:
        ratios = sorted(a / b for a, b in zip(times[key], base, strict=False))
        return [statistics.median(ratios), ratios[0], ratios[-1]]

    counts = getattr(step, "counts", None)
    made: dict[str, Any] = {"model": model, "batch": size, "name": key}
    if device != "cpu":
        made["device"] = device
    book = f"textbook {key.partition(',')[0]}"  # of a variant, too
    if key in ALONE:
        made["batch"] = 1
    if times[key]:
        made["machine"] = where(device)
        made["milliseconds"] = 1000 * statistics.median(times[key])
        made["to_inference"] = against(
            [statistics.median(single)] if key in ALONE else times["inference"]
        )
        if key not in ALONE:
            made["to_minimal"] = against(times["minimal step"])
        if book in times:
            made["to_textbook"] = against(times[book])
    if memory:
        made["megabytes"] = memory[key]
        plainly = memory["inference of one" if key in ALONE else "inference"]
        # of what the textbook holds beyond inference
        if beyond := memory.get(book, plainly) - plainly:
            made["memory_to_textbook"] = (memory[key] - plainly) / beyond
    if counts and counts.samples:
        made["forwards"] = counts.forwards / counts.samples
        made["backwards"] = counts.backwards / counts.samples
    return made


def overhead(rounds: int = 300) -> dict[str, float]:
    """Milliseconds that a call costs beyond the work itself, on the embedded model, two images.

    For `source` beyond inference, for `tent` beyond the textbook's step: the smallest of many, since
    whatever else the machine does only adds to it.
    """
    model, x = make("embedded", 2)
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


def machine() -> dict[str, Any]:
    """Where numbers come from."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "testtime": tt.__version__,
    }  # fmt: skip


@cache
def where(device: str = "cpu") -> str:
    """The machine of a row's times, in words."""
    about = machine()
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, {about['cpu']}, torch {about['torch']}"
    return f"{about['cpu']}, {about['threads']} threads of {about['cores']} cores, torch {about['torch']}"


def keep(path: Path | None, found: dict[str, Any]) -> None:
    """What was found joins a file, if one was named."""
    if path:
        write_json(path, join(json.loads(path.read_text()) if path.exists() else {}, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models",
        default="embedded,resnet50,resnet50_gn,vit_s",
        help="or others, by their names in timm",
    )
    parser.add_argument("--methods", type=names_of(tt.methods()), default=",".join(METHODS))
    parser.add_argument("--batch", type=int, default=None, help="images; by the model")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default=None, help="cpu or cuda; both where there are both")
    parser.add_argument("--measure", type=names_of(("seconds", "memory")), default="seconds,memory")
    parser.add_argument("--overhead", action="store_true", help="of a call, and nothing else")
    parser.add_argument("--out", type=Path, default=None, help="JSON file that the rows join")
    parser.add_argument("--page", type=Path, default=None, help="write the tables of --out there")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), default=None)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share that may be worse")
    chosen = parser.parse_args()
    if chosen.compare:
        old, new = (json.loads(path.read_text()) for path in chosen.compare)
        worse, left, figures = compare(old, new, tolerance=chosen.tolerance)
        told = [f"not compared: {what}" for what in left]
        print("\n".join([*told, *(worse or [f"of {figures} figures nothing is worse"])]))
        return 1 if worse else 0 if figures else 2
    if chosen.page and not chosen.out:
        parser.error("--page writes the tables of a file; name it by --out")
    if chosen.page:
        page(chosen.page, json.loads(chosen.out.read_text()))
        return 0
    if chosen.overhead:
        spent = {"machine": where(), **overhead()}
        print("overhead of a call, ms:", spent)
        keep(chosen.out, {"rows": [], "overhead_ms": spent})
        return 0
    rows: list[dict[str, Any]] = []
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    for device, name in product(
        [chosen.device] if chosen.device else devices, chosen.models.split(",")
    ):
        size = chosen.batch or BATCH.get(name, 16)
        rows += measure(name, size, chosen.methods, chosen.rounds, chosen.measure, device)
        keep(chosen.out, {"rows": rows})
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
