"""What answers tell that hardly ever come again: places in lists of classes, and the few that do."""

import torch
from torch import Tensor


def places(logits: Tensor, answers: Tensor) -> Tensor:
    """How many classes stand before each answer, by falling logit, and of those level by number.

    Args:
        logits: of one model (n, classes).
        answers: of another, of the same samples (n,).

    Example:
        >>> places(torch.tensor([[0.0, 3.0, 1.0], [1.0, 1.0, 1.0]]), torch.tensor([2, 0]))
        tensor([1, 0])
    """
    own = logits.gather(1, answers[:, None])
    number = torch.arange(logits.shape[1], device=logits.device)
    return ((logits > own) | ((logits == own) & (number < answers[:, None]))).sum(1)


def left_open(found: Tensor, classes: int) -> float:
    """At most so much do lists leave open of the answers, in nats, if these stand at such places.

    Who knows the list needs the place alone; places are told by their doubling, 0, 1 to 2, 3 to 6
    and so on, and within it as if all were alike. So few cells fill up long before the classes do.

    Args:
        found: `places` (n,), not empty.
        classes: in a list.

    Example:
        >>> left_open(torch.zeros(8, dtype=torch.long), 1000)
        0.0
        >>> round(left_open(torch.arange(1000), 1000), 3)  # as open as can be: log(1000)
        6.908
    """
    doubling = (found + 1).double().log2().floor()
    first, count = doubling.unique(return_counts=True)
    size = (2 ** (first + 1) - 1).clamp(max=classes) - (2**first - 1)
    share = count.double() / len(found)
    return float((share * (size.clamp(min=1).log() - share.log())).sum())


def alone(values: Tensor) -> Tensor:
    """What each value adds to the entropy of all by being there, times their number, but for a constant.

    For values that come often it is their surprise; of two that are equal each adds what both do, so
    that its error is that of few pairs and not of twice as many values.

    Example:
        >>> alone(torch.tensor([3, 3, 0])).exp()
        tensor([0.2500, 0.2500, 1.0000], dtype=torch.float64)
    """
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    many = counts.double()
    return (torch.xlogy(many - 1, many - 1) - torch.xlogy(many, many))[place]
