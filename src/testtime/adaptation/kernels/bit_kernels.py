"""ReLU with a bit kept for each value, on a GPU: one kernel forwards, one backwards.

torch's own operations do the same in a dozen calls, and to call is what takes time on a GPU. Triton
comes with torch where there is CUDA, and wants a C compiler; `bits` does without where it fails.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = 32
"""In a word: of as many values that follow each other in memory."""
ROWS = 64
"""Words that one program makes or reads."""


@triton.jit
def _places(count, bits: tl.constexpr, rows: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, bits)
    place = row[:, None] * bits + column[None, :]
    return row, column, place, place < count


@triton.jit
def _relu(x, y, words, count, bits: tl.constexpr, rows: tl.constexpr):
    row, column, place, inside = _places(count, bits, rows)
    value = tl.load(x + place, mask=inside, other=0)
    known = value if value.dtype == tl.float64 else value.to(tl.float32)
    passes = (known > 0) | (known != known)  # NaN stays what it is  # noqa: PLR0124
    tl.store(y + place, tl.where(passes, value, tl.zeros_like(value)), mask=inside)
    word = tl.sum(passes.to(tl.int32) << column[None, :], axis=1)
    tl.store(words + row, word, mask=row * bits < count)


@triton.jit
def _masked(grad, words, out, count, bits: tl.constexpr, rows: tl.constexpr):
    row, column, place, inside = _places(count, bits, rows)
    word = tl.load(words + row, mask=row * bits < count, other=0)
    value = tl.load(grad + place, mask=inside, other=0)
    passes = ((word[:, None] >> column[None, :]) & 1) != 0
    tl.store(out + place, tl.where(passes, value, tl.zeros_like(value)), mask=inside)


def relu(x: Tensor, *, inplace: bool) -> tuple[Tensor, Tensor]:
    """max(x, 0), and the bits of what is not zero.

    Args:
        x: without gaps in memory.
        inplace: whether x is written over.
    """
    y = x if inplace else torch.empty_like(x)
    words = torch.empty(triton.cdiv(x.numel(), BITS), dtype=torch.int32, device=x.device)
    _run(_relu, x, y, words, x.numel())
    return y, words


def masked(grad: Tensor, words: Tensor, out: Tensor) -> Tensor:
    """`out`, with the gradient where the bits are set and 0 elsewhere; both lie in memory as x did."""
    _run(_masked, grad, words, out, grad.numel())
    return out


def _run(kernel: Any, *given: Any) -> None:
    device, count = given[0].device, given[-1]
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(triton.cdiv(count, BITS * ROWS),)](*given, bits=BITS, rows=ROWS)
