"""Are longer solutions better ones? What a model's samples say of it, before a vote is chosen.

    for each question: its samples from short to long
    accuracy of the shortest, of the second shortest, ... over all questions
    mean length of right and of wrong solutions, on questions that have both
    how often a solution doubts itself ("wait", "alternatively"), from short to long

Where accuracy falls with the length, `testtime.decode.votes.shortest_majority_vote` is the vote to take,
and revisions (`testtime.decode.strategies.revise`) gain less than as many tokens of new samples.

Reference: Zeng et al., Revisiting the Test-Time Scaling of o1-like Models: Do they Truly Possess
Test-Time Scaling Capabilities?, ACL 2025.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Real
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError

DOUBTS = ("wait", "alternatively")
"""Words with which a solution turns round (paper)."""


@dataclass(frozen=True)
class Lengths:
    """What `length_study` finds.

    Attributes:
        accuracy: of the shortest solutions of all questions, of the second shortest, ...
        right: mean length of right solutions, on questions that have right and wrong ones; first the
            mean of each question. NaN if there is no such question.
        wrong: the same of wrong ones.
        questions: that have both.
    """

    accuracy: tuple[float, ...]
    right: float
    wrong: float
    questions: int


def length_study(
    lengths: Real[Tensor, "questions samples"], right: Bool[Tensor, "questions samples"]
) -> Lengths:
    """Accuracy of samples from short to long, and how long right and wrong ones are.

    Args:
        lengths: tokens of each sample of each question; of equals the first counts as the shorter.
        right: whether its answer is right.

    Raises:
        InputError: shapes that do not fit, no sample, or a length that is no number.

    Example:
        >>> length_study(torch.tensor([[900, 300], [500, 800]]), torch.tensor([[False, True]] * 2))
        Lengths(accuracy=(0.5, 0.5), right=550.0, wrong=700.0, questions=2)

    Reference: Zeng et al., ACL 2025; they take five samples of a question.
    """
    check_tensors(lengths=lengths, right=right)
    if lengths.ndim != 2 or lengths.shape != right.shape or right.dtype != torch.bool:
        raise InputError(
            f"lengths have the shape {tuple(lengths.shape)} and right is {right.dtype} of the shape "
            f"{tuple(right.shape)}; expected (questions, samples) and bool (questions, samples)."
        )
    long = lengths.double()
    if not long.numel() or not bool(long.isfinite().all()):
        raise InputError("lengths are empty, or hold what is no finite number; count tokens.")
    ranked = right.gather(1, long.argsort(dim=1, stable=True))
    both = right.any(1) & ~right.all(1)
    means = [
        float((long * own).sum(1)[both].div(own.sum(1)[both]).mean()) for own in (right, ~right)
    ]
    return Lengths(tuple(ranked.double().mean(0).tolist()), means[0], means[1], int(both.sum()))


def doubts(
    texts: Sequence[Sequence[str]],
    lengths: Real[Tensor, "questions samples"],
    *,
    words: Sequence[str] = DOUBTS,
) -> dict[str, tuple[float, ...]]:
    """How often each word stands in the shortest solutions on average, in the second shortest, ...

    Args:
        texts: solutions of each question.
        lengths: their tokens.
        words: to count, as whole words in any case.

    Raises:
        InputError: another number of texts than of lengths.

    Example:
        >>> doubts([["Wait, no. Wait.", "So 4."]], torch.tensor([[90, 30]]))
        {'wait': (0.0, 2.0), 'alternatively': (0.0, 0.0)}

    Reference: Zeng et al., ACL 2025.
    """
    check_tensors(lengths=lengths)
    shape = (len(texts), len(texts[0]) if texts else 0)
    if (
        tuple(lengths.shape) != shape
        or not all(len(row) == shape[1] for row in texts)
        or 0 in shape
    ):
        raise InputError(
            f"texts are {[len(row) for row in texts][:5]} solutions of {len(texts)} questions, and "
            f"lengths have the shape {tuple(lengths.shape)}; expected as many, at least one."
        )
    order = lengths.argsort(dim=1, stable=True)
    found: dict[str, tuple[float, ...]] = {}
    for word in words:
        whole = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
        counts = torch.tensor(
            [[len(whole.findall(text)) for text in row] for row in texts], device="cpu"
        )
        ranked = counts.to(order.device).gather(1, order)
        found[word] = tuple(ranked.double().mean(0).tolist())
    return found
