"""What it takes to see that an adapter follows its reference, step by step."""

import torch
from torch import Tensor

from models import batches

Z = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
T = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]])


def close(got: Tensor, expected: Tensor | list[float], atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=atol)


def darker(x: Tensor, generator: torch.Generator) -> Tensor:
    return 0.8 * x


def assert_follows(adapter, other, learnt, *, skip: tuple[str, ...] = ()) -> None:
    """Answers and adapted tensors agree over ten batches, and something has moved."""
    for x in batches():
        close(adapter(x), other(x))
    source = dict(adapter.model.named_parameters())
    moved = 0.0
    for name, value in adapter.snapshot().tensors.items():
        if name not in skip:
            close(value, dict(learnt.named_parameters())[name].detach())
        moved = max(moved, float((value - source[name].detach()).abs().max()))
    assert moved > 1e-3


def labelled(count: int, **more) -> list[tuple[Tensor, Tensor]]:
    xs = batches(count, **more)
    return [(x, (x.mean((1, 2, 3)) * 5).long().clamp(max=3)) for x in xs]  # none of class 4


NOISE = ("conv2.bias",)  # batch normalisation removes it: its gradient is rounding noise
