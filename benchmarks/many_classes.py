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
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import testtime as tt
from between import write_json
from guarded import Errors, errors_table, line, said
from names import names_of
from testtime._core.seeds import generator
from testtime.bench.machine import describe_machine
from testtime.bench.networks import Norm, Residual, group_norm
from testtime.streams.data import ImageSet, load_data, stack
from testtime.streams.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/many_classes.json"
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": group_norm}
WEATHER = ("impulse_noise", "zoom_blur", "frost", "brightness", "glass_blur", "clean")
EACH = 20
"""Test images of a class, where all come."""
STREAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "clean": (("clean",), "samples=2048"),
    "impulse noise": (("impulse_noise",), "severity=3,samples=2048"),
    "continual, 3": (WEATHER, "severity=3,samples=1024"),
    "continual, 5": (WEATHER, "severity=5,samples=1024"),
    "continual, by 8": (WEATHER, "severity=3,samples=384,batch_size=8"),
    "single": (WEATHER, "severity=3,samples=192,batch_size=1"),
    "dirichlet": (WEATHER, "dirichlet,severity=3,samples=1024"),
    "sorted": (WEATHER, "sorted,severity=3,samples=1024"),
    "long-tailed": (WEATHER, "long-tailed,severity=3,samples=1024"),
    "100 classes": (WEATHER, "severity=3,samples=1024"),
    "5 classes": (WEATHER, "severity=3,samples=512"),
    "100 classes, clean": (("clean",), "samples=2048"),
    "5 classes, clean": (("clean",), "samples=512"),
}
"""Stream -> its domains, one after the other, each with samples of its own; and the order in each."""
FEW = {
    "sorted": (100, 100), "dirichlet": (100, 100), "100 classes": (100, 100), "5 classes": (5, 600),
    "100 classes, clean": (100, 100), "5 classes, clean": (5, 600),
}  # fmt: skip
"""Stream -> how many of the classes come, at random, and how many images there are of each."""
METHODS = {
    "batch": ("bn-adapt", "tent", "tent 10x", "rotta", "roid"),
    "group": ("tent", "tent 10x", "deyo"),
}
GATED = ("clean", "continual, 3", "continual, 5", "continual, by 8", "single", "5 classes, clean")


