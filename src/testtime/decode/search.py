"""Search over partial solutions: best-of-N, beams, lookahead, revisions and frames are one loop.

    live <- one empty path
    for depth d = 0, 1, ...:
        extend every live path by b_d sampled steps                 (branches)
        (a path whose last step is final is live no more, but stays)
        a stage at d scores all paths and keeps some of them        (prune)
    score what is left; answer with the best of it, or with a vote

A generator (`Extend`) gets a batch of paths and gives one sampled step for each; a verifier
(`Verify`) gets a batch of paths and gives one score for each, higher for better. Both are plain
callables: a language model, an image generator or a table will do. What is spent is counted.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime.decode.votes import weighted_vote

S = TypeVar("S")


@dataclass(frozen=True)
class Step(Generic[S]):
    """What a generator adds to a path at once: a line of reasoning, a whole solution, a frame.

    Attributes:
        content: anything.
        tokens: that were generated for it.
        final: whether the path ends here.
    """

    content: S
    tokens: int = 1
    final: bool = False


@dataclass(frozen=True)
class Path(Generic[S]):
    """Steps so far, and the last score that a verifier gave (None: not scored as it stands)."""

    steps: tuple[Step[S], ...] = ()
    score: float | None = None

    @property
    def final(self) -> bool:
        """Whether the last step ends the path."""
        return bool(self.steps) and self.steps[-1].final

    @property
    def tokens(self) -> int:
        """Generated for all steps."""
        return sum(step.tokens for step in self.steps)

    def then(self, step: Step[S]) -> "Path[S]":
        """The path with one step more, not scored."""
        return Path((*self.steps, step))


Extend = Callable[[Sequence[Path[S]]], Sequence[Step[S]]]
Verify = Callable[[Sequence[Path[S]]], Sequence[float]]
Prune = Callable[[Sequence[Path[S]]], Sequence[Path[S]]]
Stage = tuple[Verify[S], Prune[S]]
"""Who scores the paths, and which of the scored ones stay."""
Answer = Callable[[Path[S]], Hashable | None]


@dataclass
class Spent:
    """What a search has spent.

    Attributes:
        steps: sampled steps (the unit of a budget where all steps cost the same).
        tokens: of these steps.
        calls: of the generator, each with a batch of paths.
        scores: paths that a verifier scored.
        verifier_calls: of verifiers, each with a batch of paths.
    """

    steps: int = 0
    tokens: int = 0
    calls: int = 0
    scores: int = 0
    verifier_calls: int = 0

    def extend(self, extend: Extend[S], paths: Sequence[Path[S]]) -> list[Path[S]]:
        """Each path with a further step, counted."""
        if not paths:
            return []
        steps = extend(paths)
        if len(steps) != len(paths):
            raise InputError(
                f"the generator gave {len(steps)} steps for {len(paths)} paths; expected one each."
            )
        self.calls += 1
        self.steps += len(steps)
        self.tokens += sum(step.tokens for step in steps)
        return [path.then(step) for path, step in zip(paths, steps, strict=True)]

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        )

    def verify(self, verify: Verify[S], paths: Sequence[Path[S]]) -> list[float]:
        """The score of each path, counted."""
        if not paths:
            return []
        scores = [float(score) for score in verify(paths)]
        if len(scores) != len(paths):
            raise InputError(
                f"the verifier gave {len(scores)} scores for {len(paths)} paths; expected one each."
            )
        unclear = sum(map(math.isnan, scores))
        if unclear:
            raise InputError(
                f"the verifier gave NaN for {unclear} of {len(scores)} paths; "
                "expected numbers. Give a path that cannot be judged the lowest score."
            )
        self.verifier_calls += 1
        self.scores += len(scores)
        return scores


@dataclass(frozen=True)
class Found(Generic[S]):
    """What a search came to.

    Attributes:
        best: the path to answer with.
        paths: all candidates that were left at the end, scored, in the order of sampling.
        spent: on the way.
    """

    best: Path[S]
    paths: tuple[Path[S], ...]
    spent: Spent


def tree_search(
    extend: Extend[S],
    verify: Verify[S],
    *,
    branches: Callable[[int], int],
    stages: Callable[[int], Sequence[Stage[S]]],
    depth: int,
    answer: Answer[S] | None = None,
) -> Found[S]:
    """The loop above, for searches of one's own.

    Args:
        extend: the generator.
        verify: scores the candidates at the end; those that the last stage scored with the same
            verifier keep their score.
        branches: depth -> steps that are sampled for each live path.
        stages: depth -> what happens to the paths there, in order; often nothing.
        depth: steps after which the search stops; a path may then be unfinished.
        answer: path -> its answer, for a vote weighted by scores; None takes the best score.

    Raises:
        InputError: the generator or the verifier gave another number of values than it was asked
            for, a score is NaN, or a rule kept nothing.
        OptionError: depth or a number of branches is no whole number of at least 1.

    Example:
        >>> deeper = lambda paths: [Step(content=i) for i in range(len(paths))]
        >>> total = lambda paths: [sum(step.content for step in path.steps) for path in paths]
        >>> found = tree_search(
        ...     deeper, total, branches=lambda d: 2, stages=lambda d: [], depth=3)
        >>> [step.content for step in found.best.steps], found.spent.steps
        ([1, 3, 7], 14)
    """
    whole(1, depth=depth)
    spent = Spent()
    pool: list[Path[S]] = [Path()]
    scored_by: Verify[S] | None = None
    for level in range(depth):
        if all(path.final for path in pool):
            break
        width = branches(level)
        whole(1, branches=width)
        pool = _grown(pool, extend, width, spent)
        for judge, keep in stages(level):
            pool = list(keep(_scored(pool, judge, spent, afresh=scored_by != judge)))
            scored_by = judge
            if not pool:
                raise InputError("the rule of a stage kept no path; expected at least one.")
    pool = _scored(pool, verify, spent, afresh=scored_by != verify)
    return Found(choose(pool, answer), tuple(pool), spent)


def choose(paths: Sequence[Path[S]], answer: Answer[S] | None = None) -> Path[S]:
    """The scored path to answer with.

    The highest score, or with `answer` the highest score among the paths whose answer wins the vote
    weighted by scores. Of equal scores the first; without any answer the highest score of all.

    Raises:
        InputError: no path, or for a vote a score that is negative.

    Example:
        >>> few = [Path((Step(n),), score) for n, score in ((7, 0.9), (8, 0.5), (8, 0.6))]
        >>> choose(few).score, choose(few, lambda path: path.steps[-1].content).score
        (0.9, 0.6)
    """
    if not paths:
        raise InputError("no path was given to choose from; expected at least one.")
    if answer is not None:
        answers = [answer(path) for path in paths]
        winner = weighted_vote(answers, [score_of(path) for path in paths])
        if winner is not None:
            paths = [path for path, own in zip(paths, answers, strict=True) if own == winner]
    return max(paths, key=score_of)


def score_of(path: Path[Any]) -> float:
    """The score of a path, or an `InputError` if it has none.

    Example:
        >>> score_of(Path(score=0.5))
        0.5
    """
    if path.score is None:
        raise InputError("a path without a score cannot be ranked; score all paths first.")
    return path.score


def keep_best(number: int) -> Prune[Any]:
    """A rule that keeps the paths with the highest scores, in their order; of ties the first.

    Example:
        >>> [path.score for path in keep_best(2)([Path(score=s) for s in (0.1, 0.9, 0.5)])]
        [0.9, 0.5]
    """
    whole(1, number=number)

    def keep(paths: Sequence[Path[S]]) -> list[Path[S]]:
        ranked = sorted(range(len(paths)), key=lambda i: -score_of(paths[i]))
        return [paths[i] for i in sorted(ranked[:number])]

    return keep


def _grown(pool: Sequence[Path[S]], extend: Extend[S], width: int, spent: Spent) -> list[Path[S]]:
    """The children of live paths, and finished paths as they are, in the order of the pool."""
    live = [path for path in pool if not path.final]
    children = iter(spent.extend(extend, [path for path in live for _ in range(width)]))
    return [
        each
        for path in pool
        for each in ([path] if path.final else [next(children) for _ in range(width)])
    ]


def _scored(
    paths: Sequence[Path[S]], verify: Verify[S], spent: Spent, *, afresh: bool
) -> list[Path[S]]:
    """All paths with a score, asking the verifier only for those that have none."""
    new = [i for i, path in enumerate(paths) if afresh or path.score is None]
    scores = dict(zip(new, spent.verify(verify, [paths[i] for i in new]), strict=True))
    return [replace(path, score=scores[i]) if i in scores else path for i, path in enumerate(paths)]
