"""Keeps for the backward only what it needs, where no convolution learns.

torch keeps the input of every convolution, also of one that is frozen, whose backward needs only the
shape; the result of every ReLU, of which it needs a bit for each value; and the input of every
maximum pooling, of which it needs the shape. Of a convolution, its normalisation and its ReLU, the
normalisation's input remains here, and a bit for each value.

A gradient that nobody else holds is masked where it lies: to make another tensor of its size costs
more than the mask. Bits are packed and read in pieces that stay in the cache, by as many threads as
torch has.

Answers and gradients are torch's to the last bit: the same kernels compute them.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Shape(NamedTuple):
    """How a tensor is laid out, without its values."""

    sizes: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> "Shape":
        """The layout of x."""
        return Shape(x.shape, x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        """A tensor laid out so, of any values; on a CPU its pages are never touched."""
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)


class _FrozenConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.how, ctx.shape = how, Shape.of(x)
        return torch.convolution(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        to_x, *_ = torch.ops.aten.convolution_backward(
            grads[0], ctx.shape.empty(), weight, None, *ctx.how, [True, False, False]
        )
        return (to_x, *[None] * (2 + len(ctx.how)))


class _BitReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = torch.relu_(x) if inplace else torch.relu(x)
        ctx.bits, ctx.shape = pack(y), Shape.of(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        # a product of this backward alone may be written to, unless it is differentiated again
        into = holders(grad) == _held_by_nobody() and not torch.is_grad_enabled()
        return masked(grad, ctx.bits, ctx.shape, into=into), None


class _ShapedMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        y, places = torch.ops.aten.max_pool2d_with_indices(x, *how)
        ctx.how, ctx.shape, ctx.places = how, Shape.of(x), places.to(torch.int32)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        to_x = torch.ops.aten.max_pool2d_with_indices_backward(
            grads[0], ctx.shape.empty(), *ctx.how, ctx.places.long()
        )
        return (to_x, *[None] * len(ctx.how))


def pack(y: Tensor) -> Tensor:
    """Which values are not zero, a bit each, in the order in which they lie in memory.

    Args:
        y: of any shape, without gaps in memory.

    Example:
        >>> pack(torch.tensor([0.0, 3.0, 0.0, 1.0]))
        tensor([80], dtype=torch.uint8)
    """
    flat = y.detach().as_strided((y.numel(),), (1,))
    if flat.device.type != "cpu":
        eights = F.pad(flat.bool().to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
        return (eights << _places(flat.device)).sum(1, dtype=torch.uint8)
    values = (flat if flat.dtype in (torch.float32, torch.float64) else flat.bool()).numpy()
    bits = np.empty((len(flat) + 7) // 8, np.uint8)

    def part(start: int, end: int) -> None:
        bits[start // 8 : (end + 7) // 8] = np.packbits(values[start:end] != 0)

    in_pieces(part, len(values))
    return torch.from_numpy(bits)


def unpack(bits: Tensor, shape: Shape) -> Tensor:
    """Which values were not zero, laid out as they were.

    Example:
        >>> unpack(torch.tensor([80], dtype=torch.uint8), Shape.of(torch.zeros(2, 2))).tolist()
        [[False, True], [False, True]]
    """
    count = shape.sizes.numel()
    if bits.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).view(torch.bool)
    else:
        flat = ((bits[:, None] >> _places(bits.device)) & 1).bool().view(-1)[:count]
    return flat.as_strided(shape.sizes, shape.strides)


def masked(grad: Tensor, bits: Tensor, shape: Shape, *, into: bool = False) -> Tensor:
    """The gradient where the bits are set, 0 elsewhere.

    Args:
        grad: of the shape that the bits were packed from.
        bits: from `pack`.
        shape: how the packed tensor lay in memory.
        into: whether the gradient may be written to.

    Example:
        >>> masked(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([64], dtype=torch.uint8),
        ...        Shape.of(torch.zeros(3)))
        tensor([0., 2., 0.])
    """
    alike = grad.shape == shape.sizes and grad.stride() == shape.strides
    if grad.device.type != "cpu" or not alike:
        return torch.ops.aten.threshold_backward(grad, unpack(bits, shape).to(grad.dtype), 0)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()]
    out = grad if into else shape.empty()
    count = grad.numel()
    given, found = (t.as_strided((count,), (1,)).view(whole).numpy() for t in (grad, out))
    packed = bits.numpy()

    def part(start: int, end: int) -> None:
        passed = np.unpackbits(packed[start // 8 : (end + 7) // 8], count=end - start)
        passed = passed.view(np.int8)
        np.negative(passed, out=passed)  # 0, or all bits
        np.bitwise_and(given[start:end], passed, out=found[start:end])

    in_pieces(part, count)
    return out


def in_pieces(part: Callable[[int, int], None], count: int) -> None:
    """Calls part(start, end) for pieces of 0 to count, by as many threads as torch has.

    Example:
        >>> in_pieces(lambda start, end: print(start, end), 3)
        0 3
    """
    pieces = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    threads = min(torch.get_num_threads(), len(pieces))

    def some(first: int) -> None:
        for start, end in pieces[first::threads]:
            part(start, end)

    others = [_pool().submit(some, first) for first in range(1, threads)]
    try:
        some(0)
    finally:
        for other in others:
            other.result()


_pools: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork


def _pool() -> ThreadPoolExecutor:
    if not _pools:
        _pools.append(ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="testtime-lean"))
    return _pools[0]


def holders(grad: Tensor) -> tuple[int, ...]:
    """How many names, handles and tensors hold a gradient or its memory; empty if torch hides it."""
    if not hasattr(grad, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return ()
    storage = grad.untyped_storage()
    inside: Any = torch._C
    return sys.getrefcount(grad), grad._use_count(), inside._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]


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
def _held_by_nobody() -> tuple[int, ...] | None:
    """What `holders` says of a gradient that a backward alone holds; None if it cannot be told."""
    alone: list[tuple[int, ...]] = []
    shared: list[tuple[int, ...]] = []
    with torch.enable_grad():
        x = torch.ones(2, requires_grad=True)
        torch.autograd.grad((_Asked.apply(x, alone) * 3).sum(), x)
        both = _Asked.apply(x, shared) + _Asked.apply(x, shared)
        torch.autograd.grad((both * 3).sum(), x)
        torch.autograd.grad(_Asked.apply(x, shared).sum(), x)  # one number, expanded
    told = alone[0] and alone[0] not in (shared[0], shared[2])
    return alone[0] if told else None


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


CHUNK = 1 << 16
"""Values that are packed or unpacked at once: what is made in between stays in the cache."""
LEAST = 1 << 17
"""Values of a tensor below which keeping less costs more time than the memory is worth."""


@contextmanager
def kept_as(
    dtype: torch.dtype, own: Iterable[Tensor] = (), *, least: int = LEAST
) -> Iterator[None]:
    """While it lasts, what is kept for a backward is kept in a shorter type.

    Args:
        dtype: the type.
        own: tensors that are kept as they are, since they exist anyway: the model's.
        least: values of a tensor for which it is done.

    Example:
        >>> x = torch.full((1,), 1.001, requires_grad=True)
        >>> with kept_as(torch.bfloat16, least=1):
        ...     y = (x * 2).square()
        >>> torch.autograd.grad(y, x)  # of 2.002 two decimals were kept
        (tensor([8.]),)
    """
    known = {tensor.data_ptr() for tensor in own}
    width = torch.empty((), dtype=dtype).element_size()

    def shorten(x: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
        short = not x.is_floating_point() or x.element_size() <= width
        if short or x.numel() < least or x.data_ptr() in known:
            return x
        return x.detach().to(dtype), x.dtype

    def lengthen(kept: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].to(kept[1])

    with torch.autograd.graph.saved_tensors_hooks(shorten, lengthen):
        yield


class Lean(TorchFunctionMode):
    """While it lasts, frozen convolutions, ReLUs and maximum poolings keep less.

    Args:
        least: values of an input for which it is done.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).requires_grad_(False)
        >>> x = torch.ones(1, 1, 4, 4, requires_grad=True)
        >>> with Lean(least=1):
        ...     name = type(model(x).grad_fn).__name__
        >>> name
        '_BitReLUBackward'
    """

    def __init__(self, least: int = LEAST) -> None:
        super().__init__()
        self.least = least
        _held_by_nobody()  # found out before the mode is on

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kept = _KEPT.get(func)
        if (
            kept is None
            or not args
            or not torch.is_grad_enabled()
            or not args[0].requires_grad
            or args[0].numel() < self.least
            or torch._C._are_functorch_transforms_active()
        ):
            return func(*args, **kwargs or {})
        return kept(func, *args, **kwargs or {})


def _conv(
    func: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    sides = weight.dim() - 2
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or isinstance(padding, str) or x.dim() != weight.dim():
        return func(x, weight, bias, stride, padding, dilation, groups)
    stride, padding, dilation = (_each(side, sides) for side in (stride, padding, dilation))
    how = (stride, padding, dilation, False, [0] * sides, groups)
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        lower = torch.get_autocast_dtype(kind)
        x, weight = x.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
    return _FrozenConv.apply(x, weight, bias, *how)  # type: ignore[no-any-return]


def _relu(func: Callable[..., Tensor], x: Tensor, inplace: bool = False) -> Tensor:
    inplace = inplace or func in (torch.relu_, Tensor.relu_)
    if not _dense(x) or (inplace and x._is_view()):
        return func(x) if func is not F.relu else func(x, inplace)
    return _BitReLU.apply(x, inplace)  # type: ignore[no-any-return]


def _max_pool(
    func: Callable[..., Tensor], x: Tensor, kernel_size: Any, stride: Any = None,
    padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    if return_indices or x.dim() != 4:
        more = {"return_indices": return_indices} if return_indices else {}
        return func(x, kernel_size, stride, padding, dilation, ceil_mode, **more)
    kernel_size, padding, dilation = (_each(v, 2) for v in (kernel_size, padding, dilation))
    stride = _each(kernel_size if stride is None else stride, 2)
    return _ShapedMaxPool.apply(x, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore[no-any-return]


def _each(value: Any, sides: int) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value] * sides


def _dense(x: Tensor) -> bool:
    """Whether the values of x lie in memory without gaps and overlaps."""
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


_KEPT: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
}
"""Functions whose backward needs less than torch keeps."""
