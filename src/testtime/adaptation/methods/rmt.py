"""RMT: robust mean teacher.

before: mu_c = mean feature of the source samples of class c
for each batch x:
    g, z = features and logits of student(x),  g', z' = those of student(T(x)),  t = teacher(x)
    m_i = the prototype mu_c that is nearest to g_i by cosine
    L = mean_i 1/2 SCE(z_i, t_i) + 1/2 SCE(z'_i, t_i)            self-training
        + contrast(h(m), h(g), h(g'))                            m_i, g_i, g'_i belong together
        + mean CE(student(x_s), y_s)                             with replay, of a source batch
    student, h <- one step against the gradient of L
    teacher <- m teacher + (1 - m) student
    return z + t
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime._core.seeds import generator as seeded
from testtime.adaptation.learning import as_leaves, gradients
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.parts.knowledge import Known, LabelledSamples, Prototypes, named, part_of
from testtime.adaptation.parts.objective import agreement_with_teacher, symmetric_cross_entropy
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.prediction import student_and_teacher
from testtime.adaptation.parts.scope import weights_and_biases
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, cotta_view
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe

if TYPE_CHECKING:
    from testtime.adaptation.fitting import SourceBatch


@dataclass(frozen=True, kw_only=True)
class WarmedUp:
    """Student and teacher after steps on source batches, on which they learn to agree.

    The rate rises linearly to the optimizer's.

    Args:
        steps: batches of the source data.
        optimizer: takes the steps.
        teacher: follows.
    """

    steps: int
    optimizer: Adam
    teacher: MovingTeacher
    name: ClassVar[str] = "warm-up"
    of_tensors: ClassVar[bool] = True

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """One step on a batch, while there are any left."""
        done = int(total.get("done", torch.zeros((), device="cpu")))
        if done == self.steps:
            return total
        engine = batch.engine
        now = engine.source_tensors(engine.names)
        student = part_of(total, "student") or now
        teacher = part_of(total, "teacher") or now
        moments = {"first": part_of(total, "first"), "second": part_of(total, "second")}
        state: dict[str, Any] = self.optimizer.init(list(student.values()))
        if done:
            state = {"steps": done} | {key: list(own.values()) for key, own in moments.items()}
        leaves = as_leaves(student)

        def run(tensors: Known) -> Tensor:
            output, _ = engine.run(batch.inputs, tensors)
            return rows(read_logits(output))

        answer = run(teacher)
        with torch.enable_grad():
            loss = symmetric_cross_entropy(run(leaves), answer).mean()
        grads = gradients(loss, leaves)
        rising = replace(self.optimizer, lr=self.optimizer.lr * (done + 1) / self.steps)
        moved, state = rising.step(state, list(student.values()), grads)
        followed = self.teacher.follow(list(teacher.values()), moved)
        held = {"student": moved, "teacher": followed, **{key: state[key] for key in moments}}
        total = {"done": torch.tensor(float(done + 1), device="cpu")}
        for key, own in held.items():
            total |= named(key, student, own)
        return total

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """Student and teacher."""
        if int(total["done"]) < self.steps:
            raise InputError(
                f"the warm-up takes {self.steps} batches of source data, and the loader gave "
                f"{batches}. Give more, e.g. several epochs, or a smaller warm_up."
            )
        keep = ("student ", "teacher ")
        return {name: tensor for name, tensor in total.items() if name.startswith(keep)}


@dataclass(frozen=True, kw_only=True)
class FromWarmUp:
    """Streams begin with the student and teacher of the warm-up.

    Args:
        warmed: the warm-up.
    """

    warmed: WarmedUp

    @property
    def needs(self) -> tuple[WarmedUp, ...]:
        """The warm-up's outcome."""
        return (self.warmed,)

    def __call__(self, known: Mapping[str, Known]) -> tuple[Known, Known]:
        found = known[self.warmed.name]
        return part_of(found, "student"), part_of(found, "teacher")


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Two linear layers, d to `width` to `width`, with a ReLU in between; they learn along.

    Args:
        width: of both layers.
    """

    width: int

    def init(
        self, seed: int, device: torch.device, known: Mapping[str, Known]
    ) -> dict[str, Tensor]:
        """Weights and biases, uniform as torch's linear layers have them."""
        means = known["prototypes"]["means"]
        random = seeded(seed, "rmt", "projector", device=device)
        tensors: dict[str, Tensor] = {}
        for layer, inside in (("first", means.shape[-1]), ("second", self.width)):
            for key, shape in (("weight", (self.width, inside)), ("bias", (self.width,))):
                draws = torch.rand(shape, generator=random, device=device, dtype=means.dtype)
                tensors[f"projector/{layer}.{key}"] = (2 * draws - 1) / inside**0.5
        return tensors


