"""VCoTTA: variational continual test-time adaptation.

weights of convolutions and linear layers are Gaussians  q = N(mu, softplus(rho)^2),  source q_s
for each batch x, with the teacher's and the source's logits taken at their means:
    o_t, o_s = for each sample their mean over x and those of N copies T(x) for which max p exceeds
               that for x by a margin
    u_t, u_s = mean of exp(p) p over x and all copies, samples and classes
    (w_t, w_s) = softmax( (u_t, u_s) / temperature ),   o = w_t o_t + w_s o_s
    r ~ U(0, 1),  mix(a) = r a + (1 - r) a in another order
    s = student(mix(x)) with weights drawn from q
    L = mean_i SCE(s_i, mix(o)_i) + beta ( w_t KL(q || q_t) + w_s KL(q || q_s) )
    student <- one step of Adam on mu, rho and all scales and shifts
    teacher <- m teacher + (1 - m) student
    return o
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.learning import as_leaves, finite
from testtime.adaptation.outputs import read_logits, rows, with_logits
from testtime.adaptation.parts.gaussians import (
    Gaussians,
    WarmUp,
    draw,
    flat,
    gaussian_names,
    kl_gaussians,
    pretrained,
    unflat,
)
from testtime.adaptation.parts.objective import symmetric_with_teacher
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.scope import weights_and_biases
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, cotta_view, joined_copies, needs_pixels
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step, Steps
from testtime.measures.entropy import entropy


def confident_views(logits: Tensor, margin: float) -> Tensor:
    """Mean logits (B, C) of the first view and those more confident than it by a margin.

    Args:
        logits: (views, B, C), the plain view first.
        margin: in probability.
    """
    top = logits.softmax(-1).amax(-1)
    kept = (top >= top[0] + margin).unsqueeze(-1)
    kept[0] = True
    return torch.where(kept, logits, 0.0).sum(0) / kept.sum(0)


def certainty(logits: Tensor) -> Tensor:
    """Mean of exp(p) p over views and classes, for each sample; 0 for one without an answer."""
    probs = logits.softmax(-1)
    return (probs.exp() * probs).mean((0, 2)).nan_to_num()


@dataclass(frozen=True, kw_only=True)
class VariationalTeacher:
    """A student of Gaussian weights between two priors: a moving teacher, and the source.

    Beside the adapted tensors, which are means, it keeps the rhos of student and teacher, and the
    optimizer's state for them.

    Args:
        count: N, copies that are looked at.
        margin: by which a copy's confidence must exceed that for the batch itself.
        temperature: of the choice between teacher and source.
        weight: beta, of the divergence from both.
        augment: T, makes a copy.
        warm_up: how the source's Gaussians were trained; None: they stand around its weights.
    """

    count: int
    margin: float
    temperature: float
    weight: float
    augment: Augment
    warm_up: WarmUp | None
    dense: ClassVar[bool] = False
    minimises: ClassVar[tuple[str, ...]] = ("objective",)

    @property
    def needs(self) -> tuple[WarmUp, ...]:
        """What must be known of source data."""
        return () if self.warm_up is None else (self.warm_up,)

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    @property
    def passes(self) -> tuple[float, float]:
        """Teacher and source on the batch and its copies, and the student; one backward."""
        return 2 * (self.count + 1) + 1.0, 1.0

    def step(self, engine: Engine, x: Tensor, state: State) -> Steps:
        """Answers with the mixture, and moves the student towards it."""
        source = self._source(engine)
        student, teacher, adam = self._posteriors(engine, state, source)
        output, answer, trust = self._opinions(engine, x, teacher, source)
        yield output
        told: dict[str, Any] = {"entropy": entropy(answer).mean(), "used": len(x)}
        told["trust"] = trust[0]
        leaves = as_leaves(flat(student))
        with torch.enable_grad():
            loss = self._loss(engine, x, answer, trust, unflat(leaves), teacher, source)
        grads = engine.gradient(loss, leaves, samples=len(x))
        told["loss"] = loss.detach()
        if not finite(loss, grads):
            return Step(output, answer, state, Outcome.NON_FINITE, told)
        optimizer, follow = engine.recipe.optimizer, engine.recipe.teacher.follow
        assert optimizer is not None
        means, rhos = list(student.means.values()), list(student.rhos.values())
        # Adam treats every entry alone, so two states are as good as one
        means, kept = optimizer.step(state.optimizer, means, grads[: len(means)])
        rhos, adam = optimizer.step(adam, rhos, grads[len(means) :])
        followed = follow(list(teacher.means.values()), means)
        teacher_rhos = follow(list(teacher.rhos.values()), rhos)
        memory = {
            "rhos": dict(zip(student.rhos, rhos, strict=True)),
            "teacher": dict(zip(student.rhos, teacher_rhos, strict=True)),
            "optimizer": adam,
        }
        state = replace(
            state,
            tensors=dict(zip(student.means, means, strict=True)),
            teacher=dict(zip(student.means, followed, strict=True)),
            optimizer=kept,
            memory=memory,
        )
        return Step(output, answer, state, Outcome.ADAPTED, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The mixture, without learning."""
        source = self._source(engine)
        _, teacher, _ = self._posteriors(engine, state, source)
        output, answer, _ = self._opinions(engine, x, teacher, source)
        return output, answer

    def _source(self, engine: Engine) -> Gaussians:
        if self.warm_up is None:
            return pretrained(engine)
        known = engine.known[self.warm_up.name]
        return Gaussians(
            {name: known[f"mean/{name}"] for name in engine.names},
            {name: known[f"rho/{name}"] for name in gaussian_names(engine)},
        )

    def _posteriors(
        self, engine: Engine, state: State, source: Gaussians
    ) -> tuple[Gaussians, Gaussians, dict[str, Any]]:
        """Student, teacher, and the optimizer's state for rhos; the source when a stream begins."""
        if state.memory is None:
            assert engine.recipe.optimizer is not None
            return source, source, engine.recipe.optimizer.init(list(source.rhos.values()))
        memory = state.memory
        student = Gaussians(state.tensors, memory["rhos"])
        return student, Gaussians(state.teacher or {}, memory["teacher"]), memory["optimizer"]

    def _opinions(
        self, engine: Engine, x: Tensor, teacher: Gaussians, source: Gaussians
    ) -> tuple[Any, Tensor, Tensor]:
        """The answer, as the model gives it and as logits, and the trust in teacher and source."""
        outputs: list[Any] = []
        seen: tuple[list[Tensor], list[Tensor]] = ([], [])
        with torch.no_grad():
            copies = joined_copies(engine, x, self.augment, self.count)
            for joined, count in ((x, 1), *copies):
                for own, posterior in zip(seen, (teacher, source), strict=True):
                    output, _ = engine.run(joined, posterior.means, groups=count)
                    outputs = outputs or [output]
                    own.extend(at_least_single(rows(read_logits(output))).split(len(x)))
            views = [torch.stack(own) for own in seen]
            certain = torch.stack([engine.ranks.mean(certainty(logits)) for logits in views])
            trust = (certain / self.temperature).softmax(0)
            answer = sum(
                w * confident_views(z, self.margin) for w, z in zip(trust, views, strict=True)
            )
            assert isinstance(answer, Tensor)
            return with_logits(outputs[0], answer), answer, trust

    def _loss(
        self,
        engine: Engine,
        x: Tensor,
        answer: Tensor,
        trust: Tensor,
        student: Gaussians,
        teacher: Gaussians,
        source: Gaussians,
    ) -> Tensor:
        generator = engine.generator
        share = torch.rand((), generator=generator, device=x.device, dtype=torch.float32)
        order = torch.randperm(len(x), generator=generator, device=x.device)
        mixed = (share * x + (1 - share) * x[order]).to(x.dtype)
        reference = share * answer + (1 - share) * answer[order]
        drawn = draw(student, generator)
        output, _ = engine.run(mixed, drawn)
        assert engine.recipe.objective is not None
        values = engine.recipe.objective(rows(read_logits(output)), reference)
        priors = trust[0] * kl_gaussians(student, teacher) + trust[1] * kl_gaussians(
            student, source
        )
        return engine.ranks.mean(values) + self.weight * priors


