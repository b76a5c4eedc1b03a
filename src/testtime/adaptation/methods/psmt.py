"""PSMT: parameter-selective mean teacher.

before: F = Fisher information of source data, as EATA
for each batch x:
    t = teacher(x), the mean over N copies teacher(T(x)) if mean_i max softmax(source(x_i)) < p_th
    s = student(x),  s' = student(T(x))
    L = mean_i 1/2 SCE(s_i, t_i) + 1/2 SCE(s'_i, t_i) + beta sum_j F_j (theta_j - source_j)^2
    G_j = (dL/dtheta_j)^2,  M_j = [G_j < delta-quantile of G]
    student <- one step against the gradient
    teacher <- m teacher + (1 - m) student
    student_j <- source_j                                      where M_j
    teacher_j <- student_j where M_j,  else m teacher_j + (1 - m) student_j
    return t + s
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime.adaptation.parts.objective import agreement_with_teacher
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.prediction import student_and_teacher
from testtime.adaptation.parts.preservation import FisherPenalty, LeastImportant, put_back
from testtime.adaptation.parts.scope import weights_and_biases
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, AveragedViews, cotta_view
from testtime.adaptation.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class SelectiveTeacher:
    """The least important entries return to the source, the student's and then the teacher's.

    Args:
        chosen: which they are.
        teacher: how the teacher follows in all others, once more.
    """

    chosen: LeastImportant
    teacher: MovingTeacher

    def __call__(
        self,
        tensors: list[Tensor],
        source: list[Tensor],
        grads: list[Tensor],
        teacher: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        masks = self.chosen.masks(grads)
        student = put_back(tensors, source, masks)
        followed = self.teacher.follow(teacher, student)
        both = zip(masks, student, followed, strict=True)
        return student, [torch.where(mask, own, other) for mask, own, other in both]


@register("method", paper="psmt")
def psmt(
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    beta: float = 500.0,
    share: float = 0.03,
    threshold: float = 0.92,
    views: int = 32,
    augment: Augment = cotta_view,
) -> Recipe:
    """A mean teacher whose student keeps to what mattered, and forgets what does not matter now.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs.

    Use when: as `cotta`, domains come and go for a long time, and samples of the source data were
    at hand once.

    Not when: answers must be quick: it takes four forwards and two backwards, and 32 more forwards
    for batches whose source confidence is low; all weights adapt, and are held four times.

    Args:
        lr: step size of Adam; 1e-3 for CIFAR (code).
        momentum: m of the teacher; 0.999 (code).
        beta: weight of the Fisher penalty; 500 (code).
        share: delta, of the entries that return to the source; 0.03 (code).
        threshold: p_th; 0.92 for CIFAR-10, 0.72 for CIFAR-100 (code). 0 never averages views, 1
            always does.
        views: N; 32 (code).
        augment: T.

    Needs `source=tt.fit_source(model, loader, methods=["psmt"])`: the Fisher information of about
    10,000 source samples (code), without labels.

    Departures from the code: the code overwrites the changed copies with the plain batch, the
    paper does not; `psmt(augment=plain, views=1)` (from `adaptation.parts.views`) does as the code.

    Example:
        >>> psmt(share=0.1).restoration.chosen
        LeastImportant(share=0.1)

    Reference: Tian, Lyu, Parameter-Selective Continual Test-Time Adaptation, ACCV 2024.
    """
    whole(1, views=views)
    in_range(0, 1, momentum=momentum, share=share, threshold=threshold)
    in_range(0, beta=beta)
    teacher = MovingTeacher(momentum=momentum)
    return Recipe(
        scope=weights_and_biases,
        statistics=BatchStatistics(),
        objective=agreement_with_teacher,
        penalty=FisherPenalty(weight=beta),
        teacher=teacher,
        views=AveragedViews(count=views, threshold=threshold, augment=augment),
        augment=augment,
        restoration=SelectiveTeacher(chosen=LeastImportant(share=share), teacher=teacher),
        prediction=student_and_teacher,
        optimizer=Adam(lr=lr),
    )
