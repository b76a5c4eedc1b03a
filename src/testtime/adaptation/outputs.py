"""Logits in whatever a model returns: a tensor, a tuple, a dictionary, or an object with `.logits`."""

import copy
import dataclasses
from collections.abc import Callable
from types import MemberDescriptorType
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


def joinable(one: Any, other: Any, *, sizes: tuple[int, int]) -> bool:
    """Whether outputs for two parts of a batch are of one kind, so that `map_tensors` can join them.

    Args:
        one: output for a part.
        other: output for another part.
        sizes: samples of these parts. Tensors must have a row for each, or be single numbers.

    Example:
        >>> parts = [{"logits": torch.zeros(size, 2), "kept": "text"} for size in (1, 3)]
        >>> joinable(*parts, sizes=(1, 3)), joinable(parts[0], parts[1]["logits"], sizes=(1, 3))
        (True, False)
    """
    mine, theirs = leaves(one), leaves(other)
    return mine.keys() == theirs.keys() and all(
        _fit(part, theirs[place], sizes) for place, part in mine.items()
    )


def _fit(one: Any, other: Any, sizes: tuple[int, int]) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return same_value(one, other)
    if any(part.is_nested or part.layout is not torch.strided for part in (one, other)):
        return False
    rows = tuple(part.shape[:1].numel() for part in (one, other))  # 1 of a single number
    single = one.dim() == other.dim() == 0
    fits = one.dtype == other.dtype and one.shape[1:] == other.shape[1:]
    return fits and (single or (one.dim() == other.dim() and rows == sizes))


def same_value(one: Any, other: Any) -> bool:
    """Whether two leaves that are no tensors are the same for all that is known.

    Example:
        >>> same_value("text", "text"), same_value({1}, {1})
        (True, False)
    """
    plain = isinstance(one, str | int | float) and type(one) is type(other)
    return one is other or (plain and one == other)


def leaves(output: Any, *place: Any) -> dict[tuple[Any, ...], Any]:
    """Tensors and all else that an output is made of, in order, each at its place.

    Args:
        output: of a model.
        place: where it stands: types of what holds it, and its keys there.

    Example:
        >>> list(leaves({"logits": torch.ones(1), "kept": ("text", None)}).values())
        [2, tensor([1.]), 2, 'text', None]
    """
    parts = _parts(output)
    if parts is None:
        return {place: output}
    found: dict[tuple[Any, ...], Any] = {(*place, type(output)): len(parts)}
    for key, part in parts.items():
        found |= leaves(part, *place, type(output), key)
    return found


def _parts(output: Any) -> dict[Any, Any] | None:
    """What an output holds, by index, key or attribute; None where it is not looked into."""
    if isinstance(output, Tensor | type):
        return None
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if isinstance(output, dict):
        return dict(output)
    if not dataclasses.is_dataclass(output) and getattr(output, "logits", None) is None:
        return None
    own = (vars(kind).items() for kind in reversed(type(output).__mro__))
    slots = [name for each in own for name, it in each if isinstance(it, MemberDescriptorType)]
    set_ = {name: getattr(output, name) for name in slots if hasattr(output, name)}
    return set_ | getattr(output, "__dict__", {})


def _map(change: Callable[..., Any], first: Any, *others: Any) -> Any:
    parts = _parts(first)
    if parts is None:
        return change(first, *others)
    theirs: list[Any] = [_parts(other) for other in others]
    new = {key: _map(change, part, *(t[key] for t in theirs)) for key, part in parts.items()}
    if isinstance(first, tuple | list):
        return (
            type(first)(*new.values())
            if hasattr(first, "_fields")
            else type(first)([*new.values()])
        )
    answer = copy.copy(first)  # of whatever subclass
    for key, part in new.items():
        if isinstance(first, dict):
            answer[key] = part
        else:
            object.__setattr__(answer, key, part)  # also where the class is frozen
    return answer


def rows(logits: Tensor) -> Tensor:
    """Logits as rows (N, C): dense logits (B, C, L) or (B, C, H, W) have one row for each place."""
    if logits.dim() == 2:
        return logits
    return torch.movedim(logits, 1, -1).reshape(-1, logits.shape[1])
