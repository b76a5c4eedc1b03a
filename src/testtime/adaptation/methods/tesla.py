"""TeSLA: test-time self-learning with automatic adversarial augmentation.

layers with statistics use those of the batch; the teacher keeps moving averages of them
for each batch x:
    x_0 = x,  x_1 ... x_V = weak copies,  x_v one of them by chance
    policy, with selection logits w and sizes m of all combinations k of r operations:
        a_k(x_v) with k drawn alike for each image
        L_a = -H(teacher(a_k(x_v))) + lambda_1 mean over norm layers of (input(a_k(x_v)) - input(x_v))^2
        m <- step of Adam on mean L_a;   w <- step of Adam on mean L_a ln softmax(w)_k
        x_hard = a_k(x_v) with k drawn from softmax(w)
    t = mean_v softmax(teacher(x_v));  with a queue, its mean over the n nearest of the queue
    s = softmax(student(x_v)),  S = mean_i s_i
    L = mean_i [ -sum_c s_ic ln t_ic ] + sum_c S_c ln S_c + lambda_2 mean_i KL(t_i || student(x_hard_i))
    student <- one step on all but the classifier
    teacher <- mu teacher + (1 - mu) student
    return teacher(x), with its moving averages
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import OptionError
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.learning import as_leaves, finite
from testtime.adaptation.loan import features_of
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.parts.levels import shift, watched
from testtime.adaptation.parts.objective import Diversity
from testtime.adaptation.parts.operations import OPERATIONS, operate
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.scope import all_but_classifier
from testtime.adaptation.parts.statistics import RunningStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, weak_view
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures.entropy import cross_entropy, entropy, entropy_of_probs

POLICY = Adam(lr=0.1)
"""Moves selection logits and sizes; the rate is the code's."""


def flipped_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """-sum_c s_c ln t_c: the student weighs, the teacher, which gets no gradient, is in the log."""
    return cross_entropy(at_least_single(logits).softmax(-1), at_least_single(teacher.detach()))


@cache
def sub_policies(size: int) -> Tensor:
    """All combinations (S, size) of that many of the fourteen operations.

    Example:
        >>> len(sub_policies(2)), len(sub_policies(4))
        (91, 1001)
    """
    return torch.tensor(list(combinations(range(len(OPERATIONS)), size)), device="cpu")


def augmented(x: Tensor, which: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """Each image changed by its own operations, one after the other.

    Args:
        x: (B, C, H, W) in [0, 1].
        which: (B, r) numbers of operations.
        shares: (B, r) sizes as shares of their ranges.
        generator: draws the signs.
    """
    coins = torch.rand(which.shape, generator=generator, device=x.device, dtype=torch.float32)
    signs = torch.where(coins < 0.5, -1.0, 1.0).to(shares.dtype)
    changed = x.to(shares.dtype)
    for place in range(which.shape[1]):
        changed = operate(changed, which[:, place], shares[:, place], signs[:, place])
    return changed.to(x.dtype)


def remember(
    queue: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], size: int
) -> tuple[Tensor, Tensor]:
    """Features (K, d) and probabilities (K, C), of which the newest `size` of each class stay."""
    features, probs = (
        new if queue is None else (torch.cat(pair) for pair in zip(queue, new, strict=True))
    )
    labels = F.one_hot(probs.argmax(-1), probs.shape[-1])
    younger = labels.flip(0).cumsum(0).flip(0)  # of the same class, itself included
    kept = (younger * labels).sum(-1) <= size
    return features[kept], probs[kept]


def refined(features: Tensor, queue: tuple[Tensor, Tensor], neighbours: int) -> Tensor:
    """Mean probabilities (B, C) of the nearest of the queue, by cosine."""
    known, probs = queue
    likeness = F.normalize(features, dim=-1) @ F.normalize(known, dim=-1).T
    nearest = likeness.topk(min(neighbours, len(known)), dim=-1).indices
    return probs[nearest].mean(1)


