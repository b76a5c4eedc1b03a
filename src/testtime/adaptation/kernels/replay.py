"""A second forward, of all or some samples of a first one, that does not compute anew what that one knows.

What a convolution or linear layer that does not learn gave for a batch in one forward is what it gives
for it in the next; where samples do not mix, also for some of them. Who teaches goes through the
network a second time, now with a graph; takes these outputs from the first forward, and computes what
lies between.

Kept is what is dear: outputs that took many multiplications for each value.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testtime._core.devices import is_autocasting
from testtime.adaptation.kernels.calls import Call, Watching
from testtime.adaptation.kernels.layout import Shape
from testtime.adaptation.kernels.linear import is_ours, linear, to_input
from testtime.adaptation.lent import lending

DEAR = 256
"""Multiplications for a value of an output from which on it is kept: these took most of the time."""
WIDE = 4
"""Values of an output for each of what it was computed from, up to which it is kept for a few: what the
blocks of residual networks and transformers widen to, but not what mobile networks do."""
LEAST = 1 << 13
"""Values of a sample's input below which looking its output up costs as much as computing it."""


class Kept(NamedTuple):
    """What one call gave: by what it is read, of which input, and at which of its versions."""

    read: Callable[..., Any]
    weight: Tensor
    shape: torch.Size
    output: Tensor
    version: int

    def fits(self, func: Callable[..., Tensor], x: Tensor, weight: Tensor) -> bool:
        """Whether a later call asks for the same."""
        return _READ[func] is self.read and weight is self.weight and x.shape[1:] == self.shape[1:]

    @property
    def intact(self) -> bool:
        """Whether nobody has written to it."""
        return self.output._version == self.version


