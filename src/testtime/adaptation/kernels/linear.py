"""Linear layers by the kernel of convolutions, on processors that torch's matrix product does not fill.

torch multiplies matrices of single precision by Intel's MKL, which gives processors of other makers no
vectors of 512 bits; oneDNN, by which it convolves, does, and is as much as twice as fast there. Rows of
features are an image one pixel wide whose channels lie together, and a linear layer is a convolution of
one pixel: nothing is copied. Results differ from torch's by rounding.
"""

import platform
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from testtime.adaptation.kernels.calls import of_others, transformed

WORK = 1 << 24
"""Multiplications of a layer from which on it is done: below them the call itself costs as much."""
ROWS = 256
"""Rows of features from which on it is done: of fewer, weights are laid out anew for too little."""
TOGETHER = 16
"""Images from which on torch convolves by oneDNN in a single thread too."""


@cache
def unfilled() -> bool:
    """Whether torch's matrix product leaves half of this processor's vectors empty: of AMD's, with AVX-512.

    Example:
        >>> unfilled() in (True, False)
        True
    """
    told = Path("/proc/cpuinfo")  # the name of the maker; Windows tells it by `platform`
    names = platform.processor() + (told.read_text() if told.exists() else "")
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return libraries and wide and "AuthenticAMD" in names


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `F.linear` gives, by a convolution where that is worth it.

    Where the weight is frozen, nothing else is kept for the backward, and that way goes by a convolution
    too.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Example:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    if of_others(x):
        return F.linear(x, weight, bias)
    if has_torch_function((x,)):
        return handle_torch_function(linear, (x,), x, weight, bias)
    if not _is_worth_it(x, weight, bias) or transformed(x, weight, bias):
        return F.linear(x, weight, bias)
    around = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and around and not weight.requires_grad:
        return _Frozen.apply(x, weight, bias)
    return _convolved(x, weight, bias)


def linear_layers(model: nn.Module) -> list[Any]:
    """Torch's own linear layers of a model, on processors where another forward may serve them better.

    Example:
        >>> linear_layers(nn.Sequential(nn.Linear(2, 3))) if not unfilled() else []
        []
    """
    found = [module for module in model.modules() if type(module).forward is nn.Linear.forward]
    return found if unfilled() else []


def is_ours(forward: Any) -> bool:
    """Whether that forward of a layer is `forward_of_linear`.

    Example:
        >>> is_ours(nn.Linear(2, 3).forward)
        False
    """
    return isinstance(forward, partial) and forward.func is forward_of_linear


def forward_of_linear(module: Any, input: Tensor) -> Tensor:  # noqa: A002  (as torch calls it)
    """The forward of torch's linear layer.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> torch.equal(forward_of_linear(layer, x), layer(x))
        True
    """
    return linear(input, module.weight, module.bias)


def to_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a frozen linear layer's input, (..., K), from that of what it gave, (..., N).

    Example:
        >>> to_input(torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[6., 8.]])
    """
    # as one matrix, and detached: torch would ask whether the weight, no longer on loan, wants a gradient
    made = linear(grad.reshape(-1, len(weight)), weight.detach().t())
    return made.view(*grad.shape[:-1], -1)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _convolved(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        to_x, _, to_bias = ctx.needs_input_grad
        return (
            to_input(grads[0], *ctx.saved_tensors) if to_x else None,
            None,
            grads[0].flatten(0, -2).sum(0) if to_bias else None,
        )


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.numel() // x.shape[-1]
    images = 1 if torch.get_num_threads() > 1 else TOGETHER
    image = x.view(images, rows // images, 1, -1).permute(0, 3, 1, 2)
    y = F.conv2d(image, weight[:, :, None, None], bias)
    # torch lets nobody write to a view that was made here, as an activation in place does
    return torch.ops.aten._unsafe_view.default(
        y.permute(0, 2, 3, 1).contiguous(), [*x.shape[:-1], len(weight)]
    )


def _is_worth_it(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not x.is_cpu or x.is_nested or x.dim() < 2 or not x.numel():
        return False
    rows = x.numel() // x.shape[-1]
    if rows < ROWS or rows * weight.numel() < WORK:
        return False
    single = all(t is None or t.dtype == torch.float32 for t in (x, weight, bias))
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2
    # torch adds any bias that can be, and says best what it cannot multiply
    fits = x.shape[-1] == weight.shape[-1] and (bias is None or bias.shape == weight.shape[:1])
    lies = x.layout is torch.strided and x.is_contiguous()
    kernel = torch.get_num_threads() > 1 or rows % TOGETHER == 0
    return unfilled() and single and plain and fits and lies and kernel and _as_set()


def _as_set() -> bool:
    """Whether nothing is asked of torch that its matrix product heeds and a convolution may not."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return _single() and torch._C._get_mkldnn_enabled() and not (
        watched or torch.is_autocast_enabled("cpu")
    )  # fmt: skip


def _single() -> bool:
    """Whether neither products nor convolutions may round what they are given.

    Newer torch has a switch for each, and raises an error where the older question follows one of them.
    """
    told = getattr(torch._C, "_get_fp32_precision_getter", None)
    if told is None:
        return torch.get_float32_matmul_precision() == "highest"
    return all(told("mkldnn", kind) in ("none", "ieee") for kind in ("matmul", "conv"))
