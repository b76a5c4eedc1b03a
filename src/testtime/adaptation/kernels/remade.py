"""What a backward can have made again by cheap calls, from what a graph keeps anyway.

A normalisation keeps its input. What it gave, and what an activation made of that, are a pass or two over
that input away. So who needs them in a backward need not keep them: a SiLU, of which torch keeps the
input, or the product with a gate, of which torch keeps both factors.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from testtime._core.devices import is_autocasting
from testtime.adaptation.kernels.batch_statistics import norm_of_batch, of_batch_again
from testtime.adaptation.kernels.calls import Call
from testtime.adaptation.kernels.layout import Shape

Way = Callable[[], Tensor]
"""Makes a tensor again."""


class Remade:
    """Tensors that can be made again, and how.

    Example:
        >>> x = torch.randn(4, 3, requires_grad=True)
        >>> remade = Remade()
        >>> y = F.layer_norm(x, (3,))
        >>> remade.normalised(y, F.layer_norm, (3,))
        >>> z = remade.activated(F.silu, F.silu, y)
        >>> torch.equal(remade.way(z)(), z), remade.way(x)
        (True, None)
    """

    def __init__(self) -> None:
        self._ways = WeakTensorKeyDictionary()

    def way(self, x: Any) -> Way | None:
        """How x is made again; None where nobody knows, or it was written to since."""
        known: Any = self._ways.get(x) if self._ways and isinstance(x, Tensor) else None
        return known[1] if known is not None and known[0] == x._version else None

    def note(self, made: Tensor, way: Way) -> None:
        """Keeps how a tensor is made again."""
        self._ways[made] = made._version, _as_cast(way, made.device)

    def normalised(self, made: Tensor, func: Call, *more: Any, **named: Any) -> None:
        """Notes what a normalisation gave, of its input and these arguments."""
        if type(made.grad_fn).__name__ in KEEP_THEIR_INPUT:
            again = _AGAIN.get(func, _norm)
            self.note(made, partial(again, made.grad_fn, func, *more, **named))

    def activated(self, func: Call, go_on: Call, x: Tensor, *more: Any, **named: Any) -> Tensor:
        """What an activation gives, which keeps nothing where its input can be made again."""
        way = self.way(x)
        if way is None:
            return go_on(x, *more, **named)
        sizes = x.shape  # the graph holds the function below, which must not hold x
        with _kept(lambda kept: way if kept.shape == sizes else kept):
            made: Tensor = go_on(x, *more, **named)
        self.note(made, lambda: func(way(), *more, **named))
        return made

    def multiplied(self, go_on: Call, *factors: Any, **named: Any) -> Tensor:
        """What a product gives, which keeps none of its factors that can be made again."""
        ways = {_lies(x): way for x in factors if (way := self.way(x)) is not None}

        def shorten(kept: Tensor) -> Tensor | Way:
            return ways.get(_lies(kept), kept)

        with _kept(shorten) if ways else nullcontext():
            return go_on(*factors, **named)


def _as_cast(way: Way, device: torch.device) -> Way:
    """The way under the autocast of now: who makes a tensor again in a backward mostly is outside of it."""
    if not is_autocasting(device):
        return way
    kind = device.type
    dtype = torch.get_autocast_dtype(kind)

    def again() -> Tensor:
        with torch.autocast(kind, dtype, cache_enabled=False):
            return way()

    return again


def _lies(x: Tensor) -> tuple[int, Shape]:
    """Where a tensor lies and how: its transpose begins in the same place."""
    return x.data_ptr(), Shape.of(x)


def _kept(shorten: Callable[[Tensor], Tensor | Way]) -> torch.autograd.graph.saved_tensors_hooks:
    return torch.autograd.graph.saved_tensors_hooks(shorten, _lengthen)


def _lengthen(kept: Tensor | Way) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept()


def _batch_norm(
    node: Any, func: Call, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, *more: Any, **named: Any,
) -> Tensor:  # fmt: skip
    if not hasattr(node, "_saved_input"):
        return of_batch_again(node, bias)
    if training:  # whose averages have moved
        running_mean = running_var = None
    return func(
        node._saved_input, running_mean, running_var, weight, bias, training, *more, **named
    )


def _norm_of_batch(
    node: Any, func: Call, weight: Tensor | None, bias: Tensor | None, eps: float, *more: Any
) -> Tensor:
    if not hasattr(node, "_saved_input"):
        return of_batch_again(node, bias)
    return F.batch_norm(node._saved_input, None, None, weight, bias, True, 0.0, eps)


def _norm(node: Any, func: Call, *more: Any, **named: Any) -> Tensor:
    return func(node._saved_input, *more, **named)


_AGAIN = {F.batch_norm: _batch_norm, norm_of_batch: _norm_of_batch}
KEEP_THEIR_INPUT = (
    "_OfBatchBackward", "NativeBatchNormBackward0", "CudnnBatchNormBackward0",
    "NativeLayerNormBackward0", "NativeGroupNormBackward0",
)  # fmt: skip
"""Nodes of a graph that normalise, and can be asked for what they normalised."""
