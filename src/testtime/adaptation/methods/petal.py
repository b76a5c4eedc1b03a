"""PETAL: probabilistic lifelong test-time adaptation.

before: mu, v = mean and variance of the weights over a few more epochs of source training
for each batch x:
    s = student(x)
    t = teacher(x), the mean over N copies teacher(T(x)) if mean_i max softmax(source(x_i)) < p_th
    L = mean_i CE(softmax(t_i), s_i) + rho 1/2 sum_j (theta_j - mu_j)^2 / (v_j + 1e-6)
    G_j = (dL/dtheta_j)^2,  M_j = [G_j < delta-quantile of G]
    student <- one step against the gradient
    teacher <- m teacher + (1 - m) student
    student_j <- source_j  where M_j
    return t
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime.adaptation.learning import as_leaves, gradients
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.parts.knowledge import Known, named, part_of
from testtime.adaptation.parts.objective import symmetric_with_teacher, teacher_cross_entropy
from testtime.adaptation.parts.optimizer import SGD, Adam
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.preservation import (
    LeastImportant,
    SelectedRestoration,
    weighted_distance,
)
from testtime.adaptation.parts.scope import weights_and_biases
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, AveragedViews, cotta_view
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe

if TYPE_CHECKING:
    from testtime.adaptation.fitting import SourceBatch


@dataclass(frozen=True)
class Posterior:
    """Mean and variance of the weights over further epochs of training (SWAG-diagonal).

        g = d/dtheta mean CE(y, f_theta(x)) + 5e-4 theta,  d <- 0.9 d + g,  theta <- theta - lr d

    on a copy of the model, which normalises as in training and as the method will, with the
    statistics of the batch; the weights after each pass but the first count. By label where the
    loader gives labels, else by the source model's prediction.

    Args:
        passes: over the source data, at least two.
        lr: step size.

    Reference: Maddox et al., A Simple Baseline for Bayesian Uncertainty, NeurIPS 2019.
    """

    passes: int
    lr: float
    name: ClassVar[str] = "weight-posterior"
    of_tensors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole(2, passes=self.passes)
        in_range(0, lr=self.lr)

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """One training step."""
        engine = batch.engine
        now = part_of(total, "now") or engine.source_tensors(engine.names)
        directions = list(part_of(total, "direction").values()) or None
        labels = batch.labels_or_predictions
        leaves = as_leaves(now)
        with torch.enable_grad():
            output, _ = engine.loan.run(
                batch.inputs, leaves, engine.recipe.statistics, ranks=Ranks()
            )
            loss = F.cross_entropy(at_least_single(rows(read_logits(output))), labels)
            grads = gradients(loss, leaves)
        decayed = torch._foreach_add(grads, list(now.values()), alpha=5e-4)
        step = SGD(lr=self.lr, momentum=0.9).step
        moved, state = step({"direction": directions}, list(now.values()), list(decayed))
        kept = {k: v for k, v in total.items() if not k.startswith(("now ", "direction "))}
        return kept | named("now", now, moved) | named("direction", now, state["direction"])

    def turn(self, total: Known) -> Known:
        """Takes the weights after a pass into mean and spread, by Welford's updates."""
        turns = int(total.get("turns", torch.zeros((), device="cpu")))
        done = {"turns": torch.tensor(float(turns + 1), device="cpu")}
        if not turns:
            return total | done
        now, mean, spread = (part_of(total, key) for key in ("now", "mean", "spread"))
        for name, value in now.items():
            old = mean.get(name, value)
            mean[name] = old + (value - old) / turns
            spread[name] = spread.get(name, 0) + (value - old) * (value - mean[name])
        own = named("mean", mean, mean.values()) | named("spread", spread, spread.values())
        return total | done | own

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """`mean NAME` and `var NAME` of each tensor."""
        count = int(total["turns"]) - 1
        var = {f"var {name}": value / count for name, value in part_of(total, "spread").items()}
        mean = part_of(total, "mean")
        if not all(value.isfinite().all() for value in (*mean.values(), *var.values())):
            raise InputError(
                "training on the source data diverged, so there is no posterior. Give labels that "
                "fit the model's classes, or a lower rate: petal(source_lr=...)."
            )
        return named("mean", mean, mean.values()) | var


