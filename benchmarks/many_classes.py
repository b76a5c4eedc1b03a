"""A thousand classes: what guard, gate and methods do where classes are many more than a window's samples.

    python benchmarks/many_classes.py                    trains two networks, then all streams; goes on where it was
    python benchmarks/many_classes.py --methods tent     some methods
    python benchmarks/many_classes.py --seconds 300      stops after the cell that passes 300 seconds
    python benchmarks/guard.py --page                    the page, from the file of numbers

An image is three garments of Fashion-MNIST side by side, its class the three together: 10 x 10 x 10.
Triples are drawn from the training files for training, from the test files for the streams. The
networks are kept in `--models`. Writes `benchmarks/many_classes.json`.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

import testtime as tt
from between import write_json
from testtime._core.seeds import generator
from testtime.bench.machine import describe_machine
from testtime.bench.networks import Norm, Residual, group_norm
from testtime.streams.data import ImageSet, load_data, stack
from testtime.streams.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/many_classes.json"
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": group_norm}
EACH = 20
"""Test images of a class."""
WEATHER = "domains=impulse_noise+zoom_blur+frost+brightness+glass_blur+clean"
STREAMS = {
    "clean": "stationary,domains=clean,samples=2048",
    "impulse noise": "stationary,domains=impulse_noise,severity=3,samples=2048",
    "continual, 3": f"continual,{WEATHER},severity=3,samples=1024",
    "continual, 5": f"continual,{WEATHER},severity=5,samples=1024",
    "continual, by 8": f"continual,{WEATHER},severity=3,samples=384,batch_size=8",
    "single": f"continual,{WEATHER},severity=3,samples=128,batch_size=1",
    "dirichlet": f"continual,dirichlet,{WEATHER},severity=3,samples=1024",
    "sorted": f"continual,sorted,{WEATHER},severity=3,samples=1024",
    "long-tailed": f"continual,long-tailed,{WEATHER},severity=3,samples=1024",
    "100 classes": f"continual,{WEATHER},severity=3,samples=1024",
    "5 classes": f"continual,{WEATHER},severity=3,samples=100",
    "100 clean": "stationary,domains=clean,samples=2000",
    "5 clean": "stationary,domains=clean,samples=100",
}
FEW = {
    "sorted": 51,
    "dirichlet": 51,
    "100 classes": 100,
    "5 classes": 5,
    "100 clean": 100,
    "5 clean": 5,
}
"""Stream -> how many of the classes come, at random."""
METHODS = {
    "batch": ("bn-adapt", "tent", "rotta", "roid", "lame"),
    "group": ("tent", "tent 10x", "cotta", "deyo"),
}
GATED = ("clean", "impulse noise", "continual, 3", "continual, 5", "continual, by 8", "single")
OPTIONS: dict[str, dict[str, Any]] = {"tent 10x": {"lr": 1e-2}}


class Network(nn.Module):
    """A small residual network whose head sees every place, with a softmax over a thousand."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), norm(16), nn.ReLU())
        self.stages = nn.Sequential(Residual(16, 32, 2, norm), Residual(32, 48, 2, norm))
        self.head = nn.Linear(48 * 4 * 11, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem((x - 0.2860) / 0.3530)).flatten(1))