def lit(x: Tensor, generator: torch.Generator) -> Tensor:
    """A changed copy that is not mirrored, since that would change the class: light, and noise."""
    light = 0.6 + 0.8 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return (light * x + 0.02 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


OPTIONS: dict[str, dict[str, Any]] = {
    "tent 10x": {"lr": 1e-2},
    "rotta": {"augment": lit},
    "roid": {"augment": lit, "correction": "probs"},
}


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


def tested(classes: Tensor, each: int) -> ImageSet:
    """So many test images of each of these classes."""
    images, labels = garments("test")
    random = generator(0, "many", "test")
    members = torch.stack([(labels == c).nonzero()[:, 0] for c in range(10)])  # (10, 1000)
    kinds = torch.cartesian_prod(*3 * [torch.arange(10)])[classes].repeat_interleave(each, 0)
    drawn = torch.randint(members.shape[1], kinds.shape, generator=random)
    return ImageSet(*triples(images, labels, members[kinds, drawn]))


def trained(norm: str, folder: Path, *, epochs: int = 2, size: int = 128) -> nn.Module:
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


def sent(stream: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of each batch."""
    few, each = FEW.get(stream, (1000, EACH))
    held = tested(torch.randperm(1000, generator=generator(2, "many", "few"))[:few], each)
    domains, order = STREAMS[stream]
    for number, domain in enumerate(domains):
        scenario = Scenario.parse(f"stationary,{order},domains={domain}")
        for batch in scenario.stream(held, seed=number):
            yield batch.inputs, batch.labels


def source_batches() -> list[tuple[Tensor, Tensor]]:
    """Two thousand training triples, in batches."""
    images, labels = garments("train")
    places = torch.randint(len(images), (2000, 3), generator=generator(0, "many", "source"))
    wide, answers = triples(images, labels, places)
    return [stack(ImageSet(wide, answers), part) for part in torch.arange(2000).split(64)]


def cell(model: nn.Module, method: str, stream: str, **more: Any) -> dict[str, float]:
    """Error of a method on a stream, what it cost, and how often the source answered."""
    name, options = method.partition(" ")[0], OPTIONS.get(method, {})
    gated = isinstance(more.get("gate"), bool)
    source = None
    if tt.methods()[name].needs or gated:
        source = tt.fit_source(model, source_batches(), methods=[name], gate=gated)
    adapter = tt.adapt(model, name, source=source, **options, **more)
    wrong = seen = 0
    spent = 0.0
    for inputs, labels in sent(stream):
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
    model = trained(norm, folder)
    machine = describe_machine(torch.device("cpu"))
    for method in ("source", *methods):
        for stream in STREAMS:
            if (norm, method, stream) in there or time.monotonic() > until:
                continue
            row: dict[str, Any] = {"norm": norm, "method": method, "stream": stream}
            row["machine"] = machine
            row["plain"] = cell(model, method, stream)
            if method != "source":
                row["guard"] = cell(model, method, stream, guard=True)
            if method == "tent" and stream in GATED:
                row["gate"] = cell(model, method, stream, gate=True)
            found.append(row)
            write_json(NUMBERS, found)
            told = (f"{row[x]['error']:.1f}" for x in ("plain", "guard", "gate") if x in row)
            print(norm, method, stream, *told, flush=True)


TEXT = """## A thousand classes

{said} The windows and thresholds of the guard were set on ten classes; here they meet a thousand
(`python benchmarks/many_classes.py`).

- **Data.** An image is three garments side by side, and its class is the three together. Two small networks with a
  softmax over a thousand classes are trained on such triples of the training files.
- **Streams.** Severity 3, but 5 in "continual, 5". Batches of 64, unless said. 100 or 5 of the classes come where
  their number is said, and 100 in "sorted" and "dirichlet". {machine}.
- **Methods.** The augmented copies of `rotta` and `roid` are not mirrored, since that would change the class. `roid`
  has `correction="probs"`.
- **The guard.** A window of 128 samples holds at most an eighth of the classes, so the same answer hardly ever comes
  twice. Two things follow. What the adapted model keeps is also measured by the place of the source's answer in its
  list of classes. And if there are more classes than answers in a window, the error of how even these are is that of
  the few pairs that are equal.

**Bold** as above.

{tables}

Where it errs:

- **5 classes, nothing corrupted.** Answers of statistics of the batch are more even than the source's, as sure, and
  less often right; answers alone do not show that. The gate does see that nothing is wrong with the inputs.
- **Ten times the step of `tent`, clean images.** Among a thousand classes its harm shows too little in 128 answers.
- **5 classes in a shift.** Here it is the source that spreads its answers over many classes, and the adapted answers
  are rightly less even. Such gains are lost, as with few classes among ten.
- **Labels in an order.** Trust comes late.

### With a gate

Error of `tent` without / with `gate=True`, and the share of batches that the gate passes over. The gate knows the
source by `fit_source(..., gate=True)`. Measured when it judged the last 64 samples alone; since then it judges 256 as
well, so that milder shifts open it.

{gates}
"""


def section() -> str:
    """What was measured, as a section of the page."""
    found: list[dict[str, Any]] = json.loads(NUMBERS.read_text())
    tables, cells = list[str](), list[tuple[dict[str, float], Errors]]()
    for norm, methods in METHODS.items():
        mine = [row for row in found if row["norm"] == norm]
        plain = {(row["method"], row["stream"]): row["plain"]["error"] for row in mine}
        frozen = {name: plain["source", name] for name in STREAMS if ("source", name) in plain}
        errors = {
            (row["method"], row["stream"]): (row["plain"]["error"], row["guard"]["error"])
            for row in mine
            if row["method"] in methods
        }
        cells.append((frozen, errors))
        tables += ["", f"### thousand:{norm}", "", *errors_table(methods, frozen, errors)]
    gates = [line(["network", "stream", "without / with", "passed over"])]
    gates.append(line(["---", "---", "--:", "--:"]))
    for row in found:
        if "gate" in row:
            errors = f"{row['plain']['error']:.1f} / {row['gate']['error']:.1f}"
            spared = f"{100 * row['gate']['spared']:.0f} %"
            gates.append(line([row["norm"], row["stream"], errors, spared]))
    return TEXT.format(
        machine=found[0]["machine"], said=said(cells),
        tables="\n".join(tables).strip(), gates="\n".join(gates),
    ).strip()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--methods",
        type=names_of(chain.from_iterable(METHODS.values())),
        help="names with commas between; default: all of the page",
    )
    parser.add_argument(
        "--models", type=Path, default=ROOT / "build", help="folder of the networks"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + given.seconds
    found: list[dict[str, Any]] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    for norm, methods in METHODS.items():
        chosen = given.methods or methods
        run(found, norm, [name for name in methods if name in chosen], given.models, until)


if __name__ == "__main__":
    main()
