"""Entropy tells wrong answers where knowledge is missing, and hardly where reasoning fails."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testtime._core.registry import register
from testtime._core.seeds import derive, generator
from testtime.decode.uncertainty import error_prediction
from testtime.measures.entropy import entropy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Ten answers. Knowledge: 400 facts, mentioned none to six times, one mention in five wrong. "
    "Reasoning: the last digit of sums, learnt with one and two terms, asked with three to six. "
    "AUROC of the entropy for wrong answers is more than 0.1 higher for knowledge, and between 0.42 "
    "and 0.60 for reasoning."
)
FACTS = 400
ASKED = 2000
EPOCHS = 300


@register("check", paper="llm-uncertainty", name="llm-uncertainty")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Small networks that know facts, and that add."""
    return reproduce(
        "llm-uncertainty", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """AUROC of the entropy, and the share of wrong answers in percent."""
    chance = generator(seed, "llm-uncertainty")
    parts = {"knowledge": knowledge(seed, chance), "reasoning": reasoning(seed, chance)}
    logits = torch.cat([logits for logits, _ in parts.values()])
    labels = torch.cat([labels for _, labels in parts.values()])
    groups = [name for name, (_, labels) in parts.items() for _ in labels]
    worth = error_prediction(entropy(logits), logits.argmax(1) != labels, groups)
    for name in parts:
        yield f"AUROC, {name}", worth[name].auroc
        yield f"wrong, {name}", 100 * worth[name].wrong / worth[name].questions


def knowledge(seed: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits and truth of all facts, after learning their mentions."""
    truth = torch.randint(10, (FACTS,), generator=chance)
    mentioned = torch.randint(7, (FACTS,), generator=chance)
    fact = torch.arange(FACTS).repeat_interleave(mentioned)
    wrong = torch.rand(len(fact), generator=chance) < 0.2
    said = torch.where(wrong, torch.randint(10, (len(fact),), generator=chance), truth[fact])
    model = seeded(seed, lambda: nn.Sequential(nn.Embedding(FACTS, 16), nn.Linear(16, 10)))
    learn(model, fact, said, epochs=60)
    return model(torch.arange(FACTS)).detach(), truth


def reasoning(seed: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits and truth of sums of three to six digits, after learning sums of one and two."""
    known = sums(ASKED, (1, 2), chance)
    model = seeded(seed, lambda: nn.Sequential(nn.Linear(66, 128), nn.ReLU(), nn.Linear(128, 10)))
    learn(model, *known, epochs=EPOCHS)
    asked, truth = sums(ASKED, (3, 4, 5, 6), chance)
    return model(asked).detach(), truth


def sums(number: int, terms: Sequence[int], chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Six places with a digit or a blank, one-hot, and the last digit of the sum."""
    count = torch.tensor(terms)[torch.randint(len(terms), (number, 1), generator=chance)]
    digits = torch.randint(10, (number, 6), generator=chance)
    there = torch.arange(6) < count
    shown = F.one_hot(torch.where(there, digits, 10), 11).flatten(1).float()
    return shown, (digits * there).sum(1) % 10


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "llm-uncertainty", "weights"))
        return build()


def learn(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int) -> None:
    """Adam at 1e-2 on all samples at once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with torch.enable_grad():
        for _ in range(epochs):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    knows, reasons = found["AUROC, knowledge"], found["AUROC, reasoning"]
    return knows - reasons > 0.1 and 0.42 <= reasons <= 0.60