@register("method", paper="vcotta")
def vcotta(
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    views: int = 32,
    margin: float = 0.3,
    temperature: float = 8e-4,
    weight: float = 1 / 500_000,
    warm_up: int = 0,
    augment: Augment = cotta_view,
) -> Recipe:
    """Weights as Gaussians between two priors, the teacher's and the source's, by their certainty.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs. `export` gives the teacher at its means. With `warm_up` the source's Gaussians
    are trained first, which needs labelled source data:
    `source=tt.fit_source(model, loader, methods=vcotta(warm_up=5))`.

    Use when: domains come and go for a long time, calibration matters, and compute is at hand.

    Not when: answers must be quick: each batch is run 67 times; every weight is held four times
    beside the model, those of convolutions and linear layers eight times.

    Args:
        lr: step size of Adam; 1e-3 (code).
        momentum: m of the teacher; 0.999 (code).
        views: N; 32 (code).
        margin: by which a copy must be more confident; 0.3 (code).
        temperature: of the choice between teacher and source; 8e-4 (code), almost always a choice
            of one.
        weight: beta; 1/500000 (code).
        warm_up: passes over source data in which the Gaussians are trained; 0: they stand around
            the model's weights with rho = -4. The paper warms up, and says not how long; its code
            loads the result.
        augment: makes one copy.

    Departures from the code: what selects the copies cannot run there as published; it is written
    here as described. Class tokens and embeddings, which are neither weights nor biases by name,
    stay as they are there and here.

    Example:
        >>> vcotta(views=4).procedure.count
        4
        >>> vcotta(warm_up=2).needs
        (WarmUp(passes=2, lr=0.001, weight=2e-06),)

    Reference: Lyu et al., Variational Continual Test-Time Adaptation, 2024.
    """
    whole(0, warm_up=warm_up)
    whole(1, views=views)
    in_range(0, 1, momentum=momentum, margin=margin)
    in_range(0, weight=weight)
    in_range(1e-9, temperature=temperature)
    return Recipe(
        scope=weights_and_biases,
        statistics=BatchStatistics(),
        objective=symmetric_with_teacher,
        procedure=VariationalTeacher(
            count=views,
            margin=margin,
            temperature=temperature,
            weight=weight,
            augment=augment,
            warm_up=WarmUp(passes=warm_up) if warm_up else None,
        ),
        teacher=MovingTeacher(momentum=momentum),
        prediction=from_teacher,
        optimizer=Adam(lr=lr),
    )
