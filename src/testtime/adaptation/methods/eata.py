"""EATA: efficient test-time adaptation without forgetting.

F = mean over batches of source data of (d/dtheta mean_i CE(argmax z_i, z_i))^2
for each batch x:
    as ETA, with the loss  mean_S exp(E0 - H_i) H_i + beta sum_j F_j (theta_j - source_j)^2
"""

from dataclasses import replace

from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.parts.preservation import FisherPenalty
from testtime.adaptation.recipe import Recipe


@register("method", paper="eata")
def eata(
    *,
    lr: float = 2.5e-4,
    momentum: float = 0.9,
    margin: float = 0.4,
    redundancy: float | None = None,
    beta: float = 2000.0,
) -> Recipe:
    """ETA with a Fisher penalty that keeps the accuracy on source data.

    Use when: as `eta`, and the accuracy on data like the source has to last.

    Not when: no samples of the source data are at hand; then use `eta`.

    Args:
        lr: as for `eta`; 2.5e-4 (code).
        momentum: as for `eta`.
        margin: as for `eta`; 0.4 (code).
        redundancy: as for `eta`; None goes by the number of classes.
        beta: weight of the penalty; 2000 for ImageNet, 1 for CIFAR (code).

    Needs `source=tt.fit_source(model, loader, methods=["eata"])`: the Fisher information of about
    2000 source samples, without labels.

    Example:
        >>> eata().needs
        (Fisher(),)

    Reference: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022.
    """
    in_range(0, beta=beta)
    base = eta(lr=lr, momentum=momentum, margin=margin, redundancy=redundancy)
    return replace(base, penalty=FisherPenalty(weight=beta))
