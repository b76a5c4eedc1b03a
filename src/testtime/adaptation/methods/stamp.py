"""STAMP: outlier-aware test-time adaptation with stable memory replay.

theta = scales and shifts of normalisation layers, the top of the network left out
for each batch x:
    p = mean_v softmax(f_theta(x_v)),  x_0 = x and V weakly changed copies
    return p, and H(p) as outlier score
    offer to the memory each i with H(p_i) < alpha ln C and argmax f_theta(x_i) = argmax f_source(x_i)
        while it is full: the oldest item of a class with the largest running count n_c makes room
    on the memory M, after n_c <- 0.9 n_c + 0.1 (items of class c):
        L = mean_M w_i H_i,  w_i = 64 exp(-H_i) / sum_M exp(-H_j)
        theta <- sharpness-aware step of SGD on L, its rate falling along a cosine
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.outputs import read_logits, rows, with_logits
from testtime.adaptation.parts.optimizer import SGD, CosineAnnealed, SharpnessAware
from testtime.adaptation.parts.scope import Scope, norm_affine_below_top
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.views import Augment, crop_and_flip, joined_copies, needs_pixels
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step, Steps
from testtime.measures.entropy import entropy
from testtime.measures.log_space import log_mean_prob, log_probs


def doubt(logits: Tensor) -> Tensor:
    """Entropy of the answer, -sum p ln(p + 1e-5): what keeps a sample out of the memory."""
    probs = at_least_single(logits).softmax(-1)
    return -(probs * (probs + 1e-5).log()).sum(-1)


@dataclass(frozen=True, kw_only=True)
class CertainFirst:
    """Entropy, times a weight that is larger for the sure; the weight has a gradient too.

    Args:
        total: sum of the weights.
    """

    total: float

    def __call__(self, entropies: Tensor) -> Tensor:
        return self.total * (-entropies).softmax(0) * entropies


@dataclass(frozen=True, kw_only=True)
class StableMemory:
    """Learns from a bank of samples that it trusts, never from the batch itself.

    Args:
        capacity: samples in the bank.
        margin: alpha; entropy below which a sample may enter, in units of ln C.
        agreement: whether the source model must see the same class.
        count: V, changed copies that the answer averages over, besides the batch.
        augment: makes a copy.
    """

    capacity: int
    margin: float
    agreement: bool
    count: int
    augment: Augment
    dense: ClassVar[bool] = False

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    def held(self, memory: dict[str, Any]) -> Tensor | None:
        """What is remembered of the samples themselves."""
        return memory["images"]

    def step(self, engine: Engine, x: Tensor, state: State) -> Steps:
        """Answers, fills the bank, and learns from it."""
        with torch.no_grad():
            seen = Evidence(engine, state, state.tensors, x)
            output, logits = self._answer(engine, seen)
        yield output
        with torch.no_grad():
            memory = self._remember(engine, seen, logits, state)
        outcome: Outcome = Outcome.NOTHING_RELIABLE
        told: dict[str, Any] = {"used": 0}
        if memory["labels"]:
            memory["counts"] = _refreshed(memory)
            replay = Evidence(engine, state, engine.leaves(state), memory["images"])
            state, outcome, told = engine.learn(replay)
        told["entropy"] = entropy(logits).mean()
        return Step(output, logits, replace(state, memory=memory), outcome, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The answer without a step."""
        return self._answer(engine, Evidence(engine, state, state.tensors, x))

    def _answer(self, engine: Engine, seen: Evidence) -> tuple[Any, Tensor]:
        if not self.count:
            return seen.output, seen.logits
        views = [log_probs(seen.logits)]
        for copies, count in joined_copies(engine, seen.inputs, self.augment, self.count):
            output, _ = engine.run(
                copies, seen.tensors, averages=seen.state.averages, learn=seen.learn, groups=count
            )
            views += log_probs(rows(read_logits(output))).split(len(seen.inputs))
        logits = log_mean_prob(torch.stack(views)).to(seen.logits.dtype)
        return with_logits(seen.output, logits), logits

    def _remember(
        self, engine: Engine, seen: Evidence, answers: Tensor, state: State
    ) -> dict[str, Any]:
        """The bank after the batch: labels and images in order of arrival, and running counts."""
        ranks = engine.ranks
        trusted = doubt(answers) < self.margin * math.log(seen.classes)
        labels = seen.logits.argmax(-1)
        if self.agreement and float(ranks.sum(trusted.sum().float())):
            trusted = trusted & (labels == seen.source.argmax(-1))
        joined, fit = ranks.gather(seen.inputs), ranks.gather(trusted).nonzero().flatten()
        old = state.memory or {"labels": [], "images": joined[:0], "counts": [0.0] * seen.classes}
        held = list(enumerate(old["labels"]))
        # drawn apart from the views, so that ranks whose batches differ in size draw alike
        chance = generator(engine.seed, "stamp", state.steps)
        for place, label in enumerate(ranks.gather(labels)[fit].tolist(), start=len(held)):
            if len(held) >= self.capacity:
                held.pop(makes_room([label for _, label in held], old["counts"], chance))
            held.append((place, label))
        bank = torch.cat([old["images"], joined[fit]])
        places = torch.tensor([place for place, _ in held], dtype=torch.long, device=bank.device)
        return {
            "labels": [label for _, label in held],
            "images": bank[places],
            "counts": old["counts"],
        }


