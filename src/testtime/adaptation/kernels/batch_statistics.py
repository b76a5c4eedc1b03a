"""Batch normalisation with the statistics of the batch, in one reading of its input.

torch's own kernel adds one value after the other in double precision, on a CPU for as long as a tenth to
a third of a network's inference; `of_batch` adds values that lie together in the type that they have, and
only the sums of pieces in double.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from testtime.adaptation.kernels.calls import Call, Watching, of_others, transformed
from testtime.adaptation.parts.statistics import Moments

MANY = 1 << 17
"""Values of a tensor from which on `of_batch` adds row by row."""
SHORT = 16
"""Values of a row below which to add rows is slower than torch's kernel, as much as fifty times."""
LONG = 256
"""Values that are added up in single precision, more of them in parts: the rounding grows with their
number, and where a channel holds a few values only it goes one way."""
TOGETHER = 16
"""Samples whose parts are added up in single precision before all are in double."""
CACHED = 1 << 19
"""Values whose squares stay in the cache until they are added up."""
UNCHANGED = [
    (
        torch.zeros(size, 1, dtype=torch.float32, device="cpu"),
        torch.ones(size, 1, dtype=torch.float32, device="cpu"),
    )
    for size in range(TOGETHER + 1)
]
"""Means and inverse deviations of so many samples that normalise nothing."""
ONES = torch.ones(1 << 16, dtype=torch.float32, device="cpu")
"""Scales that change nothing. torch wants them until 2.10, though it does not read them here."""
FAR = 4.0
"""Standard deviations that a mean may be from zero where a variance is taken from squares."""


def of_batch(x: Tensor, *, least: int = MANY) -> Moments:
    """Mean and biased variance of each channel (dimension 1).

    On a CPU sums and squares of large tensors of single precision are added up in the pieces that lie
    together, by torch's vectorised kernels, and those of pieces in double. A channel so far from zero
    that its squares would hide its variance is centred first. Relative to the variance, rounding
    stays below 1e-6 where values are spread about zero, below 1e-5 where they are spread `FAR`
    deviations from it, and below 3e-5 where a channel holds a few values only, that far.

    Args:
        x: (B, C, ...).
        least: values from which on it is done.

    Example:
        >>> of_batch(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]).repeat(1, 1, 16), least=1)
        Moments(mean=tensor([2.5000]), var=tensor([1.2500]))
    """
    rows = _rows_of(x, least)
    return _by_torch(x) if rows is None else _by_rows(x, rows)


