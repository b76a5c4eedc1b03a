"""Normalisation with moments made of the batch's own, as one writes it down, to the last bit.

    mean, var = blend(mean and biased variance of the batch)
    y = (x - mean) / sqrt(var + eps) * weight + bias

torch's kernel rounds otherwise, and Adam makes whole steps of the difference wherever a gradient is
zero but for rounding. So these are the formula's own operations, and those of autograd on the way
back, in their order; but done on parts that a CPU's cache holds, and of all in between x alone is kept.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from testtime.adaptation.moments import wide
from testtime.adaptation.parts.statistics import Moments

CACHED = 1 << 17
"""Values that are worked on at once."""


class _AsWritten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        blend: Callable[[Moments], Moments],
        eps: float,
    ) -> Tensor:
        batch = exact_moments(x)
        with torch.enable_grad():
            ctx.batch = Moments(batch.mean.requires_grad_(), batch.var.requires_grad_())
            used = blend(ctx.batch)
            ctx.used = used.mean, (used.var + eps).sqrt()
        ctx.save_for_backward(x, weight)
        mean, root = (value.detach() for value in ctx.used)
        out = torch.empty_like(x)
        for values, into, m, r, w, b in _parts((x, out), (mean, root, weight, bias)):
            torch.sub(values, m, out=into).div_(r).mul_(w).add_(b)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, others, count = grads[0], _others(x), x.numel() // x.shape[1]
        mean, root = (value.detach() for value in ctx.used)
        made = torch.empty_like(x if 0 in grad.stride() else grad)  # laid out as its products are
        # torch adds up image by image where these lie in one piece, and so it may be done in parts
        apart = x.is_contiguous() and grad.is_contiguous() and x.shape[1] > 1 and count > len(x)
        ones = [1] * (x.dim() - 2)
        sums = x.new_zeros(5, len(x) if apart else 1, x.shape[1], *ones)
        over, size = (others[1:], CACHED) if apart else (others, x.numel())
        tensors, channels = (x, grad, made, *sums), (mean, root, weight)
        for values, slope, into, *told, m, r, w in _parts(tensors, channels, size):
            unit = (values - m).div_(r)
            product = slope * unit
            told[0].copy_(product.sum(over, keepdim=True))
            torch.mul(slope, w, out=product)
            torch.div(product, r, out=into)
            told[1].copy_(product.mul_(unit.div_(r)).sum(over, keepdim=True))
            for total, summed in zip(told[2:], (into, slope, values), strict=True):
                total.copy_(summed.sum(over, keepdim=True))
        total = torch.zeros_like(sums[:, 0])
        for image in sums.unbind(1):
            total += image
        to_weight, to_root, to_mean, to_bias, in_all = total.flatten(1)
        to_used = -to_mean, -to_root
        to_mean, to_var = torch.autograd.grad(ctx.used, ctx.batch, to_used, retain_graph=True)
        channels = (in_all / count, 2 / count * to_var, to_mean / count)
        for values, into, centre, slope, shift in _parts((x, made), channels):
            into.add_((values - centre).mul_(slope).add_(shift))
        return made, to_weight, to_bias, None, None


def normalise_as_written(
    x: Tensor, weight: Tensor, bias: Tensor, blend: Callable[[Moments], Moments], eps: float
) -> Tensor:
    """The formula above, for each channel; its gradient flows through the batch's moments too.

    Args:
        x: (B, C, ...), of the type of weight and bias.
        weight: scale of each channel.
        bias: shift of each channel.
        blend: takes the batch's moments, and gives those to normalise with.
        eps: added to the variance.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> normalise_as_written(x, torch.ones(1), torch.ones(1), lambda batch: batch, 0.0)
        tensor([[0.],
                [2.]])
    """
    return _AsWritten.apply(x, weight, bias, blend, eps)  # type: ignore[no-untyped-call, no-any-return]


def exact_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, to the last bit those of `torch.var_mean`.

    That adds up in float64. So do these sums, faster; of channels where they leave open to which side a
    moment is rounded, it is asked itself.

    Example:
        >>> exact_moments(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        Moments(mean=tensor([2.5000]), var=tensor([1.2500]))
    """
    others, count = _others(x), x.numel() // x.shape[1]
    if x.dtype == torch.float32:
        sums, squares = x.new_zeros(2, x.shape[1], dtype=torch.float64)
        for values, total, square in _parts((x,), (sums, squares)):
            double = values.double()
            total.add_(double.sum(others, keepdim=True))
            square.add_(double.square_().sum(others, keepdim=True))
        mean, square = sums / count, squares / count
        found = torch.stack([mean, square - mean.square()])
        doubt = 1e-13 * torch.stack([square.sqrt(), square])
        low, high = ((found + side * doubt).float() for side in (-1, 1))
        doubtful = (low != high).any(0)
        if doubtful.any():
            low[:, doubtful] = torch.stack(
                torch.var_mean(x[:, doubtful], others, correction=0)[::-1]
            )
        return Moments(*low)
    var, mean = torch.var_mean(x, others, correction=0)
    return Moments(mean, var)


def _parts(
    tensors: tuple[Tensor, ...], channels: tuple[Tensor, ...], size: int = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors of that many values, each with its part of what belongs to channels."""
    x, size = tensors[0], size or CACHED
    image = max(x[0].numel(), 1)
    samples = max(size // image, 1)
    along = max(range(1, x.dim()), key=lambda d: x.stride(d) if x.shape[d] > 1 else 0)
    share = max(size * x.shape[along] // image, 1)
    own = [wide(value, x) for value in channels]
    for i in range(0, len(x), samples):
        rows = [t[i : i + samples] for t in tensors]
        if share >= x.shape[along]:
            yield (*rows, *own)
            continue
        for j in range(0, x.shape[along], share):
            here = (*[slice(None)] * along, slice(j, j + share))
            yield (*(t[here] for t in rows), *(t[here] if along == 1 else t for t in own))


def _others(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]
