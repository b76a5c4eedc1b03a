"""LERM: label-encoding risk minimisation.

theta = scales and shifts of normalisation layers, which use the statistics of the batch
for each batch x:
    P = softmax(f_theta(x)),  a_c = sum_n P_nc,  E = diag(1 / a) P^T P
    theta <- theta - lr * d/dtheta mean_cd |E_cd - [c = d]|
    return f_theta(x)
"""

from testtime._core.registry import register
from testtime.adaptation.parts.objective import LabelEncoding
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.recipe import Recipe
from testtime.measures.label_encoding import Distance


@register("method", paper="lerm")
def lerm(
    *,
    lr: float = 1e-3,
    distance: Distance = "absolute",
    steps: int = 1,
    episodic: bool = False,
) -> Recipe:
    """Makes predictions sure and diverse at once: the mean prediction of a class becomes its code.

    It is Tent with another loss, `parts.objective.LabelEncoding`, which other recipes can take as
    their `batch_objective`. To train with few labels there is
    `testtime.measures.label_encoding.semi_supervised_risk`.

    Use when: a shift lasts, and tent lets all answers fall into one class.

    Not when: batches hold far fewer samples than there are classes, or labels come sorted: the loss
    wants every class in every batch.

    Args:
        lr: step size of Adam; 1e-3, as Tent for CIFAR-10-C. The paper trains; it gives no rate for
            adaptation. With Adam the scale of the loss, which is small for many classes, is
            irrelevant.
        distance: of mean predictions from codes; absolute (the box), squared, or divergence, the
            mean of -ln E_cc (the code's for heterogeneous adaptation).
        steps: steps on each batch; the answer comes from the last forward, before its step.
        episodic: whether every batch begins at the source.

    Example:
        >>> lerm(lr=5e-3).optimizer.lr
        0.005

    Reference: Zhang, Yao, Chen et al., Rethinking Guidance Information to Utilize Unlabeled
        Samples: A Label Encoding Perspective, ICML 2024.
    """
    return Recipe(
        scope=norm_affine,
        statistics=BatchStatistics(),
        batch_objective=LabelEncoding(distance),
        optimizer=Adam(lr=lr),
        steps=steps,
        episodic=episodic,
    )