def row_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values and of their squares over the last dimension; in one reading as in `of_batch`.

    Of rows that lie crosswise in memory, as channels do in channels_last, it makes the squares in
    pieces that stay in a CPU's cache; torch's norms would step from one value to the next.

    Args:
        x: (B, rows, n).

    Example:
        >>> row_sums(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        (tensor([[3., 7.]]), tensor([[ 5., 25.]]))
    """
    piece = _part(x.shape[2], LONG, SHORT) if _is_single(x) else 0
    if not piece and x.is_cpu and x.numel() and x.mT.is_contiguous():
        parts = x.split(max(CACHED // x[0].numel(), 1))
        room = torch.empty_like(parts[0])  # the same for all: new memory costs as much as the sums
        squares = [torch.square(part, out=room[: len(part)]).sum(2) for part in parts]
        return x.sum(2), torch.cat(squares)
    if not piece:
        return x.sum(2), torch.linalg.vector_norm(x, dim=2).square()
    sums = torch.stack(both_sums(x.view(1, -1, piece)))
    if piece < x.shape[2]:
        sums = sums.view(-1, x.shape[2] // piece).sum(1)
    values, squares = sums.view(2, *x.shape[:2])
    return values, squares


def both_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values and of their squares over the first and the last dimension, in one reading.

    torch has no reduction that gives both, but the backward of group normalisation adds up what came
    from above, and that times the input: here both are the values.

    Args:
        x: (B, rows, n) of single precision, on a CPU, without gaps in memory; B at most `TOGETHER`.

    Example:
        >>> both_sums(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        (tensor([3., 7.]), tensor([ 5., 25.]))
    """
    rows = x.shape[1]
    scale = ONES[:rows] if rows <= len(ONES) else torch.ones_like(x[0, :, 0])
    _, squares, sums = torch.ops.aten.native_group_norm_backward.default(
        x, x, *UNCHANGED[len(x)], scale, *x.shape, 1, [False, True, True]
    )
    return sums, squares


class Rows(NamedTuple):
    """How the values of a tensor are added up.

    Attributes:
        together: samples whose values are added up in single precision.
        piece: values of a channel that are, of each of them.
        pieces: sums that this leaves, (B / together, C, n / piece).
        values: of a channel, in all.
    """

    together: int
    piece: int
    pieces: tuple[int, int, int]
    values: int


def _rows_of(x: Tensor, least: int) -> Rows | None:
    """How `of_batch` adds a tensor up by itself; None where that is left to torch."""
    return _rows(x.shape, least) if _is_single(x) else None


@lru_cache(1 << 12)
def _rows(shape: torch.Size, least: int) -> Rows | None:
    if len(shape) < 3 or shape.numel() < max(least, shape[1] + 1):
        return None
    (samples, channels), length = shape[:2], shape[2:].numel()
    together, piece = _part(samples, TOGETHER), _part(length, LONG, SHORT)
    if not piece:
        return None
    return Rows(together, piece, (samples // together, channels, length // piece), samples * length)


def _by_rows(x: Tensor, rows: Rows, *, centred: bool = False) -> Moments:
    """Moments by rows, of channels that may have been centred before."""
    sums, squares = both_sums(x.view(rows.together, -1, rows.piece))
    # by numpy: in a large network a call of torch finds its code gone from the cache, 10 to 30 us each
    with np.errstate(all="ignore"):  # what is not finite is told by the answers
        mean = sums.numpy().reshape(rows.pieces).sum((0, 2), dtype=np.float64) / rows.values
        power = squares.numpy().reshape(rows.pieces).sum((0, 2), dtype=np.float64) / rows.values
        var = power - mean * mean
        told = power - (1 + FAR**2) * var <= 0  # nor where squares were too large: inf - inf
        found = Moments(*(torch.from_numpy(each.astype(np.float32)) for each in (mean, var)))
    if told.all():
        return found
    far = torch.from_numpy(np.flatnonzero(~told))
    near = x.index_select(1, far)
    if centred:  # these hold one value, or nearly
        near = _by_torch(near)
    else:
        centre = found.mean[far]
        off = near.sub_(centre.view(-1, *[1] * (x.dim() - 2)))
        parts, _, pieces = rows.pieces
        near = _by_rows(off, rows._replace(pieces=(parts, len(centre), pieces)), centred=True)
        near = Moments(near.mean + centre, near.var)
    for moment, exact in zip(found, near, strict=True):
        moment[far] = exact
    return found


def _is_single(x: Tensor) -> bool:
    """Whether x is what the kernel of `both_sums` takes, in no graph of an export.

    What is added up depends on the values, which such a graph cannot hold.
    """
    lies = x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
    return lies and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


@cache
def _part(length: int, most: int, least: int = 1) -> int:
    """The largest of the equal parts of a length that is not above `most`; 0 where there is none."""
    return next((d for d in range(min(length, most), least - 1, -1) if length % d == 0), 0)


def _by_torch(x: Tensor) -> Moments:
    unused = x.new_zeros(2, x.shape[1])
    return Moments(*torch.batch_norm_update_stats(x, unused[0], unused[1], 1.0))


class _OfBatch(torch.autograd.Function):
    """Batch normalisation with the moments of `of_batch`; backwards it is torch's own kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rows: Rows
    ) -> Tensor:
        mean, var = _by_rows(x, rows)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        inverse = torch.rsqrt(var + ctx.eps)
        found = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(), x, weight, None, None, mean, inverse, True, ctx.eps,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        return *found, None, None


def norm_of_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, least: int = MANY
) -> Tensor:
    """Batch normalisation with the statistics of the batch, by `of_batch` where that is worth it.

    Args:
        x: (B, C, ...).
        weight: scale of each channel.
        bias: shift of each channel.
        eps: added to the variance.
        least: values of x from which on it is done.

    Example:
        >>> norm_of_batch(torch.tensor([[1.0], [3.0]]), None, None, 1e-12).flatten().tolist()
        [-1.0, 1.0]
    """
    others = of_others(x)
    if has_torch_function((x,)) and not others:
        return handle_torch_function(norm_of_batch, (x,), x, weight, bias, eps, least)
    rows = None if others else _rows_of(x, least)
    if rows is None or transformed(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    if torch.is_grad_enabled():
        return _OfBatch.apply(x, weight, bias, eps, rows)
    mean, var = _by_rows(x, rows)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def forward_of_batch(module: Any, input: Tensor) -> Tensor:  # noqa: A002  (as torch calls it)
    """The forward of torch's batch normalisation where it has no statistics of its own.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1, eps=1e-12, track_running_stats=False)
        >>> forward_of_batch(layer, torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-1.0, 1.0]
    """
    module._check_input_dim(input)
    return norm_of_batch(input, module.weight, module.bias, module.eps)


def of_batch_again(node: Any, bias: Tensor | None) -> Tensor:
    """What a batch normalisation by `of_batch` gave, from what its node in the graph keeps."""
    x, weight, mean, var = node.saved_tensors
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, node.eps)


class Quick(Watching):
    """While it lasts, whoever calls torch's batch normalisation gets `norm_of_batch`.

    Args:
        least: values of an input from which on it is done.

    Example:
        >>> x = torch.tensor([1.0, 3.0], requires_grad=True).expand(16, 2).reshape(1, 1, 32)
        >>> with Quick(least=1):
        ...     y = F.batch_norm(x, None, None, training=True, eps=1e-12)
        >>> y[0, 0, :2].tolist(), type(y.grad_fn).__name__
        ([-1.0, 1.0], '_OfBatchBackward')
    """

    functions = (F.batch_norm,)

    def __init__(self, least: int = MANY) -> None:
        self.least = least

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The call, with the statistics of `of_batch` where it would take a batch's."""
        return self._normalise(go_on, *args, **kwargs)

    def _normalise(
        self, go_on: Call, input: Tensor, running_mean: Tensor | None,  # noqa: A002  (torch's names)
        running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
        training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if training and running_mean is None and _rows_of(input, self.least) is not None:
            return norm_of_batch(input, weight, bias, eps, self.least)
        return go_on(input, running_mean, running_var, weight, bias, training, momentum, eps)


class InGroups(Watching):
    """While it lasts, batch normalisation takes the statistics of each part of a batch by itself.

    Args:
        count: parts of equal size that the batch was joined from.

    Example:
        >>> x = torch.tensor([[1.0], [3.0], [10.0], [30.0]])
        >>> with InGroups(2):
        ...     F.batch_norm(x, None, None, training=True, eps=1e-12).flatten()
        tensor([-1.,  1., -1.,  1.])
    """

    functions = F.batch_norm, norm_of_batch

    def __init__(self, count: int) -> None:
        self.count = count

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The call for each part."""
        x, *more = args
        return torch.cat([go_on(part, *more, **kwargs) for part in x.chunk(self.count)])
