"""What inputs explain of a model's answers, from its own probabilities."""

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single


def probabilities(logits: Tensor) -> Tensor:
    """Sum of the entropies of the probabilities, then of each class's probabilities (classes + 1,).

    Example:
        >>> probabilities(torch.tensor([[0.0, 0.0], [9.0, -9.0]])).round(decimals=3)
        tensor([0.6930, 1.5000, 0.5000])
    """
    p = at_least_single(logits.detach()).softmax(1)
    return torch.cat([torch.special.entr(p).sum()[None], p.sum(0)])


def theil(sums: Tensor) -> float:
    """Theil's coefficient: the share of the answers' entropy that the inputs explain, from 0 to 1.

    Args:
        sums: of `probabilities`, of one batch or of several added up.

    Example:
        >>> round(theil(probabilities(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))), 3)
        0.998
        >>> round(theil(probabilities(torch.zeros(2, 2))), 3)  # even, and explained by no input
        0.0
    """
    left, shares = sums[0] / sums[1:].sum(), sums[1:] / sums[1:].sum()
    entropy = float(torch.special.entr(shares).sum())
    return 1 - float(left) / entropy if entropy > 1e-9 else 0.0


def tells(sums: Tensor) -> float:
    """What the inputs tell of one answer, in nats: its mutual information with them.

    Args:
        sums: as of `theil`.

    Example:
        >>> round(tells(probabilities(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))), 3)  # all but a bit
        0.692
    """
    left, shares = sums[0] / sums[1:].sum(), sums[1:] / sums[1:].sum()
    return float(torch.special.entr(shares).sum() - left)


def explained(sums: Tensor) -> tuple[float, float]:
    """What inputs explain of the first model's answers, and how much more than of the second's.

    Args:
        sums: of `probabilities`, of two models (2, classes + 1).

    Example:
        >>> sure, lost = torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.zeros(2, 2)
        >>> told, more = explained(torch.stack([probabilities(sure), probabilities(lost)]))
        >>> round(told, 3), round(more, 3)
        (0.998, 0.998)
    """
    ours, theirs = map(theil, sums)
    return ours, ours - theirs
