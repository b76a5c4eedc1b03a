"""All that an adapter knows beside the model: one small tree of tensors and numbers."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import StateError
from testtime._core.files import digest
from testtime.adaptation.tensor_files import open_tensors, write_tensors

FORMAT = "testtime-state-1"
STREAM = ("guard", "gate", "account", "generator", "steps", "samples", "method")
"""What of a state belongs to the stream and not to what was learnt."""


@dataclass(frozen=True)
class State:
    """Where one stream stands. Steps make a new state; no tensor of an old one is written to.

    Attributes:
        tensors: what adapts, in float32 where the model is in half precision; complex numbers
            as pairs of real ones, as torch's optimizers take them.
        beside: what learns beside the model.
        optimizer: state of the optimizer.
        averages: moving averages of normalisation statistics, with `RunningStatistics`.
        teacher, teacher_averages: the same of the teacher.
        selection: state of each selection.
        memory: state of the memory.
        loss_average: moving average of the loss, with a recovery.
        teaching: moving average of the share of samples that teach, where the engine chooses by it.
        generator: state of the random generator.
        gate: state of the gate.
        account: what a budget was spent on.
        guard: state of the guard, and states that it can roll back to.
        steps: batches since the source.
        samples: samples since the source.
        method: the recipe, as text.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    averages: dict[str, Tensor] | None = None
    teacher: dict[str, Tensor] | None = None
    teacher_averages: dict[str, Tensor] | None = None
    selection: list[Any] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    loss_average: float | None = None
    teaching: float | None = None
    generator: Tensor | None = None
    gate: dict[str, Any] | None = None
    account: dict[str, Any] | None = None
    guard: dict[str, Any] | None = None
    steps: int = 0
    samples: int = 0
    method: str = ""


def rejoined(learnt: State, stream: State) -> State:
    """What was learnt in the one state, in the stream of the other."""
    return replace(learnt, **{name: getattr(stream, name) for name in STREAM})


def save_state(state: State, path: str | Path, *, owner: dict[str, str]) -> None:
    """Writes a state and whose it is (method, model) as safetensors, wholly or not at all.

    Raises:
        StateError: when it holds what a file cannot, as a gate or guard of the caller's may remember,
            or nothing can be written there.
    """
    tensors: dict[str, Tensor] = {}
    plain = {name: _flatten(value, name, tensors) for name, value in vars(state).items()}
    stored = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(plain)
    about = {"format": FORMAT, "plain": text, "digest": digest(stored, text)}
    write_tensors(path, stored, {**about, **owner})


def load_state(path: str | Path, *, owner: dict[str, str], device: torch.device) -> State:
    """Reads a state that `save_state` wrote for the same owner.

    Raises:
        StateError: when there is no file, or it is truncated or damaged, no state, or belongs to another
            model or method.
    """
    with open_tensors(path, wrote="adapter.save()", way="use an earlier copy") as file:
        about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise StateError(f"{path} is not a state that adapter.save() wrote.")
        for what, mine in owner.items():
            if (theirs := about.get(what, "")) != mine:
                raise StateError(
                    f"{path} belongs to another {what}: {differing(theirs, mine)}. Build the "
                    "adapter with the same model and method that saved it."
                )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = about.get("plain", "")
    if about.get("digest") != digest(tensors, text):
        raise StateError(f"{path} was changed or damaged since it was saved; use an earlier copy.")
    plain = json.loads(text)
    # copied, since kernels round by where a tensor begins, and in a file that may be anywhere
    loaded = {
        key: _unflatten(value, tensors, device if key != "generator" else torch.device("cpu"))
        for key, value in plain.items()
    }
    if more := loaded.keys() - vars(State()).keys():
        raise StateError(
            f"{path} was saved by another version of testtime: it holds {', '.join(sorted(more))}, which "
            "this one does not know. Load it there."
        )
    return replace(State(), **loaded)


