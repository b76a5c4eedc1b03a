"""Who holds a gradient: one that a backward alone holds may be written over."""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor


def holders(grad: Tensor) -> tuple[int, ...]:
    """How many names, handles and tensors hold a gradient or its memory; empty if torch hides it."""
    if not hasattr(grad, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return ()
    storage = grad.untyped_storage()
    inside: Any = torch._C
    return sys.getrefcount(grad), grad._use_count(), inside._storage_Use_Count(storage._cdata)


class _Asked(torch.autograd.Function):
    """Notes who holds the gradients that it is handed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, into: list[tuple[int, ...]]) -> Tensor:
        ctx.into = into
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        ctx.into.append(holders(grad))
        return grad * 2, None


@cache
def held_by_nobody() -> tuple[int, ...] | None:
    """What `holders` says of a gradient that a backward alone holds; None if it cannot be told."""
    alone: list[tuple[int, ...]] = []
    shared: list[tuple[int, ...]] = []
    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True, device="cpu")
        torch.autograd.grad((_Asked.apply(x, alone) * 3).sum(), x)
        both = _Asked.apply(x, shared) + _Asked.apply(x, shared)
        torch.autograd.grad((both * 3).sum(), x)
        torch.autograd.grad(_Asked.apply(x, shared).sum(), x)  # one number, expanded
    told = alone[0] and alone[0] not in (shared[0], shared[2])
    return alone[0] if told else None
