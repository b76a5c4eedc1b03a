"""ETA: EATA without its memory of the source; efficient entropy minimisation.

for each batch x:
    z = f_theta(x),   H_i = H(softmax(z_i))
    S = {i : H_i < E0 and |cos(m, p_i)| < d}
    m <- 0.9 m + 0.1 mean_S p_i
    theta <- theta - lr * d/dtheta mean_S exp(E0 - H_i) H_i          if S is not empty
    return z
"""

from testtime._core.registry import register
from testtime.adaptation.parts.objective import entropy
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.parts.selection import ReliableAndNew
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.recipe import Recipe


@register("method", paper="eata")
def eta(
    *,
    lr: float = 2.5e-4,
    momentum: float = 0.9,
    margin: float = 0.4,
    redundancy: float | None = None,
) -> Recipe:
    """Learns from samples that are reliable and not redundant, the surest counting most.

    Use when: as `tent`, on streams of thousands of batches where many samples are unsure or alike.

    Not when: the stream is short: at the published rate a few dozen batches hardly change the
    model.

    Args:
        lr: step size of SGD; 2.5e-4 for a ResNet-50 and batches of 64 (code).
        momentum: of SGD.
        margin: E0 in units of ln C; 0.4 (code).
        redundancy: d; 0.05 for ImageNet and 0.4 for CIFAR-10 (paper). None goes through both by
            the number of classes, see `redundancy_margin`.

    Example:
        >>> eta().selection
        ReliableAndNew(margin=0.4, redundancy=None)

    Reference: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022.
    """
    return Recipe(
        scope=norm_affine,
        statistics=BatchStatistics(),
        objective=entropy,
        selection=ReliableAndNew(margin=margin, redundancy=redundancy),
        optimizer=SGD(lr=lr, momentum=momentum),
    )