@dataclass(frozen=True, kw_only=True)
class PosteriorPenalty:
    """Distance from the posterior's mean in units of its deviation: weight/2 sum (t - mu)^2 / (v + e).

    Args:
        weight: rho.
        posterior: how mean and variance are found.
    """

    weight: float
    posterior: Posterior

    def __post_init__(self) -> None:
        in_range(0, weight=self.weight)

    @property
    def needs(self) -> tuple[Posterior, ...]:
        """The posterior."""
        return (self.posterior,)

    def __call__(
        self, tensors: Mapping[str, Tensor], known: Mapping[str, Mapping[str, Tensor]]
    ) -> Tensor:
        found = known[self.posterior.name]
        var = part_of(found, "var")
        precision = torch._foreach_reciprocal(torch._foreach_add(list(var.values()), 1e-6))
        weights = dict(zip(var, precision, strict=True))
        return 0.5 * self.weight * weighted_distance(tensors, part_of(found, "mean"), weights)


@register("method", paper="petal")
def petal(
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    rho: float = 1e-9,
    share: float = 0.03,
    threshold: float = 0.92,
    views: int = 32,
    symmetric: bool = False,
    passes: int = 5,
    source_lr: float = 1e-2,
    augment: Augment = cotta_view,
) -> Recipe:
    """CoTTA with a posterior of the source weights, returning the weights that matter least.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs.

    Use when: as `cotta`, and the probabilities matter as much as the answers; labelled source data
    were at hand once.

    Not when: answers must be quick: it takes three forwards, and 32 more for batches whose source
    confidence is low; all weights adapt, and are held five times.

    Args:
        lr: step size of Adam; 1e-3 for CIFAR (code; ImageNet: SGD 0.01).
        momentum: m of the teacher; 0.999 (code).
        rho: weight of the posterior; 1e-9 for CIFAR, 1e-11 for ImageNet (code). Weights that did
            not move in training are held by a million times that.
        share: delta, of the entries that return to the source; 0.03 for CIFAR, 0.003 for ImageNet
            (code).
        threshold: p_th; 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet (code). 0 never
            averages views, 1 always does.
        views: N; 32 (code).
        symmetric: whether the cross-entropy goes both ways, half and half, as for ImageNet (code).
        passes: over the source data, for the posterior; 5 (code).
        source_lr: step size there; 0.01, the rate that the code's schedule ends with.
        augment: T.

    PETAL-SRes, which returns random weights: `replace(petal(), restoration=
    StochasticRestoration(rate=0.01))`.

    Needs `source=tt.fit_source(model, loader, methods=["petal"])` with labels; the loader is read
    `passes` times, so give a list or a DataLoader. For dense logits these are (B, H, W), of the size
    of the logits, and views are those of `cotta`.

    Departures from the code: the views are made only when they are used; the further training
    normalises with the statistics of each batch, where the code leaves the model in eval mode
    (small networks run away so), and its rate is constant, where the code's rises to its value over
    three epochs; the source, where streams begin and weights return, is the model as given, in the
    code the posterior's mean (give a model that was averaged so for that).

    Example:
        >>> petal(passes=10).needs
        (Posterior(passes=10, lr=0.01),)

    Reference: Brahma, Rai, A Probabilistic Framework for Lifelong Test-Time Adaptation, CVPR 2023.
    """
    whole(1, views=views)
    in_range(0, 1, momentum=momentum, share=share, threshold=threshold)
    in_range(0, rho=rho)
    return Recipe(
        scope=weights_and_biases,
        statistics=BatchStatistics(),
        objective=symmetric_with_teacher if symmetric else teacher_cross_entropy,
        penalty=PosteriorPenalty(weight=rho, posterior=Posterior(passes=passes, lr=source_lr)),
        teacher=MovingTeacher(momentum=momentum),
        views=AveragedViews(count=views, threshold=threshold, augment=augment),
        restoration=SelectedRestoration(chosen=LeastImportant(share=share)),
        prediction=from_teacher,
        optimizer=Adam(lr=lr),
    )
