"""What each method costs in theory: passes for each image, and bytes held between batches.

    python benchmarks/counts.py --page docs/performance.md

Counted on a ResNet-50 (BatchNorm, random weights): the passes that a recipe tells; the memory of what
an adapter keeps once it took a step, where it is not the model's own; and what the method must be
told of the source data. Memories of images grow as they fill.
"""

import argparse
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import testtime as tt
from between import write_between
from cost import METHODS, options_of
from settings import setting
from testtime._core.errors import ScopeError, TesttimeWarning
from testtime._core.registry import entries, find
from testtime.adaptation.layers import Hook, hooked

SURE = {"stamp": {"margin": 1.0}}
"""Options beside those of `cost.py` with which a method learns from every sample."""


def number(value: float | None, digits: str = "g") -> str:
    """A count as text."""
    return "" if value is None else f"{value:{digits}}"


def places(tree: Any) -> dict[int, int]:
    """The memory that tensors of a tree lie in: where it begins, and its bytes."""
    if isinstance(tree, Tensor):
        memory = tree.untyped_storage()
        return {memory.data_ptr(): memory.nbytes()}
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif is_dataclass(tree):
        tree = vars(tree).values()
    found: dict[int, int] = {}
    if isinstance(tree, Iterable) and not isinstance(tree, str):
        for part in tree:
            found |= places(part)
    return found


def held(name: str, model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes beside a model after an update by a method, and those known of the source data.

    Raises:
        ScopeError: the method is not for such a model.
        RuntimeError: it did not learn, so that nothing can be said.
    """
    model, pairs, options = setting(name, model, x, len(x))
    options |= {**options_of(name, 1.0, len(x)), **SURE.get(name, {})}
    source = tt.fit_source(model, pairs, methods=[name]) if pairs else None
    adapter = tt.adapt(model, name, source=source, **options)
    adapter(x)
    if adapter.recipe.learns and not adapter.counts.updates:
        raise RuntimeError(f"{name} did not learn from its batch")
    own = places(model.state_dict())
    kept = {place: size for place, size in places(adapter.snapshot()).items() if place not in own}
    return sum(kept.values()), sum(places(source.entries if source else ()).values())


def needed(model: nn.Module, x: Tensor) -> str:
    """What a step on the normalisation layers of a network must keep for its backward, in words.

    Args:
        model: a ResNet, in eval mode.
        x: one image.
    """
    kept = dict.fromkeys((nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d), 0.0)

    def see(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            kept[nn.BatchNorm2d] += args[0].nbytes
        elif isinstance(module, nn.ReLU):
            kept[nn.ReLU] += output.numel() / 24 * 4  # 24 bits in a number of 32
        elif isinstance(module, nn.MaxPool2d):
            kept[nn.MaxPool2d] += 4 * output.numel()

    with torch.no_grad(), hooked(Hook(m, see, after=True) for m in model.modules()):
        model(x)
    norm, relu, pool = (size / 2**20 for size in kept.values())
    return (
        f"For each image of {x.shape[-1]} pixels a step of `tent` must keep {norm:.1f} MB of inputs of "
        f"normalisation layers, {relu:.1f} MB of bits of ReLUs and {pool:.1f} MB of places of maxima: "
        f"{64 * (norm + relu + pool):,.0f} MB for 64 images, {16 * (norm + relu + pool):,.0f} for 16."
    )


def table() -> list[str]:
    """A line for each method, and one of what a backward needs."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10).eval()
    whole = sum(t.nbytes for t in model.state_dict().values())
    x = torch.rand(4, 3, 32, 32)
    lines = [
        "| method | forwards | backwards | MB held | share of the model | MB of source data |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys((*METHODS, *entries("method"))):
        forwards, backwards = find("method", name).build().passes or (None, None)
        try:
            kept, known = (size / 2**20 for size in held(name, model, x))
        except ScopeError:
            kept = known = None
        share = None if kept is None else kept * 2**20 / whole
        lines.append(
            f"| [`{name}`](methods/{name}.md) | {number(forwards)} | {number(backwards)} "
            f"| {number(kept, '.2f')} | {number(share, '.1%')} | {number(known or None, '.2f')} |"
        )
    return [*lines, "", needed(model, torch.rand(1, 3, 224, 224))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, default=None)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore", TesttimeWarning)
    lines = table()
    print("\n".join(lines))
    if chosen.page:
        write_between(chosen.page, "counted", lines)


if __name__ == "__main__":
    main()
