"""CoTTA: continual test-time domain adaptation.

for each batch x:
    s = student(x)
    t = mean of N teacher(T(x))  if mean_i max softmax(source(x_i)) < p_th,  else teacher(x)
    student <- student - lr * d/dstudent mean_i CE(softmax(t_i), s_i)
    teacher <- m teacher + (1 - m) student
    each weight of the student <- its source value, with probability p_r
    return t
"""

from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime.adaptation.parts.objective import teacher_cross_entropy
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.preservation import StochasticRestoration
from testtime.adaptation.parts.scope import weights_and_biases
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.teacher import MovingTeacher
from testtime.adaptation.parts.views import Augment, AveragedViews, cotta_view
from testtime.adaptation.recipe import Recipe


@register("method", paper="cotta")
def cotta(
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    restore: float = 0.01,
    threshold: float = 0.92,
    views: int = 32,
    augment: Augment = cotta_view,
) -> Recipe:
    """Adapts all weights to an averaged teacher, and returns single weights to the source.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs.

    Of dense logits each pixel is taken by itself, as in the paper's segmentation: where the source
    model's confidence in it is below `threshold`, the teacher's probabilities are averaged over the
    image at 0.5, 0.75, 1, 1.25, 1.5, 1.75 and 2 times its size, each plain and mirrored, brought
    back to its place. `views` and `augment` say nothing there. For Cityscapes to ACDC: `lr=7.5e-6,
    threshold=0.69` and single images (code, of a SegFormer).

    Use when: domains come and go for a long time, and compute and memory are at hand.

    Not when: answers must be quick: it takes three forwards, and 32 more for batches whose source
    confidence is low; all weights adapt, and are held three times. Nor where views are never
    averaged, with `threshold=0` or on batches that are surer than it from the first on: teacher and
    student then say the same, the gradient is zero, and what moves the weights is its rounding, of
    which Adam makes whole steps.

    Args:
        lr: step size of Adam; 1e-3 for CIFAR (code; ImageNet: SGD 0.01).
        momentum: m of the teacher; 0.999 (code).
        restore: p_r; 0.01 for CIFAR, 0.001 for ImageNet (code).
        threshold: p_th; 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet (code). 0 never
            averages views, 1 always does.
        views: N; 32 (code).
        augment: makes one view.

    Departures from the code: the views are made only when they are used, which changes no result
    but the random draws. That for segmentation teaches the teacher's surest class, where the paper,
    and this, teach its probabilities; scaled sides are rounded up to what divided them, at most 32.

    Example:
        >>> cotta(restore=0.0).restoration.rate
        0.0

    Reference: Wang et al., Continual Test-Time Domain Adaptation, CVPR 2022.
    """
    whole(1, views=views)
    in_range(0, 1, momentum=momentum, restore=restore, threshold=threshold)
    return Recipe(
        scope=weights_and_biases,
        statistics=BatchStatistics(),
        objective=teacher_cross_entropy,
        teacher=MovingTeacher(momentum=momentum, whole=True),
        views=AveragedViews(count=views, threshold=threshold, augment=augment),
        restoration=StochasticRestoration(rate=restore),
        prediction=from_teacher,
        optimizer=Adam(lr=lr),
    )
