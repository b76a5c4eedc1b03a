"""Keeps for the backward only what it needs, where no convolution learns.

torch keeps the input of every convolution, also of one that is frozen, whose backward needs only the
shape; the result of every ReLU, of which it needs a bit for each value; and the input of every
maximum pooling, of which it needs the shape. Of a convolution, its normalisation and its ReLU, the
normalisation's input remains here, and a bit for each value. Other activations of what a normalisation
gave, and a product with them, keep nothing of it: it is made again (`remade`).

On a GPU small tensors are kept as they are, for it is the host that they would keep busy.

Answers and gradients are torch's to the last bit: the same kernels compute them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime.adaptation.kernels.batch_statistics import norm_of_batch
from testtime.adaptation.kernels.bits import bit_relu
from testtime.adaptation.kernels.calls import Call, Watching
from testtime.adaptation.kernels.holders import held_by_nobody
from testtime.adaptation.kernels.layout import Shape, dense
from testtime.adaptation.kernels.remade import Remade

LEAST = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Values of a tensor below which keeping less costs more time than the memory is worth."""


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
    """While it lasts, frozen convolutions, activations, maximum poolings and products keep less.

    Args:
        least: values of an input for which it is done; None: by its device.
        remakes: whether what a normalisation gave is noted, so that it can be made again.

    Attributes:
        asked: whether a call was seen that can use such a note: an activation, or a product.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).requires_grad_(False)
        >>> x = torch.ones(1, 1, 4, 4, requires_grad=True)
        >>> with Lean(least=1):
        ...     name = type(model(x).grad_fn).__name__
        >>> name
        '_BitReLUBackward'
    """

    def __init__(self, least: int | None = None, *, remakes: bool = True) -> None:
        # on a GPU it is these calls that take time, and most networks have nothing made again
        self.functions = _KEPT.keys() if remakes else _KEPT.keys() - {*NORMALISATIONS}
        self.least, self.asked = least, False
        self.remade = Remade()
        held_by_nobody()  # found out before anything is seen

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The call, with less kept where that is worth it."""
        x = args[0] if args else None
        if func in REMAKING:
            self.asked = True
            tensors = [each for each in args[:2] if isinstance(each, Tensor)]
            x = max(tensors, key=Tensor.numel, default=None) if func in PRODUCTS else x
        if (
            not isinstance(x, Tensor)
            or not torch.is_grad_enabled()
            or not (x.requires_grad or func in NORMALISATIONS)
            or x.numel() < self._least(x)
            or torch._C._are_functorch_transforms_active()
        ):
            return go_on(*args, **kwargs)
        return _KEPT[func](self.remade, func, go_on, *args, **kwargs)

    def _least(self, x: Tensor) -> int:
        return LEAST.get(x.device.type, LEAST["cpu"]) if self.least is None else self.least


def _conv(
    remade: Remade, func: Call, go_on: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, *more: Any, **named: Any,
) -> Tensor:  # fmt: skip
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or isinstance(padding, str) or x.dim() != weight.dim() or x.shape == weight.shape:
        return go_on(x, weight, bias, stride, padding, *more, **named)
    with _shape_of(x):
        return go_on(x, weight, bias, stride, padding, *more, **named)


def _relu(remade: Remade, func: Call, go_on: Call, x: Tensor, inplace: bool = False) -> Tensor:
    inplace = inplace or func in (torch.relu_, Tensor.relu_)
    if not dense(x) or (inplace and x._is_view()):
        return go_on(x) if func is not F.relu else go_on(x, inplace)
    way = remade.way(x)
    made = bit_relu(x, inplace)
    if way is not None:
        remade.note(made, lambda: torch.relu_(way()))
    return made


def _normalisation(
    remade: Remade, func: Call, go_on: Call, x: Tensor, *more: Any, **named: Any
) -> Tensor:
    made = go_on(x, *more, **named)
    remade.normalised(made, func, *more, **named)
    return made


def _activation(remade: Remade, func: Call, go_on: Call, *args: Any, **named: Any) -> Tensor:
    return remade.activated(func, go_on, *args, **named)


def _product(remade: Remade, func: Call, go_on: Call, *args: Any, **named: Any) -> Tensor:
    return remade.multiplied(go_on, *args, **named)


def _max_pool(
    remade: Remade, func: Call, go_on: Call, x: Tensor, *more: Any, **named: Any
) -> Tensor:
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


NORMALISATIONS = norm_of_batch, F.batch_norm, F.layer_norm, F.group_norm
ACTIVATIONS = F.silu, F.gelu, F.hardswish, F.mish, F.relu6, F.hardtanh, F.leaky_relu
"""Of which torch keeps the input; or, in its place, a result that masks a gradient alike."""
PRODUCTS = torch.mul, Tensor.mul
REMAKING = {*ACTIVATIONS, *PRODUCTS}
"""Whose backward has made again what they were given."""
_KEPT: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    **dict.fromkeys(NORMALISATIONS, _normalisation),
    **dict.fromkeys(ACTIVATIONS, _activation),
    **dict.fromkeys(PRODUCTS, _product),
}
"""Functions whose backward needs less than torch keeps."""
