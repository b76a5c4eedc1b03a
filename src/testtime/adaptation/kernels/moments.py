"""Moments of a batch and normalisation with given moments, at the cost of torch's own kernels.

torch's batch normalisation gives no gradient to the statistics that it is handed, and its mean and
variance of several dimensions are an order of magnitude slower on a CPU than the kernel inside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime.adaptation.kernels.batch_statistics import of_batch
from testtime.adaptation.kernels.calls import transformed
from testtime.adaptation.kernels.layout import laid_as
from testtime.adaptation.parts.statistics import Moments
from testtime.adaptation.ranks import Ranks

Blend = Callable[[Moments], Moments]
"""Takes a batch's moments, and gives those to normalise with."""


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
            laid_as(grads[0], x), x, one, mean, var, *unsaved(mean), False, ctx.eps, mask
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
            laid_as(grads[0], x), x, weight, mean, var, *unsaved(mean), False, ctx.eps, [True] * 3
        )
        inverse = torch.rsqrt(var + ctx.eps)
        to_used = -inverse * weight * to_bias, -0.5 * inverse.square() * weight * to_weight
        to_mean, to_var = torch.autograd.grad(ctx.used, ctx.batch, to_used, retain_graph=True)
        values = x.numel() // x.shape[1]
        slope = 2 / values * to_var
        shift = to_mean / values - slope * ctx.batch.mean.detach()
        to_x.addcmul_(wide(slope, x), x).add_(wide(shift, x))
        return to_x, to_weight, to_bias, None, None


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
    if transformed(x):
        mean, var = plain_moments(x)
    else:
        mean, var = _Moments.apply(x) if torch.is_grad_enabled() else of_batch(x)
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


def plain_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel by operations that torch can do anything with."""
    others = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, others, correction=0)
    return Moments(mean, var)


def wide(value: Tensor, x: Tensor) -> Tensor:
    """One value for each channel of x, so shaped that it meets x."""
    return value.view(1, -1, *[1] * (x.dim() - 2))
