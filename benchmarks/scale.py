"""How cost grows: with batch, resolution, classes, parameters and ranks; figures, and plots.

    python benchmarks/scale.py --out benchmarks/scale.json --plots docs/plots

Times are seconds of a step of Tent against plain inference, smallest of rounds, on a small residual
network (resnet18, random weights). Parameters, and multiplications of inference and of the minimal
step for an image of 224 pixels, are counted on devices without memory. Ranks are processes of one machine, each with its own batch, that adapt together over gloo, and apart: they share
its cores, so it is the difference that tells what their agreement costs.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import testtime as tt
from between import write_json
from cost import machine, told
from plots import lines
from testtime.adaptation.layers import norm_layers
from textbook import minimal, plain

TITLES = {"batch": "images", "pixels": "pixels a side", "classes": "classes", "ranks": "ranks"}
COUNTED = ("resnet18", "resnet50", "resnet152", "vit_b_16", "vit_l_16", "vit_h_14")


def network(classes: int = 1000) -> nn.Module:
    """The network that is timed."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=classes).eval()


def figures(model: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of inference and of a step, smallest of rounds."""
    steps = {"inference": plain(model), "tent": tt.adapt(model, "tent")}
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(x)
            if number:  # the first also looks at the model
                best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    return {**best, "ratio": best["tent"] / best["inference"]}


def counted(names: Sequence[str] = COUNTED) -> list[dict[str, Any]]:
    """Parameters, how many of them Tent adapts, and billions of multiplications for an image.

    All without memory for them.
    """
    rows = []
    for name in names:
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None).eval()
            x = torch.empty(1, 3, 224, 224)
        total = sum(p.numel() for p in model.parameters())
        own = dict(model.named_parameters())
        adapted = sum(own[t].numel() for layer in norm_layers(model) for t in layer.tensors)
        row = {"model": name, "parameters": total, "adapted": adapted}
        for key, step in {"inference": plain(model), "minimal step": minimal(model)}.items():
            with FlopCounterMode(display=False) as counter:
                step(x)
            row[key] = counter.get_total_flops() / 2e9  # a multiplication and an addition
        rows.append(row)
    return rows


def rank(number: int, world: int, store: str, rounds: int, out: Any) -> None:
    """One process: its best time of a step, agreeing with the others and beside them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=world
    )
    group = torch.distributed.group.WORLD
    steps = {
        "together": tt.adapt(network(10), "tent", process_group=group),
        "apart": tt.adapt(network(10), "tent"),
    }
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(number))
    best = dict.fromkeys(steps, float("inf"))
    for step in range(rounds + 1):
        for name, adapter in steps.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            adapter(x)
            if step:
                best[name] = min(best[name], 1000 * (time.perf_counter() - start))
    out[number] = best
    torch.distributed.destroy_process_group()


def ranks(world: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step of so many processes, of the slowest."""
    with tempfile.TemporaryDirectory() as folder, processes.Manager() as manager:
        out = manager.dict()
        store = str(Path(folder) / "store")
        processes.spawn(rank, (world, store, rounds, out), nprocs=world)
        return {name: max(own[name] for own in out.values()) for name in out[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plots", type=Path, default=None, help="folder")
    chosen = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    model = network()
    for kind, values in (("batch", (1, 4, 16, 64)), ("pixels", (64, 128, 192, 256))):
        rows = []
        for value in values:
            told(f"{kind} {value}")
            size, side = (value, 96) if kind == "batch" else (8, value)
            rows.append(
                {kind: value, **figures(model, torch.rand(size, 3, side, side), chosen.rounds)}
            )
        found[kind] = rows
    found["classes"] = []
    for classes in (10, 100, 1000, 21841):
        told(f"classes {classes}")
        x = torch.rand(16, 3, 96, 96)
        found["classes"].append({"classes": classes, **figures(network(classes), x, chosen.rounds)})
    found["parameters"] = counted()
    found["ranks"] = []
    for world in (1, 2, 4):
        told(f"ranks {world}")
        found["ranks"].append({"ranks": world, **ranks(world, 10 * chosen.rounds)})
    print(json.dumps(found, indent=1))
    if chosen.out:
        write_json(chosen.out, found)
    if chosen.plots:
        draw(found, chosen.plots)


def draw(found: dict[str, Any], folder: Path) -> None:
    """The plots: milliseconds, and multiplications, on axes of powers."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, title in TITLES.items():
        names = ("apart", "together") if kind == "ranks" else ("inference", "tent")
        series = {name: [(row[kind], row[name]) for row in found[kind]] for name in names}
        picture = lines(series, x=title, y="milliseconds a batch")
        (folder / f"cost-{kind}.svg").write_text(picture)
    rows = sorted(found["parameters"], key=lambda row: row["parameters"])
    counts = {
        name: [(row["parameters"], row[name]) for row in rows]
        for name in ("inference", "minimal step")
    }
    picture = lines(counts, x="parameters", y="billions of multiplications an image")
    (folder / "cost-parameters.svg").write_text(picture)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
