"""Normalisation with moments made of the batch's own, as one writes it down, to the last bit.

    mean, var = blend(mean and biased variance of the batch)
    y = (x - mean) / sqrt(var + eps) * weight + bias

torch's kernel rounds otherwise, and Adam makes whole steps of the difference wherever a gradient is
zero but for rounding. So these are the formula's own operations, and those of autograd on the way
back, in their order; but done on parts that a CPU's cache holds, and of all in between x alone is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from testtime.adaptation.kernels.calls import transformed
from testtime.adaptation.kernels.holders import held_by_nobody, holders
from testtime.adaptation.kernels.moments import Blend, normalise_blended, wide
from testtime.adaptation.parts.statistics import Moments

CACHED = 1 << 18
"""Values that are worked on at once by each thread, of all tensors together: its core holds them."""
MANY = 1 << 26
"""The same on other devices, where each call costs: a bound on memory alone."""


class _AsWritten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, blend: Blend, eps: float
    ) -> Tensor:
        with torch._C.DisableTorchFunction():  # modes look at each call
            batch = exact_moments(x)
            with torch.enable_grad():
                ctx.batch = Moments(batch.mean.requires_grad_(), batch.var.requires_grad_())
                used = blend(ctx.batch)
                ctx.used = used.mean, (used.var + eps).sqrt()
            ctx.save_for_backward(x, weight)
            mean, root = (value.detach() for value in ctx.used)
            return _normalised(x, mean, root, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        ours = holders(grad) == held_by_nobody()
        return _backward(ctx, grad, ours)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, ours: bool) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias; that of x lies in the given one's place if that is ours."""
    x, weight = ctx.saved_tensors
    others, count = _others(x), x.numel() // x.shape[1]
    mean, root = (value.detach() for value in ctx.used)
    # torch adds up image by image where these lie in one piece, and so it may be done in parts
    apart = x.is_contiguous() and grad.is_contiguous() and x.shape[1] > 1 and count > len(x)
    below = ctx.needs_input_grad[0]
    made = grad
    if below and not (ours and apart):
        made = torch.empty_like(x if 0 in grad.stride() else grad)  # laid out as its products are
    # of each channel, by image: what the gradients of weight, root, mean and bias add up, and x
    sums = x.new_zeros(5, len(x) if apart else 1, x.shape[1])
    if apart:
        others = [1]
        pieces = _parts((x, grad, made), (mean, root, weight), sums.flatten(1).unbind(), rooms=2)
    else:
        whole = (wide(value, x) for value in (mean, root, weight))
        pieces = iter([(x, grad, made, *whole, *sums[:, 0])])
    unit = product = None
    for values, slope, into, m, r, w, for_weight, for_root, for_mean, for_bias, of_x in pieces:
        if apart:
            unit, product = (_room(room, values) for room in (unit, product))
        unit = torch.sub(values, m, out=unit).div_(r)
        torch.sum(slope, others, out=for_bias)
        product = torch.mul(slope, unit, out=product)
        torch.sum(product, others, out=for_weight)
        if below:
            torch.sum(values, others, out=of_x)
            torch.mul(slope, w, out=product)
            torch.sum(torch.div(product, r, out=into), others, out=for_mean)
            torch.sum(product.mul_(unit.div_(r)), others, out=for_root)
    total = torch.zeros_like(sums[:, 0])
    for image in sums.unbind(1):
        total += image
    to_weight, to_root, to_mean, to_bias, sum_of_x = total  # root and mean: but for their sign
    if not below:
        return None, to_weight, to_bias, None, None
    to_used = -to_mean, -to_root
    to_mean, to_var = torch.autograd.grad(ctx.used, ctx.batch, to_used, retain_graph=True)
    channels = (sum_of_x / count, 2 / count * to_var, to_mean / count)
    for values, into, centre, slope, shift in _parts((x, made), channels, rooms=1):
        unit = _room(unit, values)
        into.add_(torch.sub(values, centre, out=unit).mul_(slope).add_(shift))
    return made, to_weight, to_bias, None, None


