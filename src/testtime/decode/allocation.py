"""Given a budget: which model, how many samples, how long. From recorded trials of each model.

for every model, number of samples N and longest answer L:
    accuracy <- mean over questions of coverage; a trial longer than L counts as wrong
    cost     <- mean over questions and trials of the kinetics cost of N answers of its length,
                cut at L
frontier     <- settings that no cheaper one equals
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from jaxtyping import Bool, Int
from torch import Tensor

from testtime._core.errors import InputError
from testtime.decode.kinetics import Cost, Shape, coverage, dense_cost


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What one model did: the same number of trials of each question.

    Attributes:
        model: its name.
        shape: what its cost depends on.
        prompts: (questions,) tokens of the prompts.
        lengths: (questions, trials) generated tokens.
        right: (questions, trials) whether the answer was right.
    """

    model: str
    shape: Shape
    prompts: Int[Tensor, "questions"]
    lengths: Int[Tensor, "questions trials"]
    right: Bool[Tensor, "questions trials"]

    def __post_init__(self) -> None:
        shapes = tuple(self.prompts.shape), tuple(self.lengths.shape), tuple(self.right.shape)
        if len(shapes[1]) != 2 or shapes[1] != shapes[2] or shapes[0] != shapes[1][:1]:
            raise InputError(
                f"prompts, lengths and right of {self.model} have the shapes {shapes}; expected "
                "(questions,), (questions, trials) and (questions, trials)."
            )
        if self.lengths.numel() == 0 or int(self.lengths.min()) < 1:
            raise InputError(f"{self.model} has no trials, or one without a token.")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to spend compute, and what it brings.

    Attributes:
        model: its name.
        samples: of each question.
        length: after which an answer is cut.
        cost: mean equivalent FLOPs of a question.
        accuracy: share of the questions with a right answer among the samples.
    """

    model: str
    samples: int
    length: int
    cost: float
    accuracy: float


def settings(
    trials: Trials,
    *,
    samples: Sequence[int],
    lengths: Sequence[int],
    cost: Callable[..., Cost] = dense_cost,
) -> list[Setting]:
    """Cost and accuracy of a model for every number of samples and every longest answer.

    Args:
        trials: of the model.
        samples: numbers to try, each at most the number of trials.
        lengths: longest answers to try.
        cost: called with the shape, `prompt`, `length` and `samples`; for sparse attention pass
            `functools.partial(top_k_cost, budget=1024)`.

    Raises:
        InputError: more samples than trials.

    Example:
        >>> import torch
        >>> from testtime.decode.kinetics import QWEN3
        >>> trials = Trials(
        ...     model="4B", shape=QWEN3["4B"], prompts=torch.tensor([100]),
        ...     lengths=torch.tensor([[500, 3000]]), right=torch.tensor([[True, False]]))
        >>> [each.accuracy for each in settings(trials, samples=(1, 2), lengths=(4000,))]
        [0.5, 1.0]

    Reference: Sadhukhan et al., Kinetics: Rethinking Test-Time Scaling Laws, 2025.
    """
    made = []
    count = trials.lengths.shape[1]
    for length in lengths:
        right = (trials.right & (trials.lengths <= length)).sum(1).tolist()
        cut = trials.lengths.clamp(max=length).tolist()
        for n in samples:
            spent = [
                cost(trials.shape, prompt=prompt, length=each, samples=n).total
                for prompt, row in zip(trials.prompts.tolist(), cut, strict=True)
                for each in row
            ]
            hit = fmean(coverage(k, count, n) for k in right)
            made.append(
                Setting(
                    model=trials.model, samples=n, length=length, cost=fmean(spent), accuracy=hit
                )
            )
    return made


def frontier(options: Iterable[Setting]) -> list[Setting]:
    """The settings that are better than all cheaper ones, from cheap to dear.

    Example:
        >>> def option(cost, accuracy):
        ...     return Setting(model="m", samples=1, length=1, cost=cost, accuracy=accuracy)
        >>> [each.cost for each in frontier([option(3, 0.5), option(1, 0.4), option(2, 0.3)])]
        [1, 3]
    """
    kept: list[Setting] = []
    for option in sorted(options, key=lambda each: (each.cost, -each.accuracy)):
        if not kept or option.accuracy > kept[-1].accuracy:
            kept.append(option)
    return kept


def best_within(budget: float, options: Iterable[Setting]) -> Setting:
    """The most accurate setting whose cost is within the budget; of equals the cheapest.

    Args:
        budget: equivalent FLOPs a question.
        options: of all models together.

    Raises:
        InputError: no setting is that cheap.

    Example:
        >>> def option(cost, accuracy):
        ...     return Setting(model="m", samples=1, length=1, cost=cost, accuracy=accuracy)
        >>> best_within(2.5, [option(3, 0.5), option(1, 0.4), option(2, 0.3)]).accuracy
        0.4
    """
    front = frontier(options)
    within = [each for each in front if each.cost <= budget]
    if not within:
        cheapest = f"the cheapest costs {front[0].cost:.3g}" if front else "none was given"
        raise InputError(
            f"no setting is within a budget of {budget:.3g} equivalent FLOPs; {cheapest}. Raise the "
            "budget, or measure smaller models, fewer samples or shorter answers."
        )
    return within[-1]