def garments(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in bytes and labels of the whole set."""
    held = load_data("fashion-mnist", split=split)
    assert isinstance(held, ImageSet)
    return held.images, held.labels


def triples(images: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Three images side by side and their class, of places (n, 3)."""
    wide = torch.cat([images[column] for column in places.T], 3)
    return wide, labels[places] @ torch.tensor([100, 10, 1])


def tested() -> ImageSet:
    """`EACH` test images of each of the thousand classes."""
    images, labels = garments("test")
    random = generator(0, "many", "test")
    members = torch.stack([(labels == c).nonzero()[:, 0] for c in range(10)])  # (10, 1000)
    kinds = torch.cartesian_prod(*3 * [torch.arange(10)]).repeat_interleave(EACH, 0)
    drawn = torch.randint(members.shape[1], kinds.shape, generator=random)
    return ImageSet(*triples(images, labels, members[kinds, drawn]))


def trained(norm: str, folder: Path, *, epochs: int = 3, size: int = 128) -> nn.Module:
    """The network of that kind, from the folder or trained on as many triples as images, anew each time."""
    torch.manual_seed(0)
    model, path = Network(NORMS[norm]), folder / f"thousand_{norm}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    images, labels = garments("train")
    random, began = generator(0, "many", "train"), time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-5)
    steps = epochs * (len(images) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        places = torch.randint(len(images), (size, 3), generator=random)
        wide, answers = triples(images, labels, places)
        loss = F.cross_entropy(model(wide.float() / 255), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(
                norm,
                step,
                f"{float(loss.detach()):.3f} {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def sent(held: ImageSet, stream: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of each batch."""
    data: Any = held
    if stream in FEW:
        chosen = torch.randperm(1000, generator=generator(2, "many", "few"))[: FEW[stream]]
        data = Subset(held, torch.isin(held.labels, chosen).nonzero()[:, 0].tolist())
    for batch in Scenario.parse(STREAMS[stream]).stream(data, seed=2):
        yield batch.inputs, batch.labels


def source_batches() -> list[tuple[Tensor, Tensor]]:
    """Two thousand training triples, in batches."""
    images, labels = garments("train")
    places = torch.randint(len(images), (2000, 3), generator=generator(0, "many", "source"))
    wide, answers = triples(images, labels, places)
    return [stack(ImageSet(wide, answers), part) for part in torch.arange(2000).split(64)]


def cell(
    model: nn.Module, method: str, held: ImageSet, stream: str, **more: Any
) -> dict[str, float]:
    """Error of a method on a stream, what it cost, and how often the source answered."""
    name, options = method.partition(" ")[0], OPTIONS.get(method, {})
    gated = isinstance(more.get("gate"), bool)
    source = None
    if tt.methods()[name].needs or gated:
        source = tt.fit_source(model, source_batches(), methods=[name], gate=gated)
    adapter = tt.adapt(model, name, source=source, **options, **more)
    wrong = seen = 0
    spent = 0.0
    for inputs, labels in sent(held, stream):
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answers = adapter(inputs).argmax(1)
        spent += time.perf_counter() - begun
        wrong, seen = wrong + int((answers != labels).sum()), seen + len(labels)
    counts = adapter.counts
    return {
        "error": 100 * wrong / seen, "seconds": spent, "forwards": counts.forwards / counts.samples,
        "distrusted": counts.distrusted / counts.steps, "spared": counts.spared / counts.steps,
    }  # fmt: skip


def run(
    found: list[dict[str, Any]], norm: str, methods: Sequence[str], folder: Path, until: float
) -> None:
    """All cells of a network that are not there yet; each is written when it is done."""
    there = {(row["norm"], row["method"], row["stream"]) for row in found}
    model, held = trained(norm, folder), tested()
    machine = describe_machine(torch.device("cpu"))
    for method in ("source", *methods):
        for stream in STREAMS:
            if (norm, method, stream) in there or time.monotonic() > until:
                continue
            row = {"norm": norm, "method": method, "stream": stream, "machine": machine}
            row["plain"] = cell(model, method, held, stream)
            if method != "source":
                row["guard"] = cell(model, method, held, stream, guard=True)
            if method == "tent" and stream in GATED:
                row["gate"] = cell(model, method, held, stream, gate=True)
            found.append(row)
            write_json(NUMBERS, found)
            told = (f"{row[x]['error']:.1f}" for x in ("plain", "guard", "gate") if x in row)
            print(norm, method, stream, *told, flush=True)


def kept(frozen: float, plain: float, guarded: float) -> bool:
    """At most a point above the frozen model, and 80 % of a gain of more than a point kept."""
    gain = frozen - plain
    return guarded <= frozen + 1 and (gain <= 1 or frozen - guarded >= 0.8 * gain)


def page(found: Sequence[dict[str, Any]]) -> list[str]:
    """What was measured, in lines of Markdown: how many cells hold, and a table for each network."""
    lines: list[str] = []
    held = total = 0
    worst = 0.0
    for norm, methods in METHODS.items():
        mine = {(row["method"], row["stream"]): row for row in found if row["norm"] == norm}
        lines += ["", f"Network with {norm} normalisation:", ""]
        lines += [
            line(["stream", "frozen", *methods]),
            line(["---", *["--:"] * (len(methods) + 1)]),
        ]
        for stream in STREAMS:
            if ("source", stream) not in mine:
                continue
            frozen = mine["source", stream]["plain"]["error"]
            cells = [stream, f"{frozen:.1f}"]
            for method in methods:
                row = mine.get((method, stream))
                if row is None:
                    cells.append("")
                    continue
                plain, guarded = row["plain"]["error"], row["guard"]["error"]
                good = kept(frozen, plain, guarded)
                held, total, worst = held + good, total + 1, max(worst, guarded - frozen)
                text = f"{plain:.1f} / {guarded:.1f}"
                cells.append(text if good else f"**{text}**")
            lines.append(line(cells))
    first = (
        f"{held} of {total} hold; the largest excess over the frozen model is {worst:.1f} points."
    )
    rows = [row for row in found if "gate" in row]
    if rows:
        lines += [
            "",
            "With `gate=True`, `tent`, error without / with, and share of batches passed over:",
            "",
        ]
        lines += [
            line(["network", "stream", "error", "passed over"]),
            line(["---", "---", "--:", "--:"]),
        ]
    for row in rows:
        errors = f"{row['plain']['error']:.1f} / {row['gate']['error']:.1f}"
        lines.append(
            line([row["norm"], row["stream"], errors, f"{100 * row['gate']['spared']:.0f} %"])
        )
    return ["", first, *lines, ""]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", help="names with commas between; default: all of the page")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "build", help="folder of the networks"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    found: list[dict[str, Any]] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    for norm, methods in METHODS.items():
        chosen = given.methods.split(",") if given.methods else methods
        run(found, norm, [name for name in methods if name in chosen], given.models, until)


if __name__ == "__main__":
    main()