def normalise_as_written(
    x: Tensor, weight: Tensor, bias: Tensor, blend: Blend, eps: float
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
    if transformed(x, weight, bias):
        return normalise_blended(x, weight, bias, blend, eps)
    return _AsWritten.apply(x, weight, bias, blend, eps)


def as_torch(module: nn.Module) -> bool:
    """Whether a layer runs torch's own batch normalisation, for which another may stand in."""
    own = type(module).forward is nn.modules.batchnorm._BatchNorm.forward
    return own and "forward" not in module.__dict__


def infer_as_written(module: Any, input: Tensor) -> Tensor:  # noqa: A002  (as torch calls it)
    """The forward of torch's batch normalisation with the statistics it stores, without a gradient.

    Only on a CPU, where x and what the layer holds are of one type; else torch's own.

    Example:
        >>> layer = torch.nn.BatchNorm1d(1, eps=0.0).eval()
        >>> with torch.no_grad():
        ...     infer_as_written(layer, torch.tensor([[1.0], [3.0]]))
        tensor([[1.],
                [3.]])
    """
    x = input
    mean, var, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
    plain = x.is_cpu and x.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled()
    if not plain or weight is None or bias is None or transformed(x, weight, bias):
        return type(module).forward(module, x)
    if not x.dtype == weight.dtype == var.dtype:
        return type(module).forward(module, x)
    module._check_input_dim(x)
    return _normalised(x, mean, (var + module.eps).sqrt(), weight, bias)


def _normalised(x: Tensor, mean: Tensor, root: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for values, into, m, r, w, b in _parts((x, out), (mean, root, weight, bias)):
        torch.sub(values, m, out=into).div_(r).mul_(w).add_(b)
    return out


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
        mean, square = _power_sums(x) / count
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


def _power_sums(x: Tensor) -> Tensor:
    """Sums over each channel of the values, and of their squares, in float64."""
    last = x.movedim(1, -1)
    by_row = not last.is_contiguous()
    flat = x.reshape(len(x) * x.shape[1], -1) if by_row else last.view(-1, x.shape[1])
    room, found = None, []
    for (values,) in _split([flat], 3):  # and twice its size
        room = _room(room, values, torch.float64).copy_(values)
        found.append((room.sum(int(by_row)), room.square_().sum(int(by_row))))
    return torch.stack(
        [torch.cat(each).view(-1, x.shape[1]).sum(0) for each in zip(*found, strict=True)]
    )


def _parts(
    tensors: tuple[Tensor, ...],
    channels: tuple[Tensor, ...],
    rows: tuple[Tensor, ...] = (),
    *,
    rooms: int = 0,
) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors that lie alike, each with its part of what belongs to channels and to rows.

    A row is a channel of an image, or a pixel of all channels where these lie next to each other.
    """
    x = tensors[0]
    last, share = [t.movedim(1, -1) for t in tensors], len(tensors) + rooms
    if all(t.is_contiguous() for t in last):
        for part in _split([t.view(-1, x.shape[1]) for t in last], share):
            yield (*part, *channels)
    elif all(t.is_contiguous() for t in tensors):
        count = len(x) * x.shape[1]
        own = [value.repeat(len(x))[:, None] for value in channels]
        yield from _split([*(t.view(count, -1) for t in tensors), *own, *rows], share)
    else:
        yield (*tensors, *(wide(value, x) for value in channels))


def _split(tensors: Sequence[Tensor], share: int) -> Iterator[tuple[Tensor, ...]]:
    """Parts of a few rows, but not of one alone, which torch's threads would add up in two."""
    first = tensors[0]
    size = CACHED * torch.get_num_threads() if first.device.type == "cpu" else MANY
    size //= share
    count = max(min(first.numel() // size, len(first) // 2), 1)
    return zip(*(t.tensor_split(count) for t in tensors), strict=True)


def _room(room: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory that is used again, laid out anew; more of it where it is too small."""
    if room is not None and room.shape == like.shape:
        return room
    if room is None or room.untyped_storage().nbytes() < like.numel() * room.element_size():
        return torch.empty_like(like, dtype=dtype)
    return room.as_strided(like.shape, like.stride())


def _others(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]
