"""How unsure an answer is, and whether that tells that it is wrong.

    entropy      H_t = -sum_v p_v ln p_v of the distribution that token t was drawn from, over the
                 whole vocabulary; over an answer of several tokens their mean
    judge        another model rates the question: how complex, needs knowledge, needs reasoning
    worth        AUROC of the score for wrong answers, in each group of at least 10 questions

The released notebooks feed the answer token as well and take the last position, which is the
entropy of the token after the answer; `after=True` gives that one.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import whole
from testtime.measures.detection import auroc, average_precision
from testtime.measures.entropy import entropy

LEVELS = {
    "school": 0.1, "high school": 0.3, "undergraduate": 0.5, "graduate": 0.7, "postgraduate": 0.9,
}  # fmt: skip
"""What a judge may call a question, and the middle of the band of 0.2 that this stands for."""
LEAST = 10
"""Questions that a group needs (code)."""


def answer_entropy(
    logits: Float[Tensor, "batch tokens vocabulary"],
    answer: Bool[Tensor, "batch tokens"],
    *,
    aggregate: Literal["mean", "max", "sum"] = "mean",
    after: bool = False,
) -> Float[Tensor, " batch"]:
    """Entropy of the distributions that the tokens of an answer were drawn from, in nats.

    Logits at position t are those for token t + 1, as causal models give them.

    Args:
        logits: (batch, tokens, vocabulary) of whole sequences, prompt and answer.
        answer: (batch, tokens) which tokens are the answer's; none may be a first token.
        aggregate: over the answer's tokens; the mean is the paper's for chains of thought.
        after: take the distributions after the answer's tokens instead, as the released code does.

    Raises:
        InputError: shapes that do not fit, a row without an answer, an answer that begins with the
            first token, which nothing predicts, or logits without a softmax.
        OptionError: an unknown aggregate.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]]])
        >>> answer_entropy(logits, torch.tensor([[False, True, False]]))
        tensor([0.6931])

    Reference: Sychev et al., When an LLM is apprehensive about its answers -- and when its
    uncertainty is justified, 2025.
    """
    check_tensors(logits=logits, answer=answer)
    if logits.ndim != 3 or answer.shape != logits.shape[:2] or answer.dtype != torch.bool:
        raise InputError(
            f"logits have the shape {tuple(logits.shape)} and answer is {answer.dtype} of the shape "
            f"{tuple(answer.shape)}; expected (batch, tokens, vocabulary) and bool (batch, tokens)."
        )
    if not bool(answer.any(1).all()) or (not after and bool(answer[:, 0].any())):
        raise InputError(
            "a row has no token of an answer, or its answer begins with the first token, which no "
            "distribution predicts. Put the prompt, or a token for the beginning, in front."
        )
    entropies = entropy(logits)
    own = answer if after else answer.roll(-1, 1)
    if bool(entropies[own].isnan().any()):
        raise InputError(
            "logits of an answer hold NaN, +inf, or a row of nothing but -inf; expected numbers. "
            "Check the model's weights and its precision."
        )
    if aggregate == "max":
        return entropies.masked_fill(~own, -math.inf).amax(1)
    total = entropies.masked_fill(~own, 0).sum(1)
    if aggregate == "sum":
        return total
    if aggregate == "mean":
        return total / own.sum(1)
    raise OptionError(f"aggregate is {aggregate!r}; expected 'mean', 'max' or 'sum'.")


@dataclass(frozen=True)
class Rating:
    """What a judge says of a question; None where its reply does not say it.

    Attributes:
        complexity: from 0 (school) to 1 (postgraduate).
        level: the same as one of `LEVELS`, mapped to the middle of its band.
        knowledge: whether it needs knowledge.
        reasoning: whether it needs reasoning.
        steps: how much of that: low, medium or high.
    """

    complexity: float | None = None
    level: float | None = None
    knowledge: bool | None = None
    reasoning: bool | None = None
    steps: str | None = None


def judge_prompt(question: str) -> str:
    """What a judge is asked about a question; `read_rating` reads its reply.

    Example:
        >>> print(judge_prompt("What is 2 + 2?").splitlines()[-1])
        Question: What is 2 + 2?
    """
    return (
        "Rate the question below; do not answer it. Reply with these five lines and nothing else:\n"
        "complexity: a number from 0 (school) to 1 (postgraduate)\n"
        f"level: one of {', '.join(LEVELS)}\n"
        "knowledge: yes or no, whether facts must be known\n"
        "reasoning: yes or no, whether facts must be combined\n"
        "steps: low, medium or high, how many steps of reasoning it takes\n\n"
        f"Question: {question}"
    )


def read_rating(reply: str) -> Rating:
    """The rating in a judge's reply; what it does not say, or says out of range, is None.

    Example:
        >>> read_rating("Complexity: 0.4\\nlevel: High school\\nknowledge: yes\\nreasoning: No.")
        Rating(complexity=0.4, level=0.3, knowledge=True, reasoning=False, steps=None)
    """

    def said(name: str) -> str:
        # a list, emphasis or quotes may stand around what is said
        line = rf"^[^\w\n]*{name}[\s*_]*:[\s*_'\"`]*(.*?)[\s*_'\"`.,;]*$"
        found = re.search(line, reply, re.IGNORECASE | re.MULTILINE)
        return found.group(1).casefold() if found else ""

    number = re.match(r"(\d*\.?\d+)(?![\w%/.])", said("complexity"))
    complexity = float(number.group(1)) if number and float(number.group(1)) <= 1 else None
    truth = {"yes": True, "no": False}
    steps = said("steps") if said("steps") in ("low", "medium", "high") else None
    return Rating(
        complexity, LEVELS.get(said("level")), truth.get(said("knowledge")),
        truth.get(said("reasoning")), steps,
    )  # fmt: skip


def judge(ask: Callable[[Sequence[str]], Sequence[str]], questions: Sequence[str]) -> list[Rating]:
    """Ratings of questions by a model that answers prompts.

    Args:
        ask: prompts -> replies.
        questions: with their options, if they have any.

    Raises:
        InputError: another number of replies than prompts.

    Example:
        >>> judge(lambda prompts: ["complexity: 0.9"] * len(prompts), ["Why?"])[0].complexity
        0.9

    Reference: Sychev et al., 2025 (MASJ).
    """
    replies = ask([judge_prompt(question) for question in questions])
    if len(replies) != len(questions):
        raise InputError(
            f"the judge gave {len(replies)} replies to {len(questions)} prompts; expected one each."
        )
    return [read_rating(reply) for reply in replies]


@dataclass(frozen=True)
class Worth:
    """How well a score tells wrong answers from right ones.

    Attributes:
        questions: in the group.
        wrong: of them.
        auroc: chance that a wrong answer scores higher than a right one; NaN without both.
        average_precision: of right answers, ranked from low scores up; NaN without both.
        gini: |2 AUROC - 1|, which does not say in which direction the score tells.
    """

    questions: int
    wrong: int
    auroc: float
    average_precision: float
    gini: float


def error_prediction(
    score: Float[Tensor, "n"],
    wrong: Bool[Tensor, "n"],
    groups: Sequence[str] | None = None,
    *,
    least: int = LEAST,
) -> dict[str, Worth]:
    """How well an uncertainty predicts errors, for all questions ("all") and for each group.

    Args:
        score: (n,) uncertainty, higher for less sure answers; only its order counts.
        wrong: (n,) whether the answer was wrong.
        groups: the topic of each question, or whether it needs reasoning.
        least: questions that a group needs to be listed; 10 (code).

    Raises:
        InputError: shapes that do not fit, NaN among the scores, or a group called "all".

    Example:
        >>> score = torch.tensor([0.1, 0.9, 0.8, 0.2])
        >>> wrong = torch.tensor([False, True, False, False])
        >>> error_prediction(score, wrong)["all"].auroc
        1.0

    Reference: Sychev et al., 2025.
    """
    whole(1, least=least)
    check_tensors(score=score, wrong=wrong)
    if score.ndim != 1 or score.shape != wrong.shape or wrong.dtype != torch.bool:
        raise InputError(
            f"score has the shape {tuple(score.shape)} and wrong is {wrong.dtype} of the shape "
            f"{tuple(wrong.shape)}; expected (n,) and bool (n,)."
        )
    if groups is not None and len(groups) != len(score):
        raise InputError(f"{len(groups)} groups for {len(score)} questions; expected one each.")
    if "all" in (groups or ()):
        raise InputError("a group is called 'all', as the whole is; expected another name.")
    found = {"all": _worth(score, wrong)}
    for group in dict.fromkeys(groups or ()):
        own = torch.tensor([each == group for each in groups or ()], device=score.device)
        if int(own.sum()) >= least:
            found[group] = _worth(score[own], wrong[own])
    return found


def _worth(score: Tensor, wrong: Tensor) -> Worth:
    count, errors = len(wrong), int(wrong.sum())
    if bool(score.isnan().any()):
        raise InputError("score holds NaN; leave these questions out, and say how many they were.")
    if errors in (0, count):
        return Worth(count, errors, math.nan, math.nan, math.nan)
    area = float(auroc(score.double(), wrong))
    return Worth(
        count, errors, area, float(average_precision(-score.double(), ~wrong)), abs(2 * area - 1)
    )