class _Known(torch.autograd.Function):
    """An output that is known, with the gradient of the call that would have computed it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output: Tensor, back: Callable[[Tensor, Shape], Tensor]
    ) -> Tensor:
        ctx.back, ctx.shape = back, Shape.of(x)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grads[0], ctx.shape), None, None


@contextmanager
def _instead(layers: Iterable[Any], stand_in: Call) -> Iterator[None]:
    """While it lasts, layers run `stand_in`, of the layer, of their own forward and of the input."""
    with lending() as lent:
        for layer in layers:
            lent.put(vars(layer), "forward", partial(stand_in, layer, layer.forward))
        yield


class Recorded(Watching):
    """While it lasts, outputs of dear calls on a whole batch are kept.

    Args:
        samples: of the batch.
        layers: who makes these calls, as `dear_layers` finds them, so that only they are watched; none:
            all calls of torch are, for which each pays.
        wide: values of an output for each of an input, up to which it is kept.

    Example:
        >>> layer = torch.nn.Linear(4, 3).requires_grad_(False)
        >>> x = torch.randn(8, 4)
        >>> with Recorded(8, dear=1, least=1) as recorded:
        ...     whole = layer(x)
        >>> chosen = torch.tensor([0, 1])
        >>> with Replayed(recorded, chosen) as replayed:
        ...     few = layer(x[chosen])
        >>> torch.equal(few, whole[:2]), replayed.taken
        (True, 1)
    """

    def __init__(
        self, samples: int, layers: Sequence[Any] = (), *,
        wide: float = WIDE, dear: int = DEAR, least: int = LEAST,
    ) -> None:  # fmt: skip
        self.functions, self.layers = _READ.keys(), layers
        self.samples, self.wide, self.dear, self.least = samples, wide, dear, least
        self.kept: list[Kept] = []

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """The call, whose output is kept."""
        result: Tensor = go_on(*args, **kwargs)
        call = _call(func, args, kwargs, self)
        if call is not None:
            self._keep(_READ[func], call.weight, call.x, result)
        return result

    def __enter__(self) -> Any:
        if not self.layers:
            return super().__enter__()
        # no hooks, since others of a layer may change what it gives
        self._lent = _instead(filter(self._keeps, self.layers), self._run)
        self._lent.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.layers:
            self._lent.__exit__(*error)
        else:
            super().__exit__(*error)

    def _keeps(self, layer: Any) -> bool:
        by_name = isinstance(getattr(layer, "padding", 0), str)
        return _is_dear(layer) and not by_name and self.is_dear(layer.weight)

    def is_dear(self, weight: Tensor) -> bool:
        """Whether calls with a weight take so many multiplications for each value that they are kept."""
        inputs, outputs = weight.numel() // len(weight), len(weight)
        if weight.is_complex():  # whose gradients take conjugates, and torch convolves in parts
            return False
        return self.dear <= inputs and outputs <= self.wide * inputs

    def told(self) -> list[Kept]:
        """What was kept of the whole batch, and is worth it; not under autocast."""
        return [
            kept._replace(output=kept.output.detach())
            for kept in self.kept
            if kept.shape[0] == len(kept.output) == self.samples
            and kept.output.dtype == kept.weight.dtype
            and self.is_worth(kept.shape, kept.weight)
        ]

    def is_worth(self, shape: torch.Size, weight: Tensor) -> bool:
        """Whether a call on an input of that shape is kept."""
        batched = len(shape) == weight.dim() or (weight.dim() == 2 and len(shape) > 1)
        return batched and shape[1:].numel() >= self.least and self.is_dear(weight)

    def _run(self, layer: Any, forward: Call, input: Tensor) -> Tensor:  # noqa: A002  (as torch calls it)
        result: Tensor = forward(input)
        read = _LAYERS[type(layer).forward]
        # an answer waits for this: whether it is worth it is found out by who goes through again
        if read is not _linear or input.is_contiguous():
            self._keep(read, layer._parameters["weight"], input, result)
        return result

    def _keep(self, read: Call, weight: Tensor, x: Tensor, result: Tensor) -> None:
        self.kept.append(Kept(read, weight, x.shape, result, result._version))


def dear_layers(model: nn.Module) -> list[Any]:
    """The layers that make all dear calls of a model; none where others may make some too.

    That is so where each matrix that it holds is the weight of torch's own convolution or linear layer.

    Example:
        >>> dear_layers(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
        [Linear(in_features=2, out_features=3, bias=True)]
        >>> dear_layers(nn.MultiheadAttention(4, 2))
        []
    """
    found = [module for module in model.modules() if _is_dear(module)]
    theirs = {id(layer.weight) for layer in found}
    others = any(p.dim() > 1 and id(p) not in theirs for p in model.parameters())
    return [] if others else found


def _is_dear(module: Any) -> bool:
    lent = vars(module).get("forward")
    own = (lent is None or is_ours(lent)) and type(module).forward in _LAYERS
    pads = getattr(module, "padding_mode", "zeros") != "zeros"  # before torch is called
    return own and not pads and isinstance(module._parameters.get("weight"), Tensor)


class Replayed(Watching):
    """While it lasts, such calls on the chosen samples take what was kept, once each and in order.

    A call that does not ask for what comes next ends it: from there on all is computed. Where layers
    were watched, what others compute with their weights is no call of theirs.

    Args:
        recorded: by the forward of all samples.
        chosen: places of those that go through once more; None: all.
    """

    def __init__(self, recorded: Recorded, chosen: Tensor | None = None) -> None:
        self.functions = _READ.keys()
        self.recorded, self.chosen = recorded, chosen
        self.samples = recorded.samples if chosen is None else len(chosen)
        self.left = recorded.told()[::-1]
        self.taken = 0
        self._asking: Tensor | None = None
        recorded.kept = []

    def __enter__(self) -> Any:
        self._lent = _instead(filter(_is_dear, self.recorded.layers), self._run)
        self._lent.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lent.__exit__(*error)

    def _run(self, layer: Any, forward: Call, input: Tensor) -> Tensor:  # noqa: A002
        self._asking = layer.weight
        try:
            return forward(input)
        finally:
            self._asking = None

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What was kept of the call, or else the call."""
        call = _call(func, args, kwargs, self.recorded) if self.left else None
        if call is None or len(call.x) != self.samples:
            return go_on(*args, **kwargs)
        if self.recorded.layers and call.weight is not self._asking:
            return go_on(*args, **kwargs)
        kept = self.left.pop()
        fits = kept.fits(func, call.x, call.weight)
        if not fits:
            self.left = []
        if not fits or call.learns or not kept.intact:
            return go_on(*args, **kwargs)
        self.taken += 1
        output = kept.output if self.chosen is None else kept.output[self.chosen]
        if not (torch.is_grad_enabled() and call.x.requires_grad):
            return output
        return _Known.apply(call.x, output, call.back)


class _Call(NamedTuple):
    x: Tensor
    weight: Tensor
    learns: bool
    back: Callable[[Tensor, Shape], Tensor]


def _call(
    func: Callable[..., Any], args: Any, kwargs: dict[str, Any], recorded: Recorded
) -> _Call | None:
    """What a call computes, where it is a dear one."""
    read = _READ.get(func)
    if read is None or not args or args[0].dim() < 2:
        return None
    x, weight, bias, back = read(*args, **kwargs)
    worth_it = recorded.is_worth(x.shape, weight)
    if back is None or not worth_it or is_autocasting(x.device):
        return None
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    return _Call(x, weight, learns, back)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:  # noqa: A002
    if not input.is_contiguous():  # torch may multiply sample by sample, on the way back too
        return input, weight, bias, None

    def back(grad: Tensor, shape: Shape) -> Tensor:
        return to_input(grad, weight)

    return input, weight, bias, back


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None,  # noqa: A002
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    if isinstance(padding, str):
        return input, weight, bias, None
    sides = weight.dim() - 2
    each = [
        list(value) if isinstance(value, tuple | list) else [value] * sides
        for value in (stride, padding, dilation)
    ]

    def back(grad: Tensor, shape: Shape) -> Tensor:
        to_x, *_ = torch.ops.aten.convolution_backward(
            grad, shape.empty(), weight, None, *each, False, [0] * sides, groups,
            [True, False, False],
        )  # fmt: skip
        return to_x

    return input, weight, bias, back


_LAYERS: dict[Any, Callable[..., Any]] = {
    nn.Linear.forward: _linear,
    **dict.fromkeys((nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward), _conv),
}
_READ: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.linear, linear), _linear), **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv)
}  # fmt: skip
