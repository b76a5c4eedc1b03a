"""Compute-optimal scaling: search helps with hard questions, sampling with easy ones; choose."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.compute_optimal import cross_validate
from testtime.decode.search import Path, Step
from testtime.decode.strategies import beam_search, best_of_n
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "500 simulated questions of six steps that succeed with a chance of 0.95, 0.85, 0.72, 0.6 or 0.45 "
    "each; a step verifier with noise of 1.5 that 0.6 % of the steps deceive. With 16 samples the "
    "choice by predicted difficulty, cross-validated, is at least 3 points above the best single "
    "one of weighted best-of-N and beam searches of width 2 and 4."
)
LEVELS = 0.95, 0.85, 0.72, 0.6, 0.45
QUESTIONS = 500
STEPS = 6
SAMPLES = 16
PROBES = 2048
"""Solutions that a question's difficulty is estimated from (paper)."""
TRICK = 0.006


@register("check", paper="compute-optimal-scaling", name="compute-optimal-scaling")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Best-of-N, beam searches, and the choice among them."""
    return reproduce(
        "compute-optimal-scaling", CLAIM,
        measure=measure, holds=holds, seeds=seeds, on_progress=on_progress,
    )  # fmt: skip


class State(NamedTuple):
    """Of a solution so far: its answer (0 while it is right), and whether it deceives."""

    answer: int
    deceives: bool


class Question:
    """A generator of solutions and a verifier of steps, with one source of chance."""

    def __init__(self, success: float, chance: torch.Generator) -> None:
        self.success, self.chance = success, chance

    def extend(self, paths: Sequence[Path[State]]) -> list[Step[State]]:
        """A step: right, wrong in one of ten ways, or wrong and deceiving."""
        draws = torch.rand(len(paths), 3, generator=self.chance).tolist()
        made = []
        for path, (deceive, succeed, way) in zip(paths, draws, strict=True):
            before = path.steps[-1].content if path.steps else State(0, deceives=False)
            trick = deceive < TRICK
            fails = trick or succeed >= self.success
            answer = 1 + int(10 * way) if fails and before.answer == 0 else before.answer
            after = State(answer, before.deceives or trick)
            made.append(Step(after, final=len(path.steps) == STEPS - 1))
        return made

    def verify(self, paths: Sequence[Path[State]]) -> list[float]:
        """Probability of being right: the sigmoid of +1 or -1, or of +3 where deceived, and of noise."""
        ends = [path.steps[-1].content for path in paths]
        deceives = torch.tensor([end.deceives for end in ends])
        return self._scores(deceives, torch.tensor([end.answer == 0 for end in ends])).tolist()

    def probe(self, solutions: int) -> tuple[float, float]:
        """Mean score and share of right ones among solutions, as `extend` and `verify` make them."""
        deceive, succeed = torch.rand(2, solutions, STEPS, generator=self.chance)
        trick = deceive < TRICK
        right = ~(trick | (succeed >= self.success)).any(1)
        return float(self._scores(trick.any(1), right).mean()), float(right.double().mean())

    def _scores(self, deceives: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        logit = torch.where(deceives, 3.0, torch.where(right, 1.0, -1.0))
        return (logit + 1.5 * torch.randn(len(logit), generator=self.chance)).sigmoid()


def answer(path: Path[State]) -> int | None:
    """The answer of a solution."""
    return path.steps[-1].content.answer


STRATEGIES = {
    "best-of-N": best_of_n,
    "beams of width 2": partial(beam_search, width=2),
    "beams of width 4": partial(beam_search, width=4),
}


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent of every strategy alone, of the choice, and in the easiest level."""
    chance = generator(seed, "compute-optimal-scaling")
    questions = [Question(LEVELS[i % len(LEVELS)], chance) for i in range(QUESTIONS)]
    right = [
        [
            float(answer(search(q.extend, q.verify, samples=SAMPLES, answer=answer).best) == 0)
            for q in questions
        ]
        for search in STRATEGIES.values()
    ]
    probes = [q.probe(PROBES) for q in questions]
    easiness = {
        "predicted": [score for score, _ in probes], "oracle": [share for _, share in probes],
    }  # fmt: skip
    correct = torch.tensor(right)
    for name, values in easiness.items():
        found = cross_validate(torch.tensor(values), correct, list(STRATEGIES), seed=seed)
        if name == "predicted":
            for strategy, single in found.single.items():
                yield strategy, 100 * single
            hardest, easiest = (found.level == level for level in (0, int(found.level.max())))
            for strategy, row in zip(STRATEGIES, correct, strict=True):
                yield f"{strategy}, easiest level", 100 * float(row[easiest].mean())
                yield f"{strategy}, hardest level", 100 * float(row[hardest].mean())
        yield f"compute-optimal, {name} difficulty", 100 * found.accuracy


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    single = max(found[strategy] for strategy in STRATEGIES)
    return found["compute-optimal, predicted difficulty"] >= single + 3