class Said(NamedTuple):
    """What the teacher said of a view, and its moving averages before and after it."""

    logits: Tensor
    features: list[Tensor]
    before: Any
    after: Any


@dataclass(frozen=True, kw_only=True)
class AdversarialTeacher:
    """A student that learns from its teacher's views, and on images that are hard for the teacher.

    Args:
        count: V, weak copies.
        augment: makes one.
        operations: r, operations in a sub-policy.
        likeness: lambda_1, how close to the plain image's statistics hard images must stay.
        distillation: lambda_2, of the loss on hard images.
        queue: samples kept of each class; 0 keeps none.
        neighbours: n, that label a sample.
    """

    count: int
    augment: Augment
    operations: int
    likeness: float
    distillation: float
    queue: int
    neighbours: int
    dense: ClassVar[bool] = False
    pixels: ClassVar[bool] = True
    minimises: ClassVar[tuple[str, ...]] = ("objective", "batch_objective")

    @property
    def passes(self) -> tuple[float, float]:
        """Teacher: on all views, on hard images, and to answer; student: twice."""
        return self.count + 5.0, 3.0

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """Makes the policy harder, learns from views and hard images, and answers."""
        memory = state.memory or self._begin(x)
        views = [x] + [self.augment(x, engine.generator) for _ in range(self.count)]
        drawn = torch.randint(len(views), (1,), generator=engine.generator, device=x.device)
        place = int(engine.ranks.gather(drawn)[0])  # ranks run it together
        shown = views[place]
        said, policy, averages, sound = self._harden(engine, shown, state, memory)
        told: dict[str, Any] = {"used": len(x)}
        if not sound:
            return self._answer(engine, x, state, Outcome.NON_FINITE, told)
        hard = self._hard(engine, shown, policy)
        labels, queue, averages = self._label(engine, views, place, said, state, averages)
        leaves = engine.leaves(state)
        with torch.enable_grad():
            loss = self._loss(engine, shown, hard, labels, leaves)
        grads = engine.gradient(loss, leaves, samples=2 * len(x))
        told["loss"] = loss.detach()
        if not finite(loss, grads):
            return self._answer(engine, x, state, Outcome.NON_FINITE, told)
        recipe = engine.recipe
        assert recipe.optimizer is not None
        now, teacher = list(state.tensors.values()), state.teacher or {}
        moved, optimizer = recipe.optimizer.step(state.optimizer, now, grads)
        followed = recipe.teacher.follow(list(teacher.values()), moved)
        state = replace(
            state,
            tensors=dict(zip(state.tensors, moved, strict=True)),
            teacher=dict(zip(teacher, followed, strict=True)),
            optimizer=optimizer,
            teacher_averages=averages,
            memory={**policy, "queue": queue},
        )
        return self._answer(engine, x, state, Outcome.ADAPTED, told)

    def _begin(self, x: Tensor) -> dict[str, Any]:
        count = len(sub_policies(self.operations))
        single = torch.promote_types(x.dtype, torch.float32)
        start = [
            torch.zeros(count, device=x.device, dtype=single),
            torch.zeros(count, self.operations, device=x.device, dtype=single),
        ]
        return {
            "selection": start[0], "sizes": start[1], "optimizer": POLICY.init(start),
            "queue": None,
        }  # fmt: skip

    def _answer(
        self, engine: Engine, x: Tensor, state: State, outcome: Outcome, told: dict[str, Any]
    ) -> Step:
        with torch.no_grad():
            answering = Evidence(engine, state, state.tensors, x, learn=False)
            output, logits = engine.answer(answering)
        told["entropy"] = entropy(logits).mean()
        return Step(output, logits, state, outcome, told)

    def _teach(
        self,
        engine: Engine,
        x: Tensor,
        state: State,
        averages: Any,
        levels: list[Tensor] | None = None,
    ) -> Said:
        """What the teacher says of a view; `levels` takes what its normalisation is given."""
        features: list[Tensor] = []
        loan, layer = engine.loan, engine.feature_layer

        @contextmanager
        def tap() -> Iterator[None]:
            recording = loan.recording(layer, features) if self.queue else nullcontext()
            watching = nullcontext()
            if levels is not None:
                watching = watched(norm_layers(loan.model), levels)
            with watching, recording:
                yield

        teacher = state.teacher or {}
        output, after = engine.run(x, teacher, averages=averages, learn=True, tap=tap)
        logits = at_least_single(rows(read_logits(output)))
        return Said(logits, features, averages, after)

    def _harden(
        self, engine: Engine, shown: Tensor, state: State, memory: dict[str, Any]
    ) -> tuple[Said, dict[str, Any], Any, bool]:
        """What the teacher said of the view, the policy after a step, the teacher's averages, and
        whether the step was finite."""
        plain: list[Tensor] = []
        changed: list[Tensor] = []
        said = self._teach(engine, shown, state, state.teacher_averages, plain)
        which = sub_policies(self.operations).to(shown.device)
        drawn = torch.randint(
            len(which), (len(shown),), generator=engine.generator, device=shown.device
        )
        leaves = as_leaves({name: memory[name] for name in ("selection", "sizes")})
        with torch.enable_grad():
            shares = leaves["sizes"].sigmoid()[drawn]
            hard = augmented(shown, which[drawn], shares, engine.generator)
            strained = self._teach(engine, hard, state, said.after, changed)
            moved = shift(changed, plain, len(shown))
            losses = self.likeness * moved - entropy(strained.logits)
            scores = losses.detach() * leaves["selection"].log_softmax(0)[drawn]
            loss = engine.ranks.mean(losses + scores)
        grads = engine.gradient(loss, leaves, samples=len(shown))
        tensors = [tensor.detach() for tensor in leaves.values()]
        tensors, optimizer = POLICY.step(memory["optimizer"], tensors, grads)
        policy = {"selection": tensors[0], "sizes": tensors[1], "optimizer": optimizer}
        return said, policy, strained.after, finite(loss, grads)

    def _hard(self, engine: Engine, shown: Tensor, policy: dict[str, Any]) -> Tensor:
        """Images under sub-policies drawn from the learned distribution."""
        probs = policy["selection"].softmax(0)
        drawn = torch.multinomial(probs, len(shown), replacement=True, generator=engine.generator)
        which = sub_policies(self.operations).to(shown.device)[drawn]
        return augmented(shown, which, policy["sizes"].sigmoid()[drawn], engine.generator)

    def _label(
        self,
        engine: Engine,
        views: list[Tensor],
        place: int,
        said: Said,
        state: State,
        averages: Any,
    ) -> tuple[Tensor, list[Tensor] | None, Any]:
        """Soft labels (B, C), the queue with the batch in it, and the teacher's averages.

        What the teacher said of the view at `place` holds: it moves them again without a forward.
        """
        statistics = engine.recipe.statistics
        heard: list[Said] = []
        for number in reversed(range(len(views))):  # so that the plain batch counts most in them
            if number != place:
                heard.append(self._teach(engine, views[number], state, averages))
                averages = heard[-1].after
                continue
            heard.append(said)
            if isinstance(statistics, RunningStatistics):
                layers = engine.loan.named_modules
                averages = statistics.repeat(averages, said.before, said.after, layers=layers)
        labels = torch.stack([each.logits.softmax(-1) for each in heard]).mean(0)
        if not self.queue:
            return labels, None, averages
        of_sample = partial(features_of, engine.loan.model, samples=len(views[0]))
        seen = [at_least_single(of_sample(each.features)) for each in heard]
        features = torch.stack(seen).mean(0)
        gather = engine.ranks.gather
        queue = state.memory["queue"] if state.memory else None
        queue = remember(queue, (gather(features), gather(labels)), self.queue)
        return refined(features, queue, self.neighbours), list(queue), averages

    def _loss(
        self,
        engine: Engine,
        shown: Tensor,
        hard: Tensor,
        labels: Tensor,
        leaves: dict[str, Tensor],
    ) -> Tensor:
        recipe, ranks = engine.recipe, engine.ranks
        plain, strained = (rows(read_logits(engine.run(each, leaves)[0])) for each in (shown, hard))
        log_labels = labels.clamp(min=torch.finfo(labels.dtype).tiny).log()
        distilled = cross_entropy(labels, strained) - entropy_of_probs(labels)
        terms = [part(plain, ranks) for part in recipe.batch_objectives]
        if recipe.objective is not None:
            terms.insert(0, ranks.mean(recipe.objective(plain, log_labels)))
        return sum(terms, start=self.distillation * ranks.mean(distilled))


