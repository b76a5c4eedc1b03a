"""Rel-U's claim: which classes are confused tells more than how sure the model is."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.guard.misclassification import MisclassificationNetwork, doctor, odin
from testtime.guard.relative_uncertainty import RelativeUncertainty
from testtime.measures.confidence import confidence
from testtime.measures.detection import auroc
from testtime.measures.entropy import entropy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Six classes in pairs, of which one is unsure and right, one sure and wrong half of the time, "
    "one surer and right: the AUROC of wrong samples by Rel-U is at least 80, by the largest "
    "probability at most 60 (percent)."
)
SAMPLES, EPOCHS = 3000, 100


@register("check", paper="relative-uncertainty", name="relative-uncertainty")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """AUROC of wrong samples by Rel-U and what it is compared with."""
    return reproduce(
        "relative-uncertainty", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """AUROC in percent."""
    chance = generator(seed, "relative-uncertainty")
    logits, labels = _answers(chance)
    rel_u = RelativeUncertainty.fit(logits, labels)
    network = MisclassificationNetwork.fit(logits, labels, epochs=EPOCHS, seed=seed)
    logits, labels = _answers(chance)
    wrong = logits.argmax(1) != labels
    for name, score in (
        ("Rel-U", rel_u.score(logits)),
        ("largest probability", -confidence(logits)),
        ("entropy", entropy(logits)),
        ("DOCTOR", doctor(logits)),
        ("ODIN, temperature 2", odin(logits, temperature=2.0)),
        ("MLP", network.score(logits)),
    ):
        yield name, 100 * float(auroc(score, wrong))


def _answers(chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits and labels: top probability by pair, the rest mostly on the other class of the pair."""
    pair = torch.randint(3, (SAMPLES,), generator=chance)
    answer = 2 * pair + torch.randint(2, (SAMPLES,), generator=chance)
    other = 4 * pair + 1 - answer
    low, high = torch.tensor([0.5, 0.7, 0.9])[pair], torch.tensor([0.7, 0.9, 0.99])[pair]
    top = low + (high - low) * torch.rand(SAMPLES, generator=chance)
    probs = ((1 - top) * 0.05 / 4)[:, None].expand(-1, 6).clone()
    probs.scatter_(1, answer[:, None], top[:, None])
    probs.scatter_(1, other[:, None], 0.95 * (1 - top)[:, None])
    wrong = (pair == 1) & (torch.rand(SAMPLES, generator=chance) < 0.5)
    return probs.log(), torch.where(wrong, other, answer)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["Rel-U"] >= 80 and found["largest probability"] <= 60
