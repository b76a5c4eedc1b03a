"""Shortest majority vote: where wrong solutions are longer, short groups of answers win near-ties."""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.votes import majority_vote, shortest_answer, shortest_majority_vote
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "2000 simulated questions with an accuracy of Beta(2, 2.4) each, six wrong answers, log-lengths "
    "N(8.2, 0.5) of right and N(8.6, 0.5) of wrong solutions: shortest majority vote is more than 2 "
    "points above majority vote for 2, 4 and 8 samples; with equal lengths of both it is within 3 "
    "points of it."
)
QUESTIONS = 2000
SAMPLES = 2, 4, 8, 16


@register("check", paper="shortest-majority-vote", name="shortest-majority-vote")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Votes on simulated solutions."""
    return reproduce(
        "shortest-majority-vote", CLAIM,
        measure=measure, holds=holds, seeds=seeds, on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent of each vote, for each number of samples; right answers are 0."""
    chance = generator(seed, "shortest-majority-vote")
    most = max(SAMPLES)
    shape = torch.tensor([[2.0, 2.4]]).expand(QUESTIONS, 2)
    gamma = torch._standard_gamma(shape, generator=chance)  # Beta(a, b) = A / (A + B)
    accuracy = gamma[:, :1] / gamma.sum(1, keepdim=True)
    right = torch.rand(QUESTIONS, most, generator=chance) < accuracy
    wrong = torch.randint(1, 7, (QUESTIONS, most), generator=chance)
    answers = torch.where(right, 0, wrong).tolist()
    noise = 0.5 * torch.randn(QUESTIONS, most, generator=chance)
    for kind, longer in (("", 0.4), ("equal lengths, ", 0.0)):
        lengths = (8.2 + longer * ~right + noise).exp().tolist()
        for n in SAMPLES:
            cast = [(a[:n], own[:n]) for a, own in zip(answers, lengths, strict=True)]
            for name, won in {
                "majority": [majority_vote(a) for a, _ in cast],
                "shortest majority": [shortest_majority_vote(a, own) for a, own in cast],
                "shortest": [shortest_answer(a, own) for a, own in cast],
            }.items():
                yield f"{kind}{name} of {n}", 100 * won.count(0) / QUESTIONS


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    gain = {
        (kind, n): found[f"{kind}shortest majority of {n}"] - found[f"{kind}majority of {n}"]
        for kind in ("", "equal lengths, ")
        for n in (2, 4, 8)
    }
    return all(won > 2 if kind == "" else abs(won) <= 3 for (kind, _), won in gain.items())
