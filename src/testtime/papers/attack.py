"""The attack of the small checks: projected gradient ascent on the cross-entropy."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def projected_gradient(
    answer: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    *,
    radius: float,
    rate: float,
    steps: int,
    random: torch.Generator,
) -> Tensor:
    """Images within `radius` of x in every pixel, and in [0, 1], that are answered wrongly.

        x' <- clip( x' + rate sign( d/dx' CE(answer(x'), label) ) ),   from a random start

    What the attack sees is what `answer` carries gradients through. Entries of the gradient that
    are not finite count as zero.

    Args:
        answer: gives logits (B, C) that carry a gradient to their input.
        x: images (B, ...) in [0, 1].
        labels: (B,), of which the attack leads away.
        radius: of the box.
        rate: size of a step.
        steps: number of steps.
        random: draws the start.

    Reference: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks,
        ICLR 2018.
    """
    noise = torch.rand(x.shape, generator=random, device=x.device, dtype=x.dtype)
    changed = (x + radius * (2 * noise - 1)).clamp(0, 1)
    for _ in range(steps):
        changed.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(answer(changed), labels, reduction="sum")
            (grad,) = torch.autograd.grad(loss, changed)
        moved = changed.detach() + rate * grad.nan_to_num(0.0, 0.0, 0.0).sign()
        changed = torch.minimum(torch.maximum(moved, x - radius), x + radius).clamp(0, 1)
    return changed.detach()
