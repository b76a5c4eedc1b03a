"""What single pieces of the engine cost: the figures of docs/engine.md that are of no whole step.

    python benchmarks/pieces.py          measures, and writes benchmarks/pieces.json and the page
    python benchmarks/pieces.py --page   only the page

`copies`: an augmented copy of a batch by the published operations, as the textbook methods make it, and
by ours. Both draw by chance, so many copies are made of each; median CPU time of one thread. `view`: a
copy of 16 images in units of a ResNet-50's forward of them. `joined`: a step of `cotta` on 4 images with
16 copies, one by one and in one forward. `mode`: inference of a ResNet-50 under a mode of torch that does
nothing, over inference without.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.overrides import TorchFunctionMode

import testtime as tt
from between import write_between, write_json
from testtime.adaptation import shortcuts
from testtime.adaptation.methods.cotta import cotta
from testtime.adaptation.parts.views import augmix_view, cotta_view
from testtime.bench.machine import describe_machine
from testtime.bench.models import load_model
from testtime.streams.data import load_data, stack
from textbook.episodic import augmix
from textbook.parts import view

NUMBERS = Path(__file__).with_name("pieces.json")
PAGE = Path(__file__).resolve().parents[1] / "docs/engine.md"
ROUNDS = 40
SIZES = (16, 224), (64, 28)
COPIES = {"cotta": (view, cotta_view), "memo": (augmix, augmix_view)}
Timed = Mapping[str, Callable[[], Any]]


class Idle(TorchFunctionMode):
    """Sees every call of torch, and makes it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **kwargs or {})


def medians(calls: Timed, rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of each call, one after another in rounds; CPU time of this thread."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken[name].append(1000 * (time.thread_time() - start))
    return {name: statistics.median(own[2:]) for name, own in taken.items()}


def copies(x: torch.Tensor, method: str) -> dict[str, float]:
    """Milliseconds of a copy of a batch, as published and as here."""
    random, (theirs, ours) = torch.Generator().manual_seed(0), COPIES[method]
    # the textbook's copy is of an image where each has draws of its own
    each = x.split(1) if method == "memo" else [x]
    return medians(
        {"published": lambda: [theirs(part) for part in each], "here": lambda: ours(x, random)}
    )


def forwards() -> dict[str, float]:
    """Milliseconds of a ResNet-50's forward of 16 images, bare and under a mode."""
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50().eval(), torch.randn(16, 3, 224, 224)

    def under(mode: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad(), mode:
                model(x)

        return run

    return medians({"bare": under(nullcontext()), "under a mode": under(Idle())}, rounds=9)


def joined() -> dict[str, float]:
    """Milliseconds of a step of `cotta` whose 16 copies of 4 images go one by one, and together."""
    x, _ = stack(load_data("fashion-mnist:sample"), range(4))
    recipe = cotta(threshold=1.0, views=16)  # nothing is sure enough: copies of every batch

    def step(most: int) -> Callable[[], Any]:
        adapter = tt.adapt(load_model("embedded:batch"), recipe)

        def run() -> None:
            held = shortcuts.JOINED["cpu"]
            shortcuts.JOINED["cpu"] = most
            try:
                adapter(x)
            finally:
                shortcuts.JOINED["cpu"] = held

        return run

    return medians({"one by one": step(0), "together": step(1 << 20)})


def measured() -> dict[str, Any]:
    """All figures."""
    rows = []
    for method in COPIES:
        for size, side in SIZES:
            x = torch.rand(size, 3 if side > 28 else 1, side, side)
            rows.append({"method": method, "images": size, "pixels": side} | copies(x, method))
            print(rows[-1], flush=True)
    found = {"machine": describe_machine(torch.device("cpu")), "copies": rows}
    found |= {"forwards": forwards(), "joined": joined()}
    print(found["forwards"], found["joined"])
    return found


def write_page(found: Mapping[str, Any], page: Path) -> None:
    """The figures, in the page."""
    lines = ["| copies | the published operations | here |", "|---|--:|--:|"]
    for row in found["copies"]:
        what = f"`{row['method']}`, {row['images']} images of {row['pixels']} pixels"
        lines.append(f"| {what} | {row['published']:.1f} ms | {row['here']:.1f} ms |")
    write_between(page, "copies", lines)
    bare, mode = found["forwards"]["bare"], found["forwards"]["under a mode"]
    large = next(row for row in found["copies"] if row["method"] == "cotta" and row["pixels"] > 28)
    alone, together = found["joined"]["one by one"], found["joined"]["together"]
    lines = [
        "| | ms | |", "|---|--:|---|",
        f"| inference of a ResNet-50, 16 images | {bare:.0f} | |",
        f"| the same under a mode of torch that does nothing | {mode:.0f} | {mode / bare:.3f} of it |",
        f"| a copy of `cotta` of 16 images, as published | {large['published']:.0f} |"
        f" {large['published'] / bare:.2f} of it |",
        f"| such a copy here | {large['here']:.0f} | {large['here'] / bare:.2f} of it |",
        f"| a step of `cotta` on the embedded classifier, 16 copies of 4 images one by one | {alone:.0f} | |",
        f"| the same, all copies in one forward | {together:.0f} | {together / alone:.2f} of that |",
    ]  # fmt: skip
    write_between(page, "pieces", lines)


def main() -> None:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="only the page, from the numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.page:
        write_json(NUMBERS, measured())
    write_page(json.loads(NUMBERS.read_text()), PAGE)


if __name__ == "__main__":
    main()
