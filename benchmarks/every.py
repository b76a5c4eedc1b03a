"""What every method costs on small networks: seconds, memory and passes against plain inference.

    python benchmarks/every.py --networks embedded:batch,resnet18,vit --out benchmarks/every.json
    python benchmarks/every.py --page docs/performance.md      only the page, from the numbers

Every registered method, with the paper's options, answers and learns from the same batches as plain
inference, in rounds of a new order each, on one thread. Ratios are formed within a round; the table
shows their median. Memory is the largest sum of tensors that a step holds, less what inference
holds. Passes are counted from outside the library, at the last normalisation layer of the network:
images whose activations went through it, and images whose gradients did. Rows are joined to those
that `--out` holds already, so that networks and methods can be measured one by one.
"""

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import testtime as tt
from between import write_between, write_json
from compare import join
from cost import Confident, machine, peak_megabytes, seconds, told
from names import names_of
from settings import setting
from testtime._core.errors import ScopeError, TesttimeWarning
from testtime._core.registry import entries, find
from testtime.bench.models import load_model
from testtime.measures.entropy import entropy
from testtime.streams.corruptions import corrupt
from testtime.streams.data import load_data
from textbook import plain

HEAVY = (
    "memo", "vcotta", "petal", "psmt", "cotta", "dent", "stamp", "simatta", "foa",
)  # fmt: skip
"""Methods of many passes, which are timed in one round."""
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
Networks = dict[str, Callable[[int], tuple[nn.Module, Tensor]]]
SIZE = 64
"""Images in a batch, after as many of which RoTTA learns."""


