"""What each method costs in theory: passes for each image, and bytes held between batches.

    python benchmarks/counts.py --page docs/performance.md

Counted on a ResNet-50 (BatchNorm, random weights): the passes that a recipe tells, and what the plan
says is held beside the model once the first step was taken. Memories of images grow as they fill.
"""

import argparse
from pathlib import Path

import torch
import torchvision

import testtime as tt
from between import write_between
from cost import METHODS
from testtime._core.registry import find

ALSO = ("dent", "tesla")


def number(value: float | None) -> str:
    """A count as text."""
    return "" if value is None else f"{value:g}"


def table() -> list[str]:
    """A line for each method."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=10).eval()
    whole = sum(t.nbytes for t in model.state_dict().values())
    x = torch.rand(4, 3, 32, 32)
    lines = [
        "| method | forwards | backwards | MB held beside the model | share of the model |",
        "|---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys((*METHODS, *ALSO)):
        source = None
        if tt.methods()[name].needs:
            batch = (x, torch.arange(4))
            source = tt.fit_source(model, [batch, batch], methods=[name])
        held = tt.adapt(model, name, source=source).plan().bytes
        forwards, backwards = find("method", name).build().passes or (None, None)
        lines.append(
            f"| [`{name}`](methods/{name}.md) | {number(forwards)} | {number(backwards)} "
            f"| {held / 2**20:.2f} | {held / whole:.1%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", type=Path, default=None)
    chosen = parser.parse_args()
    lines = table()
    print("\n".join(lines))
    if chosen.page:
        write_between(chosen.page, "counted", lines)


if __name__ == "__main__":
    main()
