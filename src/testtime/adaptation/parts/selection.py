"""Which samples may teach, and how much? Weights, 0 for those that may not.

A selection with a state has `init() -> state`, and its call gives the weights and the new
state.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range
from testtime.adaptation.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Reliable:
    """Samples whose entropy is below a margin, all alike.

    Args:
        margin: in units of ln C, the entropy of a uniform prediction.
    """

    margin: float

    def __post_init__(self) -> None:
        in_range(0, margin=self.margin)

    def __call__(self, entropies: Tensor, classes: int) -> Tensor:
        return (entropies.detach() < self.margin * math.log(classes)).float()


@dataclass(frozen=True, kw_only=True)
class ReliableAndNew:
    """Samples of low entropy that differ from what taught before, the surest counting most.

        weight_i = exp(E0 - H_i) [H_i < E0] [|cos(m, p_i)| < d],    m <- 0.9 m + 0.1 mean p_selected

    Args:
        margin: E0 in units of ln C; 0.4 in EATA.
        redundancy: d, or None for `redundancy_margin(C)`.
    """

    margin: float
    redundancy: float | None

    def __post_init__(self) -> None:
        in_range(0, margin=self.margin)
        if self.redundancy is not None:
            in_range(0, redundancy=self.redundancy)

    def init(self) -> dict[str, Any]:
        """No mean prediction yet: the first batch is asked for low entropy only."""
        return {"mean": None}

    def __call__(
        self, logits: Tensor, entropies: Tensor, classes: int, ranks: Ranks, state: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        limit = self.margin * math.log(classes)
        probs = at_least_single(logits.detach()).softmax(-1)
        uncertainty = entropies.detach()
        chosen = uncertainty < limit
        mean = state["mean"]
        if mean is not None:
            similar = torch.nn.functional.cosine_similarity(mean[None], probs, dim=1).abs()
            chosen = chosen & (similar < _or_default(self.redundancy, classes))
        # 1 / exp(-a), not exp(a): to the last bit the weights of the published code
        weights = torch.where(chosen, 1 / (uncertainty - limit).exp(), 0.0)
        count = ranks.sum(chosen.sum().float())
        batch_mean = ranks.sum(torch.where(chosen[:, None], probs, 0.0).sum(0)) / count.clamp(min=1)
        if mean is None:
            fresh = batch_mean if float(count) else None
        else:
            fresh = torch.where(count > 0, 0.9 * mean + 0.1 * batch_mean, mean)
        return weights, {"mean": fresh}


def redundancy_margin(classes: int) -> float:
    """EATA's d for a number of classes: through 0.4 for ten and 0.05 for a thousand, as published.

    In between and beyond it falls as a power of the number of classes, as the cosine of two
    unrelated predictions does.

    Example:
        >>> redundancy_margin(10), round(redundancy_margin(1000), 6)
        (0.4, 0.05)
    """
    return min(1.0, 0.4 * (classes / 10) ** (math.log(0.05 / 0.4) / math.log(100)))


def _or_default(redundancy: float | None, classes: int) -> float:
    return redundancy_margin(classes) if redundancy is None else redundancy