def project(features: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    """Features after the projector, of length one."""
    first, second = (
        [beside[f"projector/{layer}.{key}"].to(features.dtype) for key in ("weight", "bias")]
        for layer in ("first", "second")
    )
    return F.normalize(F.linear(F.linear(features, *first).relu(), *second), dim=-1)


def nearest_prototypes(features: Tensor, means: Tensor) -> Tensor:
    """For each feature the mean (of (K, d)) with the greatest cosine."""
    cosines = F.normalize(features.detach(), dim=-1) @ F.normalize(means, dim=-1).T
    return means[cosines.argmax(-1)]


def contrast(views: Tensor, *, temperature: float) -> Tensor:
    """Supervised contrastive loss of each of V views of B samples (V, B, p), of length one: (V B,).

        l_a = -mean over the other views b of a's sample  ln softmax_{c != a}(<a, c> / T)_b

    Reference: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020.
    """
    count, samples = views.shape[:2]
    flat = views.flatten(0, 1)
    likeness = flat @ flat.T / temperature
    itself = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    log_probs = likeness - likeness.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    same = torch.eye(samples, dtype=torch.bool, device=flat.device).repeat(count, count)
    return -log_probs.masked_fill(~same | itself, 0).sum(1) / (count - 1)


@dataclass(frozen=True, kw_only=True)
class PulledToPrototypes:
    """The contrastive loss of each sample with its prototype and its changed copy.

    With several processes each contrasts its own samples.

    Args:
        weight: of the loss.
        temperature: T.
    """

    weight: float
    temperature: float
    needs: ClassVar[tuple[Prototypes, ...]] = (Prototypes(),)

    def __post_init__(self) -> None:
        in_range(0, weight=self.weight)
        in_range(1e-6, temperature=self.temperature)

    def __call__(
        self,
        features: Tensor,
        augmented_features: Tensor,
        beside: Mapping[str, Tensor],
        known: Mapping[str, Known],
        ranks: Ranks,
    ) -> Tensor:
        plain, changed = at_least_single(features), at_least_single(augmented_features)
        means = nearest_prototypes(plain, known["prototypes"]["means"].to(plain.dtype))
        views = project(torch.stack([means, plain, changed]), beside)
        return self.weight * ranks.mean(contrast(views, temperature=self.temperature))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Cross-entropy on as many labelled source samples as the batch has, drawn anew.

    Args:
        weight: of the loss.
    """

    weight: float
    needs: ClassVar[tuple[LabelledSamples, ...]] = (LabelledSamples(),)

    def __post_init__(self) -> None:
        in_range(0, weight=self.weight)

    def __call__(
        self,
        inputs: Tensor,
        known: Mapping[str, Known],
        generator: torch.Generator,
        forward_with_gradient: Callable[[Tensor], Tensor],
        ranks: Ranks,
    ) -> Tensor:
        held = known["labelled samples"]
        order = torch.randperm(len(held["labels"]), generator=generator, device=inputs.device)
        drawn = order[: len(inputs)]
        logits = at_least_single(forward_with_gradient(held["inputs"][drawn]))
        losses = F.cross_entropy(logits, held["labels"][drawn], reduction="none")
        return self.weight * ranks.mean(losses)


@register("method", paper="rmt")
def rmt(
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    contrast: float = 1.0,
    temperature: float = 0.1,
    projection: int = 128,
    replay: float = 0.0,
    warm_up: int = 0,
    augment: Augment = cotta_view,
) -> Recipe:
    """A mean teacher with a symmetric loss, and features that are pulled to source prototypes.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs.

    Use when: domains change gradually or one after the other for a long time, and source data were
    at hand once. Three forwards and two backwards for a batch.

    Not when: all weights must not adapt, or the model has no linear layer whose input are features.

    Args:
        lr: step size of Adam; 1e-3 for CIFAR (code; ImageNet: SGD 0.01).
        momentum: m of the teacher; 0.999 (code).
        contrast: weight of the contrastive loss; 1 (code). 0 leaves it out.
        temperature: of the contrastive loss; 0.1 (code).
        projection: width of the projector h; 128 (code).
        replay: weight of the cross-entropy on labelled source samples, 1 in the code. 0, the
            default here, is the source-free variant: nothing of the source but prototypes is kept.
        warm_up: source batches on which student and teacher learn to agree beforehand; 50,000
            samples in the code (250 batches of 200), none by default here.
        augment: T.

    Needs `source=tt.fit_source(model, loader, methods=["rmt"])`: the mean feature of each class,
    by label where the loader gives labels, else by prediction. With `replay` or `warm_up` give the
    recipe itself, `methods=[recipe]`: the samples are kept with their labels for the former, and
    the loader must give as many batches as the latter asks for.

    Departures from the code: replay and warm-up are off by default; replayed samples are drawn
    anew for each batch, not in epochs; after a warm-up the optimizer starts afresh.

    Example:
        >>> rmt().needs
        (Prototypes(),)
        >>> sorted(need.name for need in rmt(replay=1.0, warm_up=250).needs)
        ['labelled samples', 'prototypes', 'warm-up']

    Reference: Döbler, Marsden, Yang, Robust Mean Teacher for Continual and Gradual Test-Time
    Adaptation, CVPR 2023.
    """
    in_range(0, contrast=contrast, replay=replay)
    whole(1, projection=projection)
    whole(0, warm_up=warm_up)
    optimizer, teacher = Adam(lr=lr), MovingTeacher(momentum=momentum)
    pull = PulledToPrototypes(weight=contrast, temperature=temperature) if contrast else None
    again = Replay(weight=replay) if replay else None
    warmed = WarmedUp(steps=warm_up, optimizer=optimizer, teacher=teacher) if warm_up else None
    return Recipe(
        scope=weights_and_biases,
        statistics=BatchStatistics(),
        objective=agreement_with_teacher,
        batch_objective=tuple(part for part in (pull, again) if part is not None) or None,
        teacher=teacher,
        augment=augment,
        beside=Projector(width=projection) if contrast else None,
        start=FromWarmUp(warmed=warmed) if warmed else None,
        prediction=student_and_teacher,
        optimizer=optimizer,
    )
