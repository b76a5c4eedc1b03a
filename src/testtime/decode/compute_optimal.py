"""The compute-optimal choice: for each level of difficulty the strategy that paid there.

    difficulty of a question <- pass@1 over many samples (oracle), or their mean verifier score
    cut it into 5 quantile bins
    for each bin: the strategy with the best accuracy at the given budget on one half of the
    questions, applied to the other half; both ways, averaged

Which strategies were tried, with which budget, is the caller's table: `correct[s, q]` says how often
strategy s was right on question q. A strategy is any name: "beam search, width 4", "revisions, 8 in
a row".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Real
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range, whole
from testtime._core.seeds import generator

BINS = 5
"""Levels of difficulty (paper)."""


@dataclass(frozen=True)
class Policy:
    """Which strategy to take at which difficulty.

    Attributes:
        edges: upper ends of all levels but the last; a value that equals an edge lies below it.
        choices: the strategy of each level, from the lowest value of `easiness` up.
    """

    edges: tuple[float, ...]
    choices: tuple[str, ...]

    def choose(self, easiness: float) -> str:
        """The strategy for a question with this pass rate or mean verifier score.

        Example:
            >>> Policy((0.5,), ("beam search", "best-of-N")).choose(0.9)
            'best-of-N'
        """
        return self.choices[sum(easiness > edge for edge in self.edges)]


@dataclass(frozen=True)
class Validated:
    """What two-fold cross-validation finds; each question is answered by a policy of other ones.

    Attributes:
        accuracy: of the compute-optimal policy, the mean over all questions.
        single: accuracy of every strategy alone, by name.
        chosen: (questions,) index of the strategy that each question got.
        level: (questions,) bin of each question, 0 with the lowest easiness.
    """

    accuracy: float
    single: dict[str, float]
    chosen: Int[Tensor, "questions"]
    level: Int[Tensor, "questions"]


def difficulty_levels(
    easiness: Real[Tensor, "questions"], *, bins: int = BINS
) -> Int[Tensor, "questions"]:
    """Quantile bin of each question, from 0 (hardest) to bins - 1; equal values share a bin.

    Args:
        easiness: (questions,) pass@1 or mean verifier score, higher for easier questions.
        bins: 5 (paper).

    Raises:
        InputError: no question, another shape, or NaN.
        OptionError: bins is no whole number of at least 1.

    Example:
        >>> difficulty_levels(torch.tensor([0.9, 0.1, 0.5, 0.1]), bins=2)
        tensor([1, 0, 1, 0])

    Reference: Snell, Lee, Xu, Kumar, Scaling LLM Test-Time Compute Optimally can be More Effective
    than Scaling Model Parameters, ICLR 2025.
    """
    edges = _edges(easiness, bins)
    return torch.bucketize(easiness.double(), edges)


def fit_policy(
    easiness: Real[Tensor, "questions"],
    correct: Real[Tensor, "strategies questions"],
    strategies: Sequence[str],
    *,
    bins: int = BINS,
) -> Policy:
    """The compute-optimal policy for a table of what each strategy got right.

    Of strategies that are equally good the first is taken, so put cheaper ones first. A level
    without questions (where many of them tie) gets the strategy that is best over all.

    Args:
        easiness: (questions,) pass@1 or mean verifier score, higher for easier questions.
        correct: (strategies, questions) 0 or 1, or the share of repetitions that were right.
        strategies: their names.
        bins: levels of difficulty; 5 (paper).

    Raises:
        InputError: shapes that do not fit, no question, or NaN.
        OptionError: bins is no whole number of at least 1.

    Example:
        >>> fit_policy(
        ...     torch.tensor([0.1, 0.2, 0.8, 0.9]),
        ...     torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]), ["best-of-N", "beams"], bins=2)
        Policy(edges=(0.5,), choices=('beams', 'best-of-N'))

    Reference: Snell et al., ICLR 2025.
    """
    _check(easiness, correct, strategies)
    edges = _edges(easiness, bins)
    best = _best(torch.bucketize(easiness.double(), edges), correct.double(), bins)
    return Policy(tuple(edges.tolist()), tuple(strategies[int(i)] for i in best))


def cross_validate(
    easiness: Real[Tensor, "questions"],
    correct: Real[Tensor, "strategies questions"],
    strategies: Sequence[str],
    *,
    bins: int = BINS,
    seed: int = 0,
) -> Validated:
    """Accuracy of the compute-optimal policy on questions that it was not chosen on.

    Args:
        easiness: (questions,) pass@1 or mean verifier score, higher for easier questions.
        correct: (strategies, questions) 0 or 1, or the share of repetitions that were right.
        strategies: their names; cheaper ones first, since of equals the first is taken.
        bins: levels of difficulty; 5 (paper).
        seed: of the split; every level is split in halves.

    Raises:
        InputError: shapes that do not fit, fewer than two questions, or NaN.
        OptionError: bins is no whole number of at least 1.

    Example:
        >>> easy = torch.arange(40) >= 20
        >>> correct = torch.stack([easy, ~easy]).float()  # each is right where the other is wrong
        >>> found = cross_validate(easy.float(), correct, ["best-of-N", "beams"], bins=2)
        >>> found.accuracy, found.single
        (1.0, {'best-of-N': 0.5, 'beams': 0.5})

    Reference: Snell et al., ICLR 2025.
    """
    _check(easiness, correct, strategies)
    if len(easiness) < 2:
        raise InputError("one question was given; two-fold cross-validation needs at least two.")
    level, right = difficulty_levels(easiness, bins=bins), correct.double()
    fold = _folds(level, seed)
    chosen = torch.empty_like(level)
    for test in (0, 1):
        known = fold != test
        best = _best(level[known], right[:, known], bins)
        chosen[~known] = best[level[~known]]
    accuracy = right.gather(0, chosen[None]).mean().item()
    single = dict(zip(strategies, right.mean(1).tolist(), strict=True))
    return Validated(accuracy, single, chosen, level)


def inference_of_small(*, times: float, pretraining: float, inference: float) -> float:
    """How many times more tokens a small model may generate than one M times larger, at equal FLOPs.

        6 P D_pre + 2 P D_inf f = M ( 6 P D_pre + 2 P D_inf )
        f = M + 3 (D_pre / D_inf) (M - 1)

    Args:
        times: M, at least 1.
        pretraining: tokens that each model is trained on, D_pre.
        inference: tokens that the large model will generate in its life, D_inf.

    Raises:
        OptionError: a value out of its range.

    Example:
        >>> inference_of_small(times=14, pretraining=1e12, inference=1e12)
        53.0

    Reference: Snell et al., ICLR 2025, section 7.
    """
    in_range(1, times=times)
    in_range(0, pretraining=pretraining, inference=inference)
    if inference == 0:
        raise OptionError("inference is 0; expected the number of tokens that will be generated.")
    return times + 3 * (pretraining / inference) * (times - 1)


def _edges(easiness: Tensor, bins: int) -> Tensor:
    whole(1, bins=bins)
    check_tensors(easiness=easiness)
    if easiness.ndim != 1 or len(easiness) == 0 or bool(easiness.isnan().any()):
        raise InputError(
            f"easiness has the shape {tuple(easiness.shape)}"
            f"{' and holds NaN' if easiness.isnan().any() else ''}; expected one number for each "
            "question, at least one."
        )
    share = torch.arange(1, bins, dtype=torch.float64, device=easiness.device) / bins
    return easiness.double().quantile(share)


def _best(level: Tensor, right: Tensor, bins: int) -> Tensor:
    """(bins,) the best strategy of each level, the best over all where a level is empty."""
    overall = int(right.mean(1).argmax())
    return torch.tensor(
        [
            int(right[:, level == each].mean(1).argmax()) if (level == each).any() else overall
            for each in range(bins)
        ],
        device=level.device,
    )


def _folds(level: Tensor, seed: int) -> Tensor:
    """0 or 1 for each question: every level in halves, and neither half empty."""
    chance = generator(seed, "compute-optimal", "folds")
    shuffled = torch.randperm(len(level), generator=chance, device="cpu").to(level.device)
    order = shuffled[level[shuffled].argsort(stable=True)]
    fold = torch.empty_like(level)
    fold[order] = torch.arange(len(level), device=level.device) % 2
    return fold


def _check(easiness: Tensor, correct: Tensor, strategies: Sequence[str]) -> None:
    check_tensors(easiness=easiness, correct=correct)
    if correct.shape != (len(strategies), *easiness.shape) or not len(strategies):
        raise InputError(
            f"correct has the shape {tuple(correct.shape)}; expected (strategies, questions), here "
            f"({len(strategies)}, {easiness.numel()}), with at least one strategy."
        )
    if bool(correct.isnan().any()):
        raise InputError("correct holds NaN; leave out what was not measured.")