def differing(theirs: str, mine: str) -> str:
    """In which fields two descriptions of recipes differ; the whole of what is no such description.

    Example:
        >>> differing("Recipe(scope=norms, optimizer=SGD(lr=1, momentum=0))",
        ...           "Recipe(scope=norms, optimizer=SGD(lr=2, momentum=0))")
        'it has optimizer=SGD(lr=1, momentum=0), and this adapter optimizer=SGD(lr=2, momentum=0)'
    """
    pairs = [pair for pair in zip(_parts(theirs), _parts(mine), strict=False) if len(set(pair)) > 1]
    if len(_parts(theirs)) == len(_parts(mine)) > 1:
        theirs, mine = (", ".join(own) for own in zip(*pairs, strict=True))
    return f"it has {theirs or 'none'}, and this adapter {mine}"


def _parts(text: str) -> list[str]:
    """The fields of `Name(field=value, ...)`; commas within brackets belong to a value."""
    depth, found = 0, [""]
    for letter in text[text.find("(") + 1 :].removesuffix(")"):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found]


def check_state(
    state: State, method: str, source: Callable[[str], Tensor | None], what: str
) -> None:
    """Refuses a state of another method or model, or one that holds what is no number.

    Args:
        state: to go on from.
        method: the recipe that would go on, as text.
        source: gives the model's own tensor of a name, or None where it has none.
        what: the state, in words.
    """
    if not isinstance(state, State):
        raise StateError(
            f"{what} is of type {type(state).__name__}; expected what adapter.snapshot() gave. For "
            "a file there is adapter.load(path)."
        )
    if state.method != method:
        raise StateError(
            f"{what} belongs to another method: {differing(state.method, method)}. Build the "
            "adapter with the same method."
        )
    for name, tensor in state.tensors.items():
        own = source(name)
        if own is None or own.shape != tensor.shape or own.device != tensor.device:
            raise StateError(
                f"{what} belongs to another model: it adapts {name} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}, and this model has "
                f"{'no such tensor' if own is None else f'{tuple(own.shape)} on {own.device}'}."
            )
    for held in (
        state.tensors, state.beside, state.averages, state.teacher, state.teacher_averages,
    ):  # fmt: skip
        for name, tensor in (held or {}).items():
            if not tensor.isfinite().all():
                raise StateError(f"{what} holds NaN or infinite values of {name}.")


def _flatten(tree: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        while prefix in tensors:  # names within may hold what joins them
            prefix += "/"
        tensors[prefix] = tree
        if tree.is_contiguous():
            return {"tensor": prefix}
        order = sorted(range(tree.dim()), key=lambda d: -tree.stride(d))
        return {"laid": [prefix, order]}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {k: _flatten(v, f"{prefix}/{k}", tensors) for k, v in tree.items()}}
    if isinstance(tree, list | tuple):
        return {"list": [_flatten(v, f"{prefix}/{i}", tensors) for i, v in enumerate(tree)]}
    number = getattr(tree, "item", None)  # of numpy's; an array has no single one
    if number is not None and not isinstance(tree, dict) and getattr(tree, "ndim", 1) == 0:
        tree = number()
    if tree is None or isinstance(tree, bool | int | str | float):
        return {"float": tree.hex()} if isinstance(tree, float) else tree
    raise StateError(
        f"{prefix} is {tree!r:.60}, of type {type(tree).__name__}; a file holds tensors, numbers, "
        "text, None, and lists and dictionaries of them by text. Nothing was written. Give such in "
        "the state_dict of your gate or guard."
    )


def _unflatten(tree: Any, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value].to(device, copy=True)
    if kind == "laid":  # in memory as it was, channels last for one: kernels round by that
        name, order = value
        back = [order.index(d) for d in range(len(order))]
        return tensors[name].to(device, copy=True).permute(order).contiguous().permute(back)
    if kind == "dict":
        return {key: _unflatten(item, tensors, device) for key, item in value.items()}
    if kind == "list":
        return [_unflatten(item, tensors, device) for item in value]
    return float.fromhex(value)
