"""Ways to spend a budget of N samples on one prompt.

    best-of-N       N solutions, no look at partial ones; answer by the verifier's weighted vote
    beam search     N first steps; keep the best N / M; M next steps from each; up to 40 rounds
    lookahead       as beam search, but a path is scored where k greedy steps would lead it
    revisions       N / n chains, each of n attempts that see up to 4 earlier ones of their chain;
                    a weighted vote inside each chain, then across the chains

All take callables (see `testtime.decode.search`), so that a toy and a real model share the code. A
verifier that scores steps is asked for the score of the last one. A finished path keeps its score
and its place among the beams for as long as it is among the best.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isqrt
from typing import TypeVar

from testtime._core.errors import OptionError
from testtime._core.options import whole
from testtime.decode.search import (
    Answer,
    Extend,
    Found,
    Path,
    Spent,
    Verify,
    choose,
    keep_best,
    tree_search,
)
from testtime.decode.votes import hierarchical_vote

S = TypeVar("S")
ROUNDS = 40
"""Steps after which a search stops (paper)."""
WINDOW = 4
"""Earlier attempts that a revision sees (paper)."""


def best_of_n(
    extend: Extend[S],
    verify: Verify[S],
    *,
    samples: int,
    answer: Answer[S] | None = None,
    rounds: int = ROUNDS,
) -> Found[S]:
    """Best-of-N: independent solutions, and the one that the verifier prefers.

    Args:
        extend: samples the next step of each path, or whole solutions as single final steps.
        verify: scores solutions, higher for better; probabilities where there is a vote.
        samples: N.
        answer: path -> its answer, for the weighted vote; None takes the best score.
        rounds: steps after which an unfinished solution is left as it is; 40 (paper).

    Raises:
        OptionError: samples or rounds is no whole number of at least 1.

    Example:
        >>> from testtime.decode.search import Step
        >>> rolls = iter([3, 5, 5, 6])
        >>> dice = lambda paths: [Step(next(rolls), final=True) for _ in paths]
        >>> sure = lambda paths: [path.steps[-1].content / 10 for path in paths]
        >>> best_of_n(dice, sure, samples=4, answer=lambda path: path.steps[-1].content).best.score
        0.5

    Reference: Snell, Lee, Xu, Kumar, Scaling LLM Test-Time Compute Optimally can be More Effective
    than Scaling Model Parameters, ICLR 2025.
    """
    whole(1, samples=samples)
    return tree_search(
        extend, verify, branches=lambda level: 1 if level else samples, stages=lambda _: (),
        depth=rounds, answer=answer,
    )  # fmt: skip


def beam_search(
    extend: Extend[S],
    verify: Verify[S],
    *,
    samples: int,
    width: int | None = None,
    answer: Answer[S] | None = None,
    rounds: int = ROUNDS,
) -> Found[S]:
    """Beam search against a step verifier: of N paths the best N / M live on, M children each.

    With M = 1 nothing is ever dropped: N independent samples.

    Args:
        extend: samples the next step of each path.
        verify: scores paths by their last step.
        samples: N, paths at a time.
        width: M, children of each beam; must divide N. The paper has 4 and the square root of N;
            None takes the root, or its next smaller divisor of N.
        answer: path -> its answer, for the weighted vote; None takes the best score.
        rounds: steps after which the search stops; 40 (paper).

    Raises:
        OptionError: samples, width or rounds is no whole number of at least 1, or width does not
            divide samples.

    Example:
        >>> from testtime.decode.search import Step
        >>> digits = lambda paths: [
        ...     Step(i % 4, final=len(path.steps) == 2) for i, path in enumerate(paths)]
        >>> value = lambda paths: [sum(step.content for step in path.steps) for path in paths]
        >>> found = beam_search(digits, value, samples=4, width=2)
        >>> [step.content for step in found.best.steps], found.spent.steps
        ([3, 3, 3], 12)

    Reference: Snell et al., ICLR 2025.
    """
    width = _width(samples, width)
    best = keep_best(samples // width)

    def keep(paths: Sequence[Path[S]]) -> Sequence[Path[S]]:
        return paths if all(path.final for path in paths) else best(paths)  # none left to grow

    return tree_search(
        extend, verify, branches=lambda level: width if level else samples,
        stages=lambda level: ((verify, keep),) if level < rounds - 1 else (), depth=rounds,
        answer=answer,
    )  # fmt: skip


def lookahead_search(
    extend: Extend[S],
    verify: Verify[S],
    *,
    greedy: Extend[S],
    samples: int,
    steps: int,
    width: int | None = None,
    answer: Answer[S] | None = None,
    rounds: int = ROUNDS,
) -> Found[S]:
    """Lookahead search: beams that are scored where k greedy steps would lead them.

    The greedy steps are forgotten after scoring, and counted: a round costs up to N (k + 1) steps.

    Args:
        extend: samples the next step of each path.
        verify: scores paths by their last step.
        greedy: gives the most probable next step of each path.
        samples: N, paths at a time.
        steps: k; with 0 it is beam search. The paper looks at 1 and 3.
        width: M, as in `beam_search`.
        answer: path -> its answer, for the weighted vote; None takes the best score.
        rounds: sampled steps after which the search stops; 40 (paper).

    Raises:
        OptionError: an option is no whole number in its range, or width does not divide samples.

    Example:
        >>> from testtime.decode.search import Step
        >>> last = lambda path: path.steps[-1].content if path.steps else 0
        >>> trap = lambda paths: [  # 3 looks good and leads to nothing
        ...     Step(0 if last(path) == 3 else i % 4, final=len(path.steps) == 2)
        ...     for i, path in enumerate(paths)]
        >>> most = lambda paths: [
        ...     Step(0 if last(path) == 3 else 2, final=len(path.steps) == 2) for path in paths]
        >>> value = lambda paths: [sum(step.content for step in path.steps) for path in paths]
        >>> found = lookahead_search(trap, value, greedy=most, samples=4, width=4, steps=1)
        >>> [step.content for step in found.best.steps], found.spent.steps
        ([2, 2, 3], 20)

    Reference: Snell et al., ICLR 2025.
    """
    whole(0, steps=steps)
    ahead = Spent()

    def foresee(paths: Sequence[Path[S]]) -> Sequence[float]:
        ends = list(paths)
        for _ in range(steps):
            live = [i for i, path in enumerate(ends) if not path.final]
            grown = ahead.extend(greedy, [ends[i] for i in live])
            for i, path in zip(live, grown, strict=True):
                ends[i] = path
        return verify(ends)

    found = beam_search(extend, foresee, samples=samples, width=width, answer=answer, rounds=rounds)
    return replace(found, spent=found.spent + ahead)


def revise(
    extend: Extend[S],
    verify: Verify[S],
    *,
    samples: int,
    sequential: int,
    answer: Answer[S] | None = None,
    window: int = WINDOW,
) -> Found[S]:
    """Sequential revision: chains of whole attempts, each made in sight of the ones before it.

    Args:
        extend: gets the latest attempts of each chain as the steps of a path, the newest last, and
            gives one more.
        verify: scores attempts, each as a path of one step.
        samples: N, attempts in all.
        sequential: attempts of one chain; must divide N. N / sequential chains run side by side,
            so 1 is plain sampling and N one chain.
        answer: path of one step -> its answer, for the hierarchical vote; None takes the best score.
        window: attempts that a revision sees; 4 (paper).

    Raises:
        InputError: the generator or the verifier gave another number of values than it was asked
            for, or with `answer` a negative score.
        OptionError: an option is no whole number of at least 1, or sequential does not divide
            samples.

    Example:
        >>> from testtime.decode.search import Step
        >>> better = lambda paths: [
        ...     Step(path.steps[-1].content + 1 if path.steps else 0) for path in paths]
        >>> value = lambda paths: [path.steps[-1].content for path in paths]
        >>> found = revise(better, value, samples=6, sequential=3)
        >>> [path.score for path in found.paths], found.spent.calls
        ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], 3)

    Reference: Snell et al., ICLR 2025.
    """
    whole(1, samples=samples, sequential=sequential, window=window)
    if samples % sequential:
        raise OptionError(
            f"sequential is {sequential}; expected a divisor of samples, which is {samples}."
        )
    spent = Spent()
    chains: list[Path[S]] = [Path()] * (samples // sequential)
    for _ in range(sequential):
        seen = [Path(chain.steps[-window:]) for chain in chains]
        latest = [path.steps[-1] for path in spent.extend(extend, seen)]
        chains = [chain.then(step) for chain, step in zip(chains, latest, strict=True)]
    attempts: list[Path[S]] = [Path((step,)) for chain in chains for step in chain.steps]
    scores = spent.verify(verify, attempts)
    attempts = [replace(each, score=score) for each, score in zip(attempts, scores, strict=True)]
    likely = attempts
    if answer is not None:
        answers = [answer(each) for each in attempts]
        cuts = [slice(i, i + sequential) for i in range(0, samples, sequential)]
        winner = hierarchical_vote([answers[cut] for cut in cuts], [scores[cut] for cut in cuts])
        if winner is not None:
            likely = [each for each, own in zip(attempts, answers, strict=True) if own == winner]
    return Found(choose(likely), tuple(attempts), spent)


def step_values(
    extend: Extend[S],
    paths: Sequence[Path[S]],
    right: Callable[[Path[S]], bool],
    *,
    rollouts: int = 16,
    rounds: int = ROUNDS,
) -> list[float]:
    """Monte-Carlo values of partial solutions: the share of their rollouts that end right.

    They are the soft labels of a process reward model, which learns them with binary cross-entropy.

    Args:
        extend: samples the next step of each path.
        paths: partial solutions; a final one is judged as it is.
        right: whether a path ends right.
        rollouts: from each path; 16 (paper).
        rounds: steps after which a rollout is left as it is; 40 (paper).

    Raises:
        OptionError: rollouts or rounds is no whole number of at least 1.

    Example:
        >>> from testtime.decode.search import Step
        >>> coin = lambda paths: [Step(i % 2, final=True) for i in range(len(paths))]
        >>> step_values(coin, [Path()], lambda path: path.steps[-1].content == 1, rollouts=4)
        [0.5]

    Reference: Wang et al., Math-Shepherd, ACL 2024; Snell et al., ICLR 2025.
    """
    whole(1, rollouts=rollouts, rounds=rounds)
    ends = [path for path in paths for _ in range(rollouts)]
    for _ in range(rounds):
        live = [i for i, path in enumerate(ends) if not path.final]
        for i, path in zip(live, Spent().extend(extend, [ends[i] for i in live]), strict=True):
            ends[i] = path
    hits = [bool(right(path)) for path in ends]
    return [sum(hits[i : i + rollouts]) / rollouts for i in range(0, len(hits), rollouts)]


def _width(samples: int, width: int | None) -> int:
    whole(1, samples=samples)
    if width is None:
        return next(m for m in range(isqrt(samples), 0, -1) if samples % m == 0)
    whole(1, width=width)
    if samples % width:
        raise OptionError(
            f"width is {width}; expected a divisor of samples, which is {samples}, so that "
            "samples / width beams with width children each are samples again."
        )
    return width