@register("method", paper="tesla")
def tesla(
    *,
    lr: float = 1e-3,
    momentum: float = 0.99,
    views: int = 4,
    operations: int = 2,
    likeness: float = 1.0,
    distillation: float = 1.0,
    queue: int = 0,
    neighbours: int = 10,
    augment: Augment = weak_view,
) -> Recipe:
    """Learns from a calibrated teacher, and on images that a learned policy makes hard for it.

    Inputs are images in [0, 1], normalisation belongs in the model. All parameters but the
    classifier's adapt. The answer is the teacher's after the step, with moving averages of the
    statistics of all images that it was shown, each layer's moving by the momentum that it has.

    Use when: batches are large, calibration matters, and there is time for a few passes.

    Not when: answers must be quick, or batches are small: it takes nine forwards and three
    backwards, and normalises with the batch's statistics while it learns.

    Args:
        lr: step size of Adam; 1e-3 (code). For ImageNet-C and VisDA the code takes
            SGD(lr=1e-3, momentum=0.9).
        momentum: mu of the teacher; 0.99 for CIFAR, 0.9 for ImageNet-C and VisDA (code).
        views: V; 4 (code).
        operations: r; 2, and 4 for VisDA (code).
        likeness: lambda_1; 1 (code).
        distillation: lambda_2; 1 (code).
        queue: Q, samples of each class that refine the labels; 0 for CIFAR and ImageNet-C, 256 for
            VisDA (code).
        neighbours: n; 10 for VisDA (code).
        augment: makes a weak copy.

    As in the code, sub-policies are drawn alike while their distribution learns, rotations are by
    30 degrees (the range is published with equal ends), and the student learns on the view that was
    made hard. Departures: lambda_1 weighs the step on sizes as it weighs that on the selection; a
    queue never holds more than Q of a class; all kinds of normalisation layers count in lambda_1's
    term; weak copies are cropped without enlarging the image first.

    Example:
        >>> tesla(queue=256, operations=4).procedure.queue
        256

    Reference: Tomar et al., TeSLA: Test-Time Self-Learning With Automatic Adversarial
    Augmentation, CVPR 2023.
    """
    whole(1, views=views, operations=operations, neighbours=neighbours)
    whole(0, queue=queue)
    in_range(0, 1, momentum=momentum)
    in_range(0, likeness=likeness, distillation=distillation)
    if operations > len(OPERATIONS):
        raise OptionError(f"operations is {operations}; expected a whole number from 1 to 14")
    return Recipe(
        scope=all_but_classifier,
        statistics=RunningStatistics(momentum="own"),
        objective=flipped_cross_entropy,
        batch_objective=Diversity(weight=1.0),
        procedure=AdversarialTeacher(
            count=views,
            augment=augment,
            operations=operations,
            likeness=likeness,
            distillation=distillation,
            queue=queue,
            neighbours=neighbours,
        ),
        teacher=MovingTeacher(momentum=momentum),
        prediction=from_teacher,
        optimizer=Adam(lr=lr),
    )
