"""Logits in whatever a model returns: a tensor, a tuple, a dictionary, or an object with `.logits`."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError


def read_logits(output: Any) -> Tensor:
    """The logits (B, C) or (B, C, ...) in a model's output.

    They are the output itself, its `.logits`, the entry "logits" or "out" of a dictionary (the
    latter is torchvision's segmentation models'), or the first of a tuple.

    Raises:
        InputError: when there are none.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits", output.get("out"))
    elif logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, Tensor) or not 2 <= logits.dim() <= 5:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise InputError(
            f"the model returned {got}; expected logits of shape (batch, classes), (batch, classes, "
            "length) or (batch, classes, height, width), a tuple that begins with them, an object with "
            '.logits, or a dictionary with "logits" or "out". Wrap the model in a module that '
            "returns them."
        )
    if not logits.is_floating_point():
        raise InputError(
            f"the model returned numbers of type {logits.dtype}; expected logits, one floating "
            "point number for each class. Wrap the model in a module that returns them."
        )
    return logits


def with_logits(output: Any, logits: Tensor) -> Any:
    """The same kind of output, detached, with these logits in it, in the type that its own have.

    Example:
        >>> with_logits((torch.zeros(1, 2), "kept"), torch.ones(1, 2))
        (tensor([[1., 1.]]), 'kept')
    """
    old = read_logits(output)
    logits = logits.to(old.dtype)
    return map_tensors(lambda part: (logits if part is old else part).detach(), output)


def detached(output: Any) -> Any:
    """The same output without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    return with_logits(output, read_logits(output))


def join(outputs: list[Any]) -> Any:
    """One output for a batch from those for its parts: tensors are joined, single numbers averaged.

    Single numbers that are whole or truth values, which have no mean, are those of the first part.

    Example:
        >>> join([{"logits": torch.zeros(1, 2)}, {"logits": torch.ones(1, 2)}])
        {'logits': tensor([[0., 0.], [1., 1.]])}
    """
    return map_tensors(_join, *outputs)


def _join(*parts: Tensor) -> Tensor:
    if parts[0].dim():
        return torch.cat(parts)
    means = parts[0].is_floating_point() or parts[0].is_complex()
    return torch.stack(parts).mean(0) if means else parts[0]


def map_tensors(change: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """The first output with its tensors changed, given those in the same places of the others.

    Example:
        >>> map_tensors(torch.neg, {"logits": torch.ones(1, 2), "kept": "text"})
        {'logits': tensor([[-1., -1.]]), 'kept': 'text'}
    """

    def changed(part: Any, *same: Any) -> Any:
        return change(part, *same) if isinstance(part, Tensor) else part

    return _map(changed, first, *others)


def leaves(output: Any) -> list[Any]:
    """Tensors and all else that an output is made of, in order.

    Example:
        >>> leaves({"logits": torch.ones(1), "kept": ("text", None)})
        [tensor([1.]), 'text', None]
    """
    found: list[Any] = []
    _map(lambda part: found.append(part) or part, output)
    return found


def _map(change: Callable[..., Any], first: Any, *others: Any) -> Any:
    def below(of: Callable[[Any], Any]) -> Any:
        return _map(change, of(first), *map(of, others))

    if isinstance(first, tuple | list):
        parts = [below(lambda output, i=i: output[i]) for i in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if isinstance(first, dict):
        answer = copy.copy(first)  # of whatever subclass
        for key in first:
            answer[key] = below(lambda output, key=key: output[key])
        return answer
    if isinstance(first, Tensor):
        return change(first, *others)
    if dataclasses.is_dataclass(first) or getattr(first, "logits", None) is not None:
        answer = copy.copy(first)
        fields = getattr(first, "__dataclass_fields__", None) or getattr(first, "__dict__", {})
        for name in fields:
            # also where the class is frozen
            object.__setattr__(answer, name, below(lambda output, name=name: getattr(output, name)))
        return answer
    return change(first, *others)


def rows(logits: Tensor) -> Tensor:
    """Logits as rows (N, C): dense logits (B, C, L) or (B, C, H, W) have one row for each place."""
    if logits.dim() == 2:
        return logits
    return torch.movedim(logits, 1, -1).reshape(-1, logits.shape[1])
