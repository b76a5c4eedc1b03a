"""Keeps for the backward only what it needs, where no convolution learns.

torch keeps the input of every convolution, also of one that is frozen, whose backward needs only the
shape; the result of every ReLU, of which it needs a bit for each value; and the input of every
maximum pooling, of which it needs the shape. Of a convolution, its normalisation and its ReLU, the
normalisation's input remains here, and a bit for each value.

A gradient that nobody else holds is masked where it lies: to make another tensor of its size costs
more than the mask. On a CPU bits are packed and read in pieces that stay in the cache, by torch's own
kernels: threads of one's own wait for a core on which torch's still spin. On a GPU one kernel does it
(`bit_kernels`), and small tensors are kept as they are, for it is the host that they would keep busy.

Answers and gradients are torch's to the last bit: the same kernels compute them.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.devices import streams_of
from testtime.adaptation.calls import Call, Watching

PLANES = 24
"""Bits in a number: as many as a float32 counts exactly."""
CHUNK = PLANES * 11008
"""Values that are packed or unpacked at once: what is made in between stays in a CPU's cache."""
MANY = 16
"""Such pieces that other devices work on at once."""
LEAST = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Values of a tensor below which keeping less costs more time than the memory is worth."""


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


class _BitReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        kernels = kernels_of(x.device)
        if kernels is not None:
            y, ctx.bits = kernels.relu(x, inplace=inplace)
        else:
            y = torch.relu_(x) if inplace else torch.relu(x)
            ctx.bits = pack(y)
        ctx.shape = Shape.of(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        # a product of this backward alone may be written to, unless it is differentiated again
        into = holders(grad) == held_by_nobody() and not torch.is_grad_enabled()
        return masked(grad, ctx.bits, ctx.shape, into=into), None


@cache
def kernels_of(device: torch.device) -> Any:
    """What makes and reads bits in one kernel, words of whole numbers; None where nothing does.

    Example:
        >>> kernels_of(torch.device("cpu"))
    """
    if device.type != "cuda":
        return None
    try:
        from testtime.adaptation import bit_kernels  # noqa: PLC0415

        _, words = bit_kernels.relu(torch.ones(3, device=device), inplace=False)
        return bit_kernels if words.tolist() == [7] else None
    except Exception:  # no Triton, no compiler, a GPU that it does not know
        return None


def pack(y: Tensor) -> Tensor:
    """Which values are not zero, `PLANES` of them in one number.

    Of the values of a piece, in the order in which they lie in memory, every number has one from
    each of `PLANES` equal runs.

    Args:
        y: of any shape, without gaps in memory.

    Example:
        >>> pack(torch.tensor([0.0, 3.0, 0.0, 1.0]))
        tensor([10.])
    """
    flat = _in_memory(y.detach())
    words = flat.new_empty(-(-len(flat) // PLANES), dtype=torch.float32)
    room = Room.of(y.device)
    for values, own, ones in room.pieces(flat, words, room.ones):
        count = len(values)
        if flat.dtype == torch.float32:
            torch.ne(values, 0, out=ones if count == len(ones) else ones[:count])
        else:
            ones[:count] = values != 0
        if count < len(ones):
            ones[count:] = 0
        # sums of powers of two are exact
        torch.mv(ones.view(PLANES, -1).t(), room.powers, out=own)
    return words


def unpack(bits: Tensor, shape: Shape) -> Tensor:
    """Which values were not zero, laid out as they were.

    Example:
        >>> unpack(torch.tensor([2.0]), Shape.of(torch.zeros(2, 2))).tolist()
        [[False, True], [False, False]]
    """
    flat = torch.empty(shape.sizes.numel(), dtype=torch.bool, device=shape.device)
    if not bits.is_floating_point():
        ones = torch.ones_like(flat, dtype=torch.int8)
        found = kernels_of(shape.device).masked(ones, bits, ones)
        return found.bool().as_strided(shape.sizes, shape.strides)
    room = Room.of(shape.device)
    for values, own, spread in room.pieces(flat, bits.int(), room.numbers):
        values[:] = room.spread(own, spread)[: len(values)] != 0
    return flat.as_strided(shape.sizes, shape.strides)


def masked(grad: Tensor, bits: Tensor, shape: Shape, *, into: bool = False) -> Tensor:
    """The gradient where the bits are set, 0 elsewhere.

    Args:
        grad: of the shape that the bits were packed from.
        bits: from `pack`, or from the kernels of a GPU.
        shape: how the packed tensor lay in memory.
        into: whether the gradient may be written to.

    Example:
        >>> masked(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0]), Shape.of(torch.zeros(3)))
        tensor([0., 2., 0.])
    """
    threshold = torch.ops.aten.threshold_backward
    again = torch.is_grad_enabled() and grad.requires_grad  # it is differentiated once more
    if again or grad.shape != shape.sizes or grad.stride() != shape.strides:
        return threshold(grad, unpack(bits, shape).to(grad.dtype), 0)
    out = grad if into else shape.empty()
    if not bits.is_floating_point():
        return kernels_of(grad.device).masked(grad, bits, out)
    # as whole numbers, of which none is the one that torch lets pass or flushes to zero
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[grad.element_size()]
    given, found = (_in_memory(t).view(whole) for t in (grad, out))
    room = Room.of(grad.device)
    pieces = room.pieces(found, bits.int(), room.numbers)
    for values, (result, own, spread) in zip(given.split(room.size), pieces, strict=True):
        passed = room.spread(own, spread)[: len(values)]
        if whole != torch.int32:
            passed = (passed != 0).to(whole)
        threshold.grad_input(values, passed, 0, grad_input=result)
    return out


def _in_memory(x: Tensor) -> Tensor:
    return x.as_strided((x.numel(),), (1,))


class Room:
    """Memory for what is made in between, kept, since to take it anew each time costs more.

    Args:
        device: that it lies on.
        size: values that are worked on together.
    """

    _held = threading.local()

    def __init__(self, device: torch.device, size: int) -> None:
        self.size = size
        self.ones = torch.empty(size, dtype=torch.float32, device=device)
        self.numbers = self.ones.view(torch.int32)
        self.places = (1 << torch.arange(PLANES, dtype=torch.int32, device=device))[:, None]
        self.powers = self.places[:, 0].float()

    @classmethod
    def of(cls, device: torch.device) -> "Room":
        """This thread's, and on other devices than a CPU this stream's."""
        held: dict[str, Room] = cls._held.__dict__
        streams, size = streams_of(device), CHUNK if device.type == "cpu" else MANY * CHUNK
        # what one stream has yet to read another must not write to
        name = f"{device} {streams and streams.current_stream(device).stream_id}"
        if name not in held or held[name].size != size:
            held[name] = cls(device, size)
        return held[name]

    def pieces(
        self, flat: Tensor, words: Tensor, room: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Values that are worked on together, the numbers with their bits, and room for each."""
        pairs = zip(flat.split(self.size), words.split(self.size // PLANES), strict=True)
        for values, own in pairs:
            yield values, own, room if len(values) == self.size else room[: len(own) * PLANES]

    def spread(self, words: Tensor, room: Tensor) -> Tensor:
        """One number for each bit, zero where it is not set, written to `room`."""
        torch.bitwise_and(words, self.places, out=room.view(PLANES, -1))
        return room


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


@contextmanager
def kept_as(
    dtype: torch.dtype, own: Iterable[Tensor] = (), *, least: int = LEAST["cpu"]
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
    width = torch.empty((), dtype=dtype, device="cpu").element_size()

    def shorten(x: Tensor) -> Tensor | tuple[Tensor, torch.dtype]:
        short = not x.is_floating_point() or x.element_size() <= width
        if short or x.numel() < least or x.data_ptr() in known:
            return x
        return x.detach().to(dtype), x.dtype

    def lengthen(kept: Tensor | tuple[Tensor, torch.dtype]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].to(kept[1])

    with torch.autograd.graph.saved_tensors_hooks(shorten, lengthen):
        yield


class Lean(Watching):
    """While it lasts, frozen convolutions, ReLUs and maximum poolings keep less.

    Args:
        least: values of an input for which it is done; None: by its device.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).requires_grad_(False)
        >>> x = torch.ones(1, 1, 4, 4, requires_grad=True)
        >>> with Lean(least=1):
        ...     name = type(model(x).grad_fn).__name__
        >>> name
        '_BitReLUBackward'
    """

    def __init__(self, least: int | None = None) -> None:
        self.functions, self.least = _KEPT.keys(), least
        held_by_nobody()  # found out before anything is seen

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The call, with less kept where that is worth it."""
        if (
            not args
            or not torch.is_grad_enabled()
            or not args[0].requires_grad
            or args[0].numel() < self._least(args[0])
            or torch._C._are_functorch_transforms_active()
        ):
            return go_on(*args, **kwargs)
        return _KEPT[func](func, go_on, *args, **kwargs)

    def _least(self, x: Tensor) -> int:
        return LEAST.get(x.device.type, LEAST["cpu"]) if self.least is None else self.least


def _conv(
    func: Call, go_on: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, *more: Any, **named: Any,
) -> Tensor:  # fmt: skip
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or isinstance(padding, str) or x.dim() != weight.dim() or x.shape == weight.shape:
        return go_on(x, weight, bias, stride, padding, *more, **named)
    with _shape_of(x):
        return go_on(x, weight, bias, stride, padding, *more, **named)


def _relu(func: Call, go_on: Call, x: Tensor, inplace: bool = False) -> Tensor:
    inplace = inplace or func in (torch.relu_, Tensor.relu_)
    if not _dense(x) or (inplace and x._is_view()):
        return go_on(x) if func is not F.relu else go_on(x, inplace)
    return _BitReLU.apply(x, inplace)


def _max_pool(func: Call, go_on: Call, x: Tensor, *more: Any, **named: Any) -> Tensor:
    with _shape_of(x):
        return go_on(x, *more, **named)


def _shape_of(x: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """While it lasts, the shape of x is kept in place of x, and whole numbers in half their size."""
    sizes = x.shape  # the graph holds the function below, which must not hold x

    def shorten(kept: Tensor) -> Tensor | Shape:
        if kept.dtype == torch.int64:
            return kept.to(torch.int32)
        return Shape.of(kept) if kept.shape == sizes else kept

    return torch.autograd.graph.saved_tensors_hooks(shorten, _lengthen)


def _lengthen(kept: Tensor | Shape) -> Tensor:
    if isinstance(kept, Shape):
        return kept.empty()
    return kept.long() if kept.dtype == torch.int32 else kept


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
