"""Tent: fully test-time adaptation by entropy minimisation.

theta = scales and shifts of normalisation layers, which use the statistics of the batch
for each batch x:
    z = f_theta(x)
    theta <- theta - lr * d/dtheta mean_i H(softmax(z_i))
    return z
"""

from testtime._core.registry import register
from testtime.adaptation.parts.objective import entropy
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.recipe import Recipe


@register("method", paper="tent")
def tent(*, lr: float = 1e-3, steps: int = 1, episodic: bool = False) -> Recipe:
    """Minimises the entropy of the model's own predictions through its normalisation layers.

    Use when: a shift lasts, and batches are large (64 or more) and hold many classes.

    Not when: batches are small, labels come sorted, or the stream is long and nobody resets: all
    answers can then fall into one class. `sar` and `rdumb` guard against that.

    Args:
        lr: step size of Adam; 1e-3 for CIFAR-10-C (code). For ImageNet the code of EATA uses
            `replace(tent(), optimizer=SGD(lr=2.5e-4, momentum=0.9))`.
        steps: steps on each batch; the answer comes from the last forward, before its step.
        episodic: whether every batch begins at the source.

    Example:
        >>> tent(lr=5e-3).optimizer.lr
        0.005

    Reference: Wang et al., Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021.
    """
    return Recipe(
        scope=norm_affine,
        statistics=BatchStatistics(),
        objective=entropy,
        optimizer=Adam(lr=lr),
        steps=steps,
        episodic=episodic,
    )