class Passes:
    """Counts what goes through a network, seen from outside: at its last normalisation layer.

    Attributes:
        forwards, backwards: images whose activations, and whose gradients, went through it.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        ran: list[nn.Module] = []
        hooks = [
            module.register_forward_hook(lambda m, *_: ran.append(m))
            for module in model.modules()
            if isinstance(module, NORMS)
        ]
        with torch.no_grad():
            model(x)
        for hook in hooks:
            hook.remove()
        self.layer, self.forwards, self.backwards = ran[-1], 0, 0

    def __enter__(self) -> "Passes":
        self.hook = self.layer.register_forward_hook(self._forward)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.hook.remove()

    def _forward(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.forwards += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def embedded(name: str) -> Callable[[int], tuple[nn.Module, Tensor]]:
    """An embedded classifier on images in gaussian noise."""

    def make(size: int) -> tuple[nn.Module, Tensor]:
        data = load_data("fashion-mnist:sample")
        x = torch.stack([data[i][0] for i in range(2 * size)])
        random = torch.Generator().manual_seed(0)
        return load_model(name), corrupt(x, "gaussian_noise", 3, generator=random)

    return make


def untrained(build: Callable[[], nn.Module]) -> Callable[[int], tuple[nn.Module, Tensor]]:
    """A network of random weights on random images of 32 x 32.

    Its logits are so scaled that half of the predictions have less than a fifth of the largest
    entropy, so that methods which choose who teaches find samples to learn from.
    """

    def make(size: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model = build().eval()
        x = torch.rand(2 * size, 3, 32, 32)
        x = x * torch.linspace(0.3, 1, 2 * size)[torch.randperm(2 * size)].view(-1, 1, 1, 1)
        with torch.no_grad():
            logits = tt.adapt(model, "tent", lr=0.0)(x)
        scale = 1.0
        while entropy(scale * logits).median() > 0.2 * math.log(logits.shape[1]):
            scale *= 1.2
        return Confident(model, scale).eval(), x

    return make


def transformer() -> nn.Module:
    """Four blocks of width 128 on 65 tokens."""
    model = torchvision.models.VisionTransformer(32, 4, 4, 4, 128, 512, num_classes=10)
    nn.init.normal_(model.heads[0].weight, std=0.1)  # zero at first in torchvision
    return model


NETWORKS: Networks = {
    "embedded:batch": embedded("embedded:batch"),
    "embedded:group": embedded("embedded:group"),
    "resnet18": untrained(lambda: torchvision.models.resnet18(num_classes=10)),
    "vit": untrained(transformer),
}
"""Network -> what makes a model and two batches for it."""
ABOUT = {
    "embedded:batch": "the embedded classifier with BatchNorm, 28 x 28",
    "embedded:group": "the embedded classifier with GroupNorm, 28 x 28",
    "resnet18": "a ResNet-18 of random weights, 32 x 32",
    "vit": "a transformer of random weights, 32 x 32, 4 blocks of width 128, 65 tokens",
}


def adapted(name: str, model: nn.Module, x: Tensor, size: int) -> tuple[nn.Module, tt.Adapter]:
    """The model that a method takes, and the method on it.

    Raises:
        ScopeError: the method is not for such a model.
    """
    model, data, options = setting(name, model, x, size)
    source = tt.fit_source(model, data, methods=[name]) if data else None
    return model, tt.adapt(model, name, source=source, **options)


def measure(network: str, names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each method that takes the network."""
    size = SIZE
    model, x = NETWORKS[network](size)
    first, second = x.split(size)
    inference = plain(model)
    rows: list[dict[str, Any]] = []
    steps: dict[str, tt.Adapter] = {}
    inference(second)
    base = peak_megabytes(inference, second)
    for name in names:
        told(f"{network}: {name}")
        try:
            own, adapter = adapted(name, model, x, size)
            adapter(first)
        except ScopeError as error:
            told(f"  not for it: {error}")
            continue
        counts = adapter.counts
        with Passes(own, first) as passes:
            peak = peak_megabytes(adapter, second)
        steps[name] = adapter
        theory = find("method", name).build().passes
        rows.append({
            "model": network, "batch": size, "name": name,
            "forwards": passes.forwards / size, "backwards": passes.backwards / size,
            "told": [(after - before) / size for after, before in zip(
                (adapter.counts.forwards, adapter.counts.backwards),
                (counts.forwards, counts.backwards), strict=True)],
            "theory": theory,
            "megabytes_beyond": peak - base,
        })  # fmt: skip
    times: dict[str, list[float]] = {"inference": [], **{name: [] for name in steps}}
    random = torch.Generator().manual_seed(0)
    for number in range(rounds):
        told(f"{network}: round {number + 1} of {rounds}")
        order = ["inference", *steps]
        for place in torch.randperm(len(order), generator=random).tolist():
            name = order[place]
            if name in HEAVY and number:
                continue
            times[name].append(seconds(steps.get(name, inference), second))
    for row in rows:
        own = times[row["name"]]
        ratios = sorted(t / b for t, b in zip(own, times["inference"], strict=False))
        row["to_inference"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return rows


def page(path: Path, found: dict[str, Any]) -> None:
    """Writes the tables between the marks of a page."""
    about, lines = found["machine"], list[str]()
    for network in dict.fromkeys(row["model"] for row in found["rows"]):
        own = {row["name"]: row for row in found["rows"] if row["model"] == network}
        size = next(iter(own.values()))["batch"]
        lines += [
            f"**{ABOUT[network][0].upper()}{ABOUT[network][1:]}, batches of {size}**",
            "",
            "| method | forwards | backwards | times inference | MB beyond inference |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [line(own[name]) for name in entries("method") if name in own]
        away = [f"`{name}`" for name in entries("method") if name not in own]
        lines += [
            "",
            f"Not for this network, or not measured: {', '.join(away)}." if away else "",
            "",
        ]
    lines.append(f"{about['cpu']}, one thread of {about['cores']} cores, torch {about['torch']}.")
    write_between(path, "every", lines)


def line(row: dict[str, Any]) -> str:
    """One method in a table."""
    middle, low, high = row["to_inference"]
    spread = f" ({low:.1f} to {high:.1f})" if low < high else ""
    return (
        f"| [`{row['name']}`](methods/{row['name']}.md) | {row['forwards']:.3g} "
        f"| {row['backwards']:.3g} | {middle:.1f}{spread} | {row['megabytes_beyond']:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--networks", type=names_of(NETWORKS), default="embedded:batch,resnet18,vit"
    )
    parser.add_argument(
        "--methods", type=names_of(entries("method")), default=",".join(entries("method"))
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("every.json"))
    parser.add_argument("--page", type=Path, default=None, help="write the tables of --out there")
    chosen = parser.parse_args()
    if chosen.page:
        page(chosen.page, json.loads(chosen.out.read_text()))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", TesttimeWarning)
    for network in chosen.networks:
        rows = measure(network, chosen.methods, chosen.rounds)
        held = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
        write_json(chosen.out, join(held, {"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
