"""What an adapter will change, and what that costs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from testtime.adaptation.budget import Spending


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
    spending: Spending | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.layers.items()) or "none"
        return (
            f"adapts {len(self.tensors)} tensors, {self.values} values, {self.share:.3%} of the "
            f"model; normalisation layers: {kinds}; statistics: {self.statistics}; "
            f"at most {self.forwards or '?'} forward and {self.backwards if self.forwards else '?'} "
            f"backward passes for each sample; {self.bytes} bytes held"
        )


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
