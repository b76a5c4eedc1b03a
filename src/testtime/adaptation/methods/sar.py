"""SAR: sharpness-aware and reliable entropy minimisation.

theta = scales and shifts of normalisation layers, the top of the network left out
for each batch x:
    z = f_theta(x),  S1 = {i : H_i < E0},  g = d/dtheta mean_S1 H_i
    theta' = theta + rho g / ||g||
    S2 = {i in S1 : H'_i < E0},  L2 = mean_S2 H'_i   at theta'
    theta <- theta - lr * dL2/dtheta'                 (SGD with momentum)
    e <- 0.9 e + 0.1 L2;  if e < e_m: restore the source, forget e
    return z
"""

from testtime._core.registry import register
from testtime.adaptation.parts.objective import entropy
from testtime.adaptation.parts.optimizer import SGD, SharpnessAware, rate_for_batch
from testtime.adaptation.parts.preservation import Recovery
from testtime.adaptation.parts.scope import Scope, norm_affine_below_top
from testtime.adaptation.parts.selection import Reliable
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.recipe import Recipe


@register("method", paper="sar")
def sar(
    *,
    lr: float = 2.5e-4,
    batch_size: int = 64,
    momentum: float = 0.9,
    margin: float = 0.4,
    rho: float = 0.05,
    recover_below: float = 0.2,
    scope: Scope = norm_affine_below_top,
) -> Recipe:
    """Learns from reliable samples with a sharpness-aware step, and recovers from collapse.

    Use when: batches are small, labels come sorted or domains are mixed, above all with LayerNorm
    or GroupNorm.

    Not when: only one forward and one backward can be paid: it takes two of each. With few classes
    set `recover_below`, which is made for a thousand.

    Args:
        lr: step size; 2.5e-4 for a ResNet-50, 1e-3 * B / 64 for a ViT-B (code).
        batch_size: of the stream; below 32 the rate falls in proportion (code).
        momentum: of SGD.
        margin: E0 in units of ln C; 0.4 (code).
        rho: radius of the sharpness-aware step; 0.05 (code).
        recover_below: e_m in nats; 0.2 (code), made for 1000 classes: 0.029 * math.log(C).
        scope: which tensors may change; the paper leaves out the top of the network.

    Departures from the code: an empty S1 or S2 skips the step (there momentum still moves the
    weights), and a recovery forgets e (there the low value is kept, so that every batch recovers).

    Example:
        >>> sar(lr=0.1, batch_size=16).optimizer.base.lr
        0.05

    Reference: Niu et al., Towards Stable Test-Time Adaptation in Dynamic Wild World, ICLR 2023.
    """
    return Recipe(
        scope=scope,
        statistics=BatchStatistics(),
        objective=entropy,
        selection=Reliable(margin=margin),
        optimizer=SharpnessAware(
            base=SGD(lr=rate_for_batch(lr, batch_size), momentum=momentum), rho=rho
        ),
        recovery=Recovery(threshold=recover_below),
    )
