"""Moments of a batch and normalisation with given moments, at the cost of torch's own kernels.

torch's batch normalisation gives no gradient to the statistics that it is handed, and its mean and
variance of several dimensions are an order of magnitude slower on a CPU than the kernel inside it. That
kernel adds one value after the other in double precision, on a CPU for as long as a tenth to a third of
a network's inference; `of_batch` adds rows in the type that they have, and only the rows in double.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime.adaptation.kernels.calls import Call, Watching
from testtime.adaptation.parts.statistics import Moments
from testtime.adaptation.ranks import Ranks

Blend = Callable[[Moments], Moments]
"""Takes a batch's moments, and gives those to normalise with."""
MANY = 1 << 17
"""Values of a tensor from which on `of_batch` adds row by row."""
SHORT = 16
"""Values of a row below which to add rows is slower than torch's kernel, as much as fifty times."""
LONG = 1024
"""Values that are added up in single precision, more of them in parts: the rounding of squares grows
with their number, and where a channel holds a few values only it goes one way."""
FAR = 4.0
"""Standard deviations that a mean may be from zero where a variance is taken from squares."""


def of_batch(x: Tensor, *, least: int = MANY) -> Moments:
    """Mean and biased variance of each channel (dimension 1).

    On a CPU sums and squares of large tensors of single precision are added up in the pieces that lie
    together, by torch's vectorised kernels, and those of pieces in double. A channel so far from zero
    that its squares would hide its variance is left to torch's own kernel. Relative to the
    variance, rounding stays below 1e-6 where values are spread, and below 3e-5 where a channel holds
    a few values only, `FAR` deviations from zero.

    Args:
        x: (B, C, ...).
        least: values from which on it is done.

    Example:
        >>> of_batch(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]).repeat(1, 1, 16), least=1)
        Moments(mean=tensor([2.5000]), var=tensor([1.2500]))
    """
    if not _in_rows(x, least):
        return _by_torch(x)
    values = x.numel() // x.shape[1]
    rows = x.view(*x.shape[:2], -1, _piece(values // len(x)))
    mean = rows.sum(3).sum((0, 2), dtype=torch.float64).div_(values)
    squared = mean.square()
    norms = torch.linalg.vector_norm(rows, dim=3).double()
    var = norms.square_().sum((0, 2)).div_(values).sub_(squared)
    told = squared <= FAR**2 * var
    found = Moments(mean.to(x.dtype), var.to(x.dtype))
    if not told.all():
        for moment, exact in zip(found, _by_torch(x[:, ~told]), strict=True):
            moment[~told] = exact
    return found


def _in_rows(x: Tensor, least: int) -> bool:
    """Whether `of_batch` adds row by row."""
    many = x.dim() > 2 and x.numel() >= least and x.numel() > x.shape[1]
    lie = many and x.is_cpu and x.dtype == torch.float32 and x.is_contiguous()
    # what is added up depends on the values, which no graph of an export can hold
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return lie and not traced and _piece(x.shape[2:].numel()) > 0


@cache
def _piece(length: int) -> int:
    """Values of the equal parts in which a row is added up; 0 where there are none such."""
    return next((d for d in range(min(length, LONG), SHORT - 1, -1) if length % d == 0), 0)


def _by_torch(x: Tensor) -> Moments:
    unused = x.new_zeros(2, x.shape[1])
    return Moments(*torch.batch_norm_update_stats(x, unused[0], unused[1], 1.0))


def unsaved(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Moments that a forward with given ones saves: none, which CUDA wants as empty tensors."""
    return mean.new_empty(0), mean.new_empty(0)


class _Moments(torch.autograd.Function):
    """Mean and biased variance of each channel (dimension 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = of_batch(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        values = x.numel() // x.shape[1]
        slope = 2 / values * grads[1]
        return torch.addcmul(wide(grads[0] / values - slope * mean, x), wide(slope, x), x)


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) for each channel; mean and var get their gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, mean, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, None, None, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var = ctx.saved_tensors
        one = torch.ones_like(mean)
        mask = [True, True, True]
        to_x, to_scale, to_shift = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(), x, one, mean, var, *unsaved(mean), False, ctx.eps, mask
        )
        inverse = torch.rsqrt(var + ctx.eps)
        return to_x, -inverse * to_shift, -0.5 * inverse.square() * to_scale, None


class _Blended(torch.autograd.Function):
    """Batch normalisation with moments that are made of the batch's own, scale and shift included.

    Of x it is kept once, and each of the passes over it serves normalisation, scale and shift.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, blend: Blend, eps: float
    ) -> Tensor:
        batch = of_batch(x)
        with torch.enable_grad():
            ctx.batch = Moments(batch.mean.requires_grad_(), batch.var.requires_grad_())
            ctx.used = blend(ctx.batch)
        mean, var = (moment.detach() for moment in ctx.used)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mean, var = (moment.detach() for moment in ctx.used)
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(), x, weight, mean, var, *unsaved(mean), False, ctx.eps, [True] * 3
        )
        inverse = torch.rsqrt(var + ctx.eps)
        to_used = -inverse * weight * to_bias, -0.5 * inverse.square() * weight * to_weight
        to_mean, to_var = torch.autograd.grad(ctx.used, ctx.batch, to_used, retain_graph=True)
        values = x.numel() // x.shape[1]
        slope = 2 / values * to_var
        shift = to_mean / values - slope * ctx.batch.mean.detach()
        to_x.addcmul_(wide(slope, x), x).add_(wide(shift, x))
        return to_x, to_weight, to_bias, None, None


class _OfBatch(torch.autograd.Function):
    """Batch normalisation with the moments of `of_batch`; backwards it is torch's own kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, least: int
    ) -> Tensor:
        mean, var = of_batch(x, least=least)
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


def of_batch_again(node: Any, bias: Tensor | None) -> Tensor:
    """What a batch normalisation by `of_batch` gave, from what its node in the graph keeps."""
    x, weight, mean, var = node.saved_tensors
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, node.eps)


def moments(x: Tensor, ranks: Ranks) -> tuple[Moments, float]:
    """Mean and biased variance of each channel (dimension 1), and its count, over all ranks.

    Args:
        x: (B, C, ...).
        ranks: over whom they are taken.

    Example:
        >>> (mean, var), values = moments(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), Ranks())
        >>> mean, var, values
        (tensor([2.5000]), tensor([1.2500]), 4.0)
    """
    x = at_least_single(x)
    values = float(x.numel() // x.shape[1])
    mean, var = plain_moments(x) if transformed(x) else _Moments.apply(x)
    if ranks.alone:
        return Moments(mean, var), values
    # all at once, since each time that ranks agree they wait for one another
    told = ranks.stack(torch.cat([mean, var, mean.new_tensor([values])]))
    means, variances, counts = told.split([len(mean), len(var), 1], dim=1)
    total = float(counts.detach().sum())
    joined = (counts / total * means).sum(0)
    spread = variances + (means - joined).square()
    return Moments(joined, (counts / total * spread).sum(0)), total


def normalise(x: Tensor, used: Moments, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) for each channel, in the type of x.

    Example:
        >>> normalise(torch.tensor([[3.0], [7.0]]), Moments(torch.ones(1), torch.tensor([4.0])), 0.0)
        tensor([[1.],
                [3.]])
    """
    dtype = x.dtype
    x = x.to(used.mean.dtype)
    if transformed(x, *used):
        return ((x - wide(used.mean, x)) * wide((used.var + eps).rsqrt(), x)).to(dtype)
    return _Normalise.apply(x, used.mean, used.var, eps).to(dtype)


def normalise_blended(x: Tensor, weight: Tensor, bias: Tensor, blend: Blend, eps: float) -> Tensor:
    """weight (x - mean) / sqrt(var + eps) + bias for each channel, of moments made of the batch's.

    The gradient flows through the batch's share of the moments.

    Args:
        x: (B, C, ...), of the type of weight and bias.
        weight: scale of each channel.
        bias: shift of each channel.
        blend: takes the batch's moments, and gives those to normalise with.
        eps: added to the variance.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> normalise_blended(x, torch.ones(1), torch.ones(1), lambda batch: batch, 0.0)
        tensor([[0.],
                [2.]])
    """
    if transformed(x, weight, bias):
        y = normalise(x, blend(plain_moments(x)), eps)
        return y * wide(weight, x) + wide(bias, x)
    return _Blended.apply(x, weight, bias, blend, eps)


class Quick(Watching):
    """While it lasts, batch normalisation takes its statistics by `of_batch`.

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
        quick = training and running_mean is None and _in_rows(input, self.least)
        if not quick or transformed(input, weight, bias):
            more = running_mean, running_var, weight, bias, training, momentum, eps
            return go_on(input, *more)
        return _OfBatch.apply(input, weight, bias, eps, self.least)


def transformed(*given: Tensor | None) -> bool:
    """Whether torch differentiates forwards or transforms a function, as none of these kernels can be."""
    if torch.compiler.is_compiling():
        return False
    dual = any(unpack_dual(each).tangent is not None for each in given if each is not None)
    return dual or torch._C._are_functorch_transforms_active()


def plain_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel by operations that torch can do anything with."""
    others = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, others, correction=0)
    return Moments(mean, var)


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

    functions = (F.batch_norm,)

    def __init__(self, count: int) -> None:
        self.count = count

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The call for each part."""
        x, *more = args
        return torch.cat([go_on(part, *more, **kwargs) for part in x.chunk(self.count)])


def wide(value: Tensor, x: Tensor) -> Tensor:
    """One value for each channel of x, so shaped that it meets x."""
    return value.view(1, -1, *[1] * (x.dim() - 2))
