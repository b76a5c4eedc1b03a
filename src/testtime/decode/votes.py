"""Votes: one answer out of many samples.

    majority                  argmax_a  c_a                      c_a  samples that answer a
    weighted best-of-N        argmax_a  sum of w_i over a        w_i  score of sample i
    shortest majority         argmax_a  c_a / ln l_a             l_a  mean length of these samples
    hierarchical              weighted inside each chain, then across the winners of the chains

Answers are anything that can be a key of a dictionary; None means that a sample has none and is left
out. Equal answers must be equal values: `normalised` helps with texts. Of answers with equal weight
the one seen first wins, so the order of the samples matters for exact ties only.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

from testtime._core.errors import InputError

A = TypeVar("A", bound=Hashable)


def majority_vote(answers: Sequence[A | None]) -> A | None:
    """The answer that most samples give; None if no sample has an answer.

    Example:
        >>> majority_vote(["7", None, "8", "8"])
        '8'

    Reference: Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models,
    ICLR 2023.
    """
    return _heaviest({a: float(len(members)) for a, members in _groups(answers).items()})


def weighted_vote(answers: Sequence[A | None], weights: Sequence[float]) -> A | None:
    """The answer whose samples have the largest sum of weights; None if no sample has an answer.

    Args:
        answers: of the samples.
        weights: of the samples, such as the probability of a verifier that a solution is right.

    Raises:
        InputError: another number of weights, or one that is negative or not finite.

    Example:
        >>> weighted_vote(["7", "8", "8"], [0.9, 0.3, 0.4])
        '7'

    Reference: Li et al., Making Large Language Models Better Reasoners with Step-Aware Verifier,
    ACL 2023; "best-of-N weighted" of Snell et al., ICLR 2025.
    """
    _paired(answers, weights, "weights")
    _refuse(weights, lambda w: 0 <= w < math.inf, "weights", "numbers of at least 0",
            "Turn logits into probabilities first, since a sum of negative weights would count "
            "against what many samples agree on.")  # fmt: skip
    return _heaviest(_totals(answers, weights))


def shortest_majority_vote(answers: Sequence[A | None], lengths: Sequence[float]) -> A | None:
    """The answer with many samples that are short: a count over the logarithm of a mean length.

        w_a = c_a / ln l_a

    The penalty is mild (ln 3000 = 8.0, ln 6000 = 8.7), so it decides where counts are close.

    Args:
        answers: of the samples.
        lengths: tokens of each sample, its reasoning included.

    Raises:
        InputError: another number of lengths, or an answered sample of at most one token, whose
            logarithm is not positive.

    Example:
        >>> shortest_majority_vote(["7", "7", "8", "8"], [6000, 6000, 3000, 3200])
        '8'

    Reference: Zeng et al., Revisiting the Test-Time Scaling of o1-like Models: Do they Truly Possess
    Test-Time Scaling Capabilities?, ACL 2025.
    """
    _paired(answers, lengths, "lengths")
    answered = [
        length for answer, length in zip(answers, lengths, strict=True) if answer is not None
    ]
    _refuse(answered, lambda n: 1 < n < math.inf, "lengths", "numbers above 1",
            "Count the tokens of the whole solution, not those of its answer.")  # fmt: skip
    return _heaviest(
        {
            answer: len(members) / math.log(math.fsum(lengths[i] for i in members) / len(members))
            for answer, members in _groups(answers).items()
        }
    )


def shortest_answer(answers: Sequence[A | None], lengths: Sequence[float]) -> A | None:
    """The answer of the shortest sample that has one; the control of `shortest_majority_vote`.

    Raises:
        InputError: another number of lengths, or one that is not finite.

    Example:
        >>> shortest_answer(["7", "7", "8", None], [6000, 6000, 3000, 10])
        '8'
    """
    _paired(answers, lengths, "lengths")
    _refuse(lengths, math.isfinite, "lengths", "finite numbers", "Count tokens.")
    answered = [i for i, answer in enumerate(answers) if answer is not None]
    return answers[min(answered, key=lambda i: lengths[i])] if answered else None


def hierarchical_vote(
    chains: Sequence[Sequence[A | None]], weights: Sequence[Sequence[float]]
) -> A | None:
    """A weighted vote inside each chain of revisions, then one across the winners of the chains.

    The winner of a chain enters the second vote with the weight that it won its chain with.

    Args:
        chains: the answers of each chain.
        weights: of these answers.

    Raises:
        InputError: chains and weights of different shapes, or a weight that is negative or not
            finite.

    Example:
        >>> hierarchical_vote([["7", "8", "8"], ["7", "9"]], [[0.5, 0.3, 0.4], [0.3, 0.1]])
        '8'

    Reference: Snell, Lee, Xu, Kumar, Scaling LLM Test-Time Compute Optimally can be More Effective
    than Scaling Model Parameters, ICLR 2025.
    """
    _paired(chains, weights, "chains of weights")
    winners = [weighted_vote(*chain) for chain in zip(chains, weights, strict=True)]
    won = [
        0.0 if winner is None else _totals(chain, own)[winner]
        for winner, chain, own in zip(winners, chains, weights, strict=True)
    ]
    return weighted_vote(winners, won)


def normalised(text: str) -> str:
    r"""An answer as a key: what stands in the last `\boxed{}`, numbers in one way of writing them.

    Blanks, dollar signs, a full stop at the end and the case of letters do not count.

    Example:
        >>> [normalised(text) for text in (r"so \boxed{1,200.0}", " $1200$. ", "Paris.", "3/6")]
        ['1200', '1200', 'paris', '1/2']
    """
    text = " ".join(_boxed(text).replace("$", " ").split())
    text = text.rstrip(".").strip().casefold()
    number = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).replace(" / ", "/")
    plain = re.fullmatch(r"[-+]?\d{1,99}(\.\d{1,99})?|[-+]?\d{1,99}/0*[1-9]\d{0,98}", number)
    return str(Fraction(number)) if plain else text


def _boxed(text: str) -> str:
    """What stands in the braces of the last box that is closed, else the text."""
    for start in reversed([found.end() for found in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return text


def _groups(answers: Sequence[A | None]) -> dict[A, list[int]]:
    """The samples of each answer, in the order in which answers were first seen."""
    found: dict[A, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            found.setdefault(answer, []).append(i)
    return found


def _totals(answers: Sequence[A | None], weights: Sequence[float]) -> dict[A, float]:
    # an exact sum does not depend on the order of the samples
    return {
        answer: math.fsum(weights[i] for i in members)
        for answer, members in _groups(answers).items()
    }


def _heaviest(weights: dict[A, float]) -> A | None:
    return max(weights, key=lambda answer: weights[answer], default=None)


def _paired(answers: Sequence[object], others: Sequence[object], name: str) -> None:
    if len(answers) != len(others):
        raise InputError(
            f"{len(answers)} answers and {len(others)} {name} were given; expected as many of both."
        )


def _refuse(
    values: Iterable[float], good: Callable[[float], bool], name: str, expected: str, mend: str
) -> None:
    bad = [value for value in values if not good(value)]
    if bad:
        raise InputError(f"{name} hold {bad[0]!r}; expected {expected}. {mend}")
