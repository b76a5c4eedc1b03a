"""Logits in whatever a model returns: a tensor, a tuple, or an object with `.logits`."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError


def read_logits(output: Any) -> Tensor:
    """The logits (B, C) or (B, C, ...) in a model's output.

    Raises:
        InputError: when there are none.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 4, 5):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"the model returned {got}; expected logits of shape (batch, classes) or "
            "(batch, classes, height, width), a tuple that begins with them, or an object with "
            ".logits. Wrap the model in a module that returns them."
        )
    return logits


def with_logits(output: Any, logits: Tensor) -> Any:
    """The same kind of output, detached, with these logits in it.

    Example:
        >>> with_logits((torch.zeros(1, 2), "kept"), torch.ones(1, 2))
        (tensor([[1., 1.]]), 'kept')
    """
    if isinstance(output, Tensor):
        return logits.detach()
    if getattr(output, "logits", None) is not None:
        if dataclasses.is_dataclass(output) and not isinstance(output, type):
            fields = {
                f.name: _detached(getattr(output, f.name)) for f in dataclasses.fields(output)
            }
            return type(output)(**{**fields, "logits": logits.detach()})
        answer = copy.copy(output)
        setattr(answer, "logits", logits.detach())  # noqa: B010  (of a type nobody knows)
        return answer
    rest = [_detached(part) for part in output[1:]]
    if hasattr(output, "_fields"):
        return type(output)(logits.detach(), *rest)
    return type(output)([logits.detach(), *rest])


def _detached(part: Any) -> Any:
    if isinstance(part, Tensor):
        return part.detach()
    if isinstance(part, tuple | list) and not hasattr(part, "_fields"):
        return type(part)(_detached(item) for item in part)
    return part


def rows(logits: Tensor) -> Tensor:
    """Logits as rows (N, C): dense logits (B, C, H, W) have one row for each pixel."""
    if logits.dim() == 2:
        return logits
    return torch.movedim(logits, 1, -1).reshape(-1, logits.shape[1])
