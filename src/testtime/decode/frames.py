"""Test-time search for generators of sequences of frames: linear search and Tree-of-Frames.

    linear search             N whole sequences from N noises, one score each, the best
    Tree-of-Frames
        depth 0:              b_0 first units
        image-level step:     each unit in several versions; an early verifier keeps one of them
        depth d:              b_d children of every live path
        reward stage at d:    score live paths with the verifier of this stage;
                              keep those at or above the median ("pct"), or those that pass ("pf")
        at the end:           score whole paths, the best

Linear search of N sequences of T units costs N T units, the tree about N + T where it narrows early.
Nothing here knows of video: a unit is whatever the generator adds at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from testtime._core.errors import InputError, OptionError
from testtime._core.options import whole
from testtime.decode.search import Extend, Found, Path, Prune, Stage, Verify, score_of, tree_search
from testtime.decode.strategies import best_of_n

S = TypeVar("S")


@dataclass(frozen=True)
class Images:
    """The image-level step: versions of every unit, of which an early verifier keeps one.

    Attributes:
        verify: scores paths by their last unit, as far as it is made.
        versions: of each unit at each depth; after the last entry 1. The paper's code has
            (5, 2, 2, 2, 2).
    """

    verify: Verify[Any]
    versions: tuple[int, ...] = (5, 2, 2, 2, 2)


def linear_search(extend: Extend[S], verify: Verify[S], *, samples: int, units: int) -> Found[S]:
    """Random linear search: whole sequences, of which the verifier takes one.

    Args:
        extend: makes the next unit of each path.
        verify: scores whole sequences.
        samples: N.
        units: T, of a sequence that does not end before.

    Raises:
        OptionError: samples or units is no whole number of at least 1.

    Example:
        >>> from testtime.decode.search import Step
        >>> noise = iter([0.3, 0.9, 0.1, 0.2])
        >>> frame = lambda paths: [Step(next(noise)) for _ in paths]
        >>> bright = lambda paths: [sum(step.content for step in path.steps) for path in paths]
        >>> linear_search(frame, bright, samples=2, units=2).best.score
        1.1

    Reference: Liu et al., Video-T1: Test-Time Scaling for Video Generation, ICCV 2025.
    """
    return best_of_n(extend, verify, samples=samples, rounds=units)


def tree_of_frames(
    extend: Extend[S],
    verify: Verify[S],
    *,
    units: int,
    branches: Sequence[int] = (5,),
    stages: Mapping[int, Stage[S]] | None = None,
    images: Images | None = None,
) -> Found[S]:
    """Tree-of-Frames: branch early, prune early, and finish few.

    Args:
        extend: makes the next unit of each path.
        verify: scores whole sequences.
        units: T, of a sequence that does not end before; 16 in the paper's code.
        branches: children of each path at depth 0, 1, ...; after the last entry 1. (5,) in the
            paper's code.
        stages: depth -> its verifier and the rule that keeps some of the paths, such as
            `at_least_median` or `passing()`; the paper's code has stages at 4, 9 and 13, which ask
            for the static scene, the motion and the end state.
        images: the image-level step, if there is one.

    Raises:
        OptionError: units, a number of branches or of versions is no whole number of at least 1, or
            a stage lies beyond the last unit.

    Example:
        >>> from testtime.decode.search import Step
        >>> count = lambda paths: [Step(i) for i in range(len(paths))]
        >>> total = lambda paths: [sum(step.content for step in path.steps) for path in paths]
        >>> found = tree_of_frames(
        ...     count, total, units=3, branches=(4,), stages={0: (total, at_least_median)})
        >>> [step.content for step in found.best.steps], found.spent.steps
        ([3, 1, 1], 8)

    Reference: Liu et al., Video-T1, ICCV 2025.
    """
    whole(1, units=units, **{f"branches[{i}]": each for i, each in enumerate(branches)})
    versions = images.versions if images else ()
    whole(1, **{f"versions[{i}]": each for i, each in enumerate(versions)})
    stages = stages or {}
    beyond = [depth for depth in stages if depth not in range(units)]
    if beyond:
        raise OptionError(f"a stage lies at depth {beyond[0]}; expected 0 to {units - 1}.")

    def width(depth: int) -> int:
        return _at(branches, depth) * _at(versions, depth)

    def at(depth: int) -> list[Stage[S]]:
        early = images is not None and _at(versions, depth) > 1
        chosen = [(images.verify, best_version(versions[depth]))] if images and early else []
        return [*chosen, *([stages[depth]] if depth in stages else [])]

    return tree_search(extend, verify, branches=width, stages=at, depth=units)


def at_least_median(paths: Sequence[Path[S]]) -> list[Path[S]]:
    """Paths that score at or above the median of the scores ("pct" in the paper's code).

    Example:
        >>> [path.score for path in at_least_median([Path(score=s) for s in (0.1, 0.9, 0.5)])]
        [0.9, 0.5]
    """
    middle = median(map(score_of, paths))
    return [path for path in paths if score_of(path) >= middle]


def passing(*, perfect: float = 1.0) -> Prune[Any]:
    """A rule that keeps perfect paths; without any those above 0; without any the single best.

    This is "pf" in the paper's code, for scores made by `checklist`.

    Args:
        perfect: the score with every question answered by yes.

    Example:
        >>> [path.score for path in passing()([Path(score=s) for s in (-0.5, 0.2, 0.6)])]
        [0.2, 0.6]
    """

    def keep(paths: Sequence[Path[S]]) -> list[Path[S]]:
        return (
            [path for path in paths if score_of(path) >= perfect]
            or [path for path in paths if score_of(path) > 0]
            or [max(paths, key=score_of)]
        )

    return keep


def best_version(versions: int) -> Prune[Any]:
    """A rule that keeps the best of each run of newest siblings, `versions` at a time.

    Example:
        >>> made = [Path(score=s) for s in (0.1, 0.9, 0.5, 0.2)]
        >>> [path.score for path in best_version(2)(made)]
        [0.9, 0.5]
    """

    def keep(paths: Sequence[Path[S]]) -> list[Path[S]]:
        depth = max(len(path.steps) for path in paths)
        newest = [i for i, path in enumerate(paths) if len(path.steps) == depth]
        runs = [newest[i : i + versions] for i in range(0, len(newest), versions)]
        lost = set(newest) - {max(run, key=lambda i: score_of(paths[i])) for run in runs}
        return [path for i, path in enumerate(paths) if i not in lost]

    return keep


def checklist(answers: Sequence[bool], weights: Sequence[float] | None = None) -> float:
    """Yes and no as one score: the mean of weight times +1 or -1.

        ( 1 / n ) sum_i w_i a_i

    Args:
        answers: to yes/no questions about a path.
        weights: of the questions; None takes 1 for each.

    Raises:
        InputError: no answers, or another number of weights.

    Example:
        >>> checklist([True, True, False, True])
        0.5

    Reference: Liu et al., Video-T1, ICCV 2025 (the scores of VisionReward).
    """
    weights = [1.0] * len(answers) if weights is None else weights
    if len(weights) != len(answers) or not answers:
        raise InputError(
            f"{len(answers)} answers and {len(weights)} weights; expected as many, at least one."
        )
    signed = [w if yes else -w for yes, w in zip(answers, weights, strict=True)]
    return sum(signed) / len(answers)


def _at(values: Sequence[int], depth: int) -> int:
    return values[depth] if depth < len(values) else 1
