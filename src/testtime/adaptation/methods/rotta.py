"""RoTTA: robust test-time adaptation in dynamic scenarios.

layers with statistics use moving averages  m <- (1 - a) m + a m_t,  v <- (1 - a) v + a v_t
for each batch x:
    o = teacher(x)
    for each sample: offer it to the memory with its predicted class and uncertainty;
        after every 64th sample, on the memory X with ages A:
            t = teacher(X),  s = student(T(X)),  w_i = exp(-A_i) / (1 + exp(-A_i))
            student <- student - lr * d/dstudent mean_i w_i CE(softmax(t_i), s_i)
            teacher <- (1 - nu) teacher + nu student
    return o
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.parts.objective import teacher_cross_entropy
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.scope import batchnorm_affine
from testtime.adaptation.parts.statistics import RunningStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, cotta_view, needs_pixels
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step, Steps
from testtime.measures.entropy import entropy


class Item(NamedTuple):
    """A sample in memory: predicted class, uncertainty, when it came, and the image."""

    label: int
    uncertainty: float
    born: int
    image: Tensor


@dataclass(frozen=True, kw_only=True)
class BalancedMemory:
    """A bank of fresh and certain samples, balanced over predicted classes (CSTU).

    Args:
        capacity: samples in the bank; each class has a quota of capacity / C.
        every: samples of the stream between two updates.
        augment: what the student sees of the bank.
    """

    capacity: int
    every: int
    augment: Augment
    dense: ClassVar[bool] = False

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    @property
    def passes(self) -> tuple[float, float]:
        """Passes for each sample: its answer; teacher and student on the bank in every update."""
        return 1 + 2 * self.capacity / self.every, self.capacity / self.every

    def badness(self, item: Item, clock: int, classes: int) -> float:
        """1 / (1 + exp(-age / capacity)) + uncertainty / ln C: old and uncertain is bad."""
        age = (clock - item.born) / self.capacity
        return 1 / (1 + math.exp(-age)) + item.uncertainty / math.log(classes)

    def offer(self, items: list[Item], new: Item, *, classes: int) -> list[Item]:
        """The items after a new one was offered: appended, in place of a worse one, or dropped."""
        held = Counter(item.label for item in items)
        candidates = {new.label}
        if held[new.label] < self.capacity / classes:
            if len(items) < self.capacity:
                return [*items, new]
            most = max(held.values())
            candidates = {label for label, count in held.items() if count == most}
        worst, worst_badness = None, -math.inf
        for item in sorted(items, key=lambda item: item.label):
            if item.label in candidates:
                badness = self.badness(item, new.born, classes)
                if badness >= worst_badness:
                    worst, worst_badness = item, badness
        if worst is None:
            return [*items, new]
        if worst_badness > self.badness(new, new.born, classes):
            return [item for item in items if item is not worst] + [new]
        return items

    def held(self, memory: dict[str, Any]) -> Tensor | None:
        """What is remembered of the samples themselves."""
        return memory["images"]

    def step(self, engine: Engine, x: Tensor, state: State) -> Steps:
        """Answers with the teacher, fills the memory, and learns from it when that is due."""
        with torch.no_grad():
            seen = Evidence(engine, state, state.tensors, x, learn=False)
            output, logits = engine.answer(seen)
        yield output
        with torch.no_grad():
            joined, images = engine.ranks.gather(at_least_single(logits)), engine.ranks.gather(x)
            probs = joined.softmax(-1)
            uncertainty = -(probs * (probs + 1e-6).log()).sum(-1)
            columns = torch.stack([probs.argmax(-1).to(uncertainty), uncertainty]).tolist()
        items, clock = _unpack(state.memory)
        outcome = Outcome.STORED
        told: dict[str, Any] = {"used": 0}
        for image, label, doubt in zip(images, *columns, strict=True):
            if math.isfinite(doubt):  # a prediction that is no number would never leave the memory
                new = Item(int(label), doubt, clock, image)
                items = self.offer(items, new, classes=logits.shape[-1])
            clock += 1
            if clock % self.every == 0 and items:
                state, outcome, told = self._learn(engine, state, items, clock)
        told["entropy"] = entropy(logits).mean()
        return Step(output, logits, replace(state, memory=_pack(items, clock)), outcome, told)

    def _learn(
        self, engine: Engine, state: State, items: list[Item], clock: int
    ) -> tuple[State, Outcome, dict[str, Any]]:
        items = sorted(items, key=lambda item: item.label)
        bank = torch.stack([item.image for item in items])
        ages = torch.tensor([(clock - item.born) / self.capacity for item in items], device="cpu")
        changed = self.augment(bank, engine.generator)
        evidence = Evidence(
            engine, state, engine.leaves(state), bank,
            student_inputs=changed, ages=ages.to(bank.device),
        )  # fmt: skip
        _ = evidence.teacher
        return engine.learn(evidence)


def _pack(items: list[Item], clock: int) -> dict[str, Any]:
    return {
        "labels": [item.label for item in items],
        "uncertainty": [item.uncertainty for item in items],
        "born": [item.born for item in items],
        "images": torch.stack([item.image for item in items]) if items else None,
        "clock": clock,
    }


def _unpack(memory: dict[str, Any] | None) -> tuple[list[Item], int]:
    if memory is None:
        return [], 0
    images = memory["images"] if memory["labels"] else ()
    columns = (memory["labels"], memory["uncertainty"], memory["born"], images)
    return [Item(*row) for row in zip(*columns, strict=True)], memory["clock"]


def timeliness(ages: Tensor) -> Tensor:
    """exp(-A) / (1 + exp(-A)): fresh samples weigh 1/2, old ones less."""
    fresh = torch.exp(-ages)
    return fresh / (1 + fresh)


@register("method", paper="rotta")
def rotta(
    *,
    lr: float = 1e-3,
    alpha: float = 0.05,
    nu: float = 0.001,
    capacity: int = 64,
    every: int = 64,
    augment: Augment = cotta_view,
) -> Recipe:
    """Slow robust statistics, a balanced memory and a teacher, for streams of correlated labels.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs.

    Use when: consecutive samples share labels while the domain changes; also for batches of one.

    Not when: the network has no BatchNorm, images may not be kept in memory, or the gain must come
    with the first batches: it learns after every 64th sample, slowly.

    Args:
        lr: step size of Adam; 1e-3 (code).
        alpha: a, step of the normalisation statistics; 0.05 (code).
        nu: step of the teacher; 0.001 (code).
        capacity: N, samples in memory; 64 (code).
        every: samples of the stream between two updates; 64 (code).
        augment: T, what the student sees.

    Departure from the code: there a layer that fuses normalisation and activation, as timm's
    BatchNormAct2d does, is replaced by one without the activation; here it stays as it is.

    Example:
        >>> rotta().procedure.every
        64

    Reference: Yuan, Xie, Li, Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023.
    """
    whole(1, capacity=capacity, every=every)
    in_range(0, 1, alpha=alpha, nu=nu)
    return Recipe(
        scope=batchnorm_affine,
        statistics=RunningStatistics(momentum=alpha, unbiased=False, robust=True),
        objective=teacher_cross_entropy,
        selection=timeliness,
        procedure=BalancedMemory(capacity=capacity, every=every, augment=augment),
        teacher=MovingTeacher(momentum=1 - nu, whole=True),
        prediction=from_teacher,
        optimizer=Adam(lr=lr),
    )
