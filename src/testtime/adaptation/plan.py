"""What an adapter will change, and what that costs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.arrays import as_real
from testtime.adaptation.budget import Spending
from testtime.adaptation.deferred import answers_last
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.parts.scales import SCALES
from testtime.adaptation.recipe import Recipe, describe
from testtime.adaptation.state import State


@dataclass(frozen=True)
class Plan:
    """What an adapter will change, and what each step costs.

    Attributes:
        tensors: names of the tensors that adapt.
        values: numbers in them.
        share: of the model's parameters.
        layers: normalisation layers by kind.
        statistics: what layers with stored statistics normalise with.
        ordered: whether layers are known in order of execution, or only as registered.
        forwards, backwards: passes through the model that a step costs for each sample, at most;
            None when the method does not tell.
        bytes: held beside the model, by tensors that adapt, optimizer, teacher, moving averages and
            what is in memory by now.
        answers_first: whether a batch is answered as the model was before it learnt from that batch.
        spending: what was chosen for a budget, and what was measured; None without one.
    """

    tensors: tuple[str, ...]
    values: int
    share: float
    layers: dict[str, int]
    statistics: str
    ordered: bool
    forwards: float | None
    backwards: float | None
    bytes: int
    answers_first: bool
    spending: Spending | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.layers.items()) or "none"
        return (
            f"adapts {len(self.tensors)} tensors, {self.values} values, {self.share:.3%} of the "
            f"model; normalisation layers: {kinds}; statistics: {self.statistics}; "
            f"at most {self.forwards or '?'} forward and {self.backwards if self.forwards else '?'} "
            f"backward passes for each sample; {self.bytes} bytes held"
            + f"; answers {'before' if self.answers_first else 'after'} the update"
            * bool(self.tensors)
            + (f"; {self.spending}" if self.spending else "")
        )


def planned(
    model: nn.Module, recipe: Recipe, state: State, spending: Spending | None, dense: bool
) -> Plan:
    """What a recipe will change in a model from a state on; layers as they are registered."""
    kinds: dict[str, int] = {}
    for layer in norm_layers(model):
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    values = sum(tensor.numel() for tensor in state.tensors.values())
    total = sum(as_real(parameter.detach()).numel() for parameter in model.parameters())
    forwards, backwards = recipe.passes or (None, None)
    if dense and forwards and recipe.views is not None:
        forwards += 2 * len(SCALES) - recipe.views.count
    held = dict(vars(state))
    if recipe.optimizer is not None:  # what it holds from its first step on
        now = [*state.tensors.values(), *state.beside.values()]
        zeros = [torch.zeros_like(tensor) for tensor in now]
        _, held["optimizer"] = recipe.optimizer.step(held["optimizer"], now, zeros)
    return Plan(
        tuple(state.tensors), values, values / max(total, 1), kinds, describe(recipe.statistics),
        False, forwards, backwards, size_of(held), answers_last(recipe) is None, spending,
    )  # fmt: skip


def size_of(tree: Any) -> int:
    """Bytes of all tensors in a tree.

    Example:
        >>> import torch
        >>> size_of({"a": torch.zeros(3), "b": [None, torch.zeros(1)]})
        16
    """
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = tree.values()
    return sum(map(size_of, tree)) if isinstance(tree, Iterable) and type(tree) is not str else 0
