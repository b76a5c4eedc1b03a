"""ReLU of which a bit is kept for each value, all that its backward needs.

A gradient that nobody else holds is masked where it lies: to make another tensor of its size costs
more than the mask. On a CPU bits are packed and read in pieces that stay in the cache, by torch's own
kernels: threads of one's own wait for a core on which torch's still spin. On a GPU one kernel does it
(`bit_kernels`).
"""

import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from testtime._core.devices import streams_of
from testtime.adaptation.kernels.holders import held_by_nobody, holders
from testtime.adaptation.kernels.layout import Shape, in_memory

PLANES = 24
"""Bits in a number: as many as a float32 counts exactly."""
CHUNK = PLANES * 11008
"""Values that are packed or unpacked at once: what is made in between stays in a CPU's cache."""
MANY = 16
"""Such pieces that other devices work on at once."""


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


bit_relu = _BitReLU.apply
"""The ReLU of x, of values without gaps in memory; written over it if `inplace`, the second argument."""


@cache
def kernels_of(device: torch.device) -> Any:
    """What makes and reads bits in one kernel, words of whole numbers; None where nothing does.

    Example:
        >>> kernels_of(torch.device("cpu"))
    """
    if device.type != "cuda":
        return None
    try:
        from testtime.adaptation.kernels import bit_kernels  # noqa: PLC0415

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
    flat = in_memory(y.detach())
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
    given, found = (in_memory(t).view(whole) for t in (grad, out))
    room = Room.of(grad.device)
    pieces = room.pieces(found, bits.int(), room.numbers)
    for values, (result, own, spread) in zip(given.split(room.size), pieces, strict=True):
        passed = room.spread(own, spread)[: len(values)]
        if whole != torch.int32:
            passed = (passed != 0).to(whole)
        threshold.grad_input(values, passed, 0, grad_input=result)
    return out


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
