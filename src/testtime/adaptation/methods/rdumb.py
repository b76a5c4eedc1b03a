"""RDumb: ETA that goes back to the source every T batches.

for s = 0, 1, 2, ... and batch x:
    if s mod T = 0: restore the source, forget m and the optimizer
    one step of ETA
"""

from dataclasses import replace

from testtime._core.options import whole
from testtime._core.registry import register
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.recipe import Recipe


@register("method", paper="rdumb")
def rdumb(
    *,
    lr: float = 2.5e-4,
    momentum: float = 0.9,
    margin: float = 0.4,
    redundancy: float | None = 0.05,
    reset_every: int = 1000,
) -> Recipe:
    """ETA with a full reset to the source every `reset_every` batches: it cannot collapse for long.

    Use when: a stream has no end and may carry a method away.

    Not when: the stream is shorter than `reset_every` batches: then it is `eta`.

    Args:
        lr: as for `eta`; 2.5e-4 (code).
        momentum: as for `eta`.
        redundancy: d, as for `eta`; 0.05 (code), made for a thousand classes.
        margin: E0 in units of ln C; 0.4 (code; its first versions had ln(1000) / 2 - 1, 0.355 ln C).
        reset_every: T; 1000 (paper).

    Example:
        >>> rdumb(reset_every=48).reset_every
        48

    Reference: Press et al., RDumb, NeurIPS 2023.
    """
    whole(1, reset_every=reset_every)
    base = eta(lr=lr, momentum=momentum, margin=margin, redundancy=redundancy)
    return replace(base, reset_every=reset_every)