def makes_room(labels: list[int], counts: list[float], chance: torch.Generator) -> int:
    """Which item goes: the oldest of a class drawn among those that have the largest count.

    Args:
        labels: of the items, in order of arrival.
        counts: running count of each class; only classes with an item take part.
        chance: draws between classes of equal count.

    Example:
        >>> makes_room([1, 0, 0, 1], [2.0, 1.0, 9.0], torch.Generator())
        1
    """
    present = sorted(set(labels))
    most = max(counts[label] for label in present)
    largest = [label for label in present if counts[label] == most]
    return labels.index(
        largest[int(torch.randint(len(largest), (), generator=chance, device="cpu"))]
    )


def _refreshed(memory: dict[str, Any]) -> list[float]:
    labels = memory["labels"]
    return [0.9 * old + 0.1 * labels.count(label) for label, old in enumerate(memory["counts"])]


@register("method", paper="stamp")
def stamp(
    *,
    lr: float = 0.1,
    margin: float = 0.25,
    agreement: bool = True,
    views: int = 15,
    augment: Augment = crop_and_flip,
    capacity: int = 64,
    rho: float = 0.05,
    period: int = 150,
    scope: Scope = norm_affine_below_top,
) -> Recipe:
    """Tells the unknown from the known, and learns from a balanced memory of the known alone.

    `adapter.events[-1].measured["outlier"]` scores each sample of the last batch: the entropy of
    its averaged prediction, high for things of no known class.

    Use when: the stream holds things of no known class, which are to be found out.

    Not when: answers must be quick, or images may not be kept in memory: it takes a forward for
    each of 16 views, one of the source model, and two forwards and backwards of the memory.

    Args:
        lr: step size of SGD at first; 0.1 for CIFAR-10-C, 0.05 for CIFAR-100-C, 0.01 for ImageNet-C
            (code).
        margin: alpha in units of ln C; 0.25, 0.9 and 0.8 for those (code).
        agreement: whether a sample must look the same to the source model to enter the memory; not
            for ImageNet (code).
        views: V, changed copies for the averaged prediction; 15 (code).
        augment: makes a copy; a crop and a mirror image. For CIFAR-10 the code takes CoTTA's
            transform: augment=cotta_view, for images in [0, 1].
        capacity: samples in memory, and the sum of their weights; 64 (code).
        rho: radius of the sharpness-aware step; 0.05 (code).
        period: steps until the rate is zero, from where it rises again; a reset begins anew; 150,
            750 for ImageNet (code).
        scope: which tensors may change; the code leaves out the top of the network.

    The memory is balanced by counts that are refreshed once a batch, when it is read, as in the
    code: within a batch all that leave it are of the classes that were largest before.

    Example:
        >>> stamp(lr=0.05, margin=0.9).procedure.capacity
        64

    Reference: Yu, Sheng, He, Liang, STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory
        Replay, ECCV 2024.
    """
    whole(0, views=views)
    whole(1, capacity=capacity)
    in_range(0, margin=margin)
    return Recipe(
        scope=scope,
        statistics=BatchStatistics(),
        objective=CertainFirst(total=capacity),
        procedure=StableMemory(
            capacity=capacity, margin=margin, agreement=agreement, count=views, augment=augment
        ),
        outlier=doubt,
        optimizer=SharpnessAware(base=CosineAnnealed(base=SGD(lr=lr), period=period), rho=rho),
    )
