"""DeYO: destroy your object.

for each batch x:
    z = f_theta(x),  S1 = {i : H_i < tau_ent}
    x' = x[S1] with its patches shuffled,  z' = f_theta(x')
    PLPD_i = p_i[c] - p'_i[c]   with c = argmax p_i
    S2 = {i in S1 : PLPD_i > tau_plpd}
    theta <- theta - lr * d/dtheta mean_S2 (exp(E0 - H_i) + exp(PLPD_i)) H_i
    return z
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime.adaptation.parts.objective import entropy
from testtime.adaptation.parts.optimizer import SGD, rate_for_batch
from testtime.adaptation.parts.scope import Scope, norm_affine_below_top
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ShapeMatters:
    """Samples of low entropy whose prediction falls when the object's shape is destroyed.

    Args:
        entropy_margin: tau_ent in units of ln C.
        drop_margin: tau_plpd, fall of the predicted class's probability.
        weight_margin: E0 in units of ln C.
        patches: tiles a side of the shuffled image.
    """

    entropy_margin: float
    drop_margin: float
    weight_margin: float
    patches: int
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        in_range(0, entropy_margin=self.entropy_margin, weight_margin=self.weight_margin)
        in_range(-1, 1, drop_margin=self.drop_margin)
        whole(1, patches=self.patches)

    def __call__(
        self,
        inputs: Tensor,
        logits: Tensor,
        entropies: Tensor,
        forward: Callable[[Tensor], Tensor],
        classes: int,
        generator: torch.Generator,
        ranks: Ranks,
    ) -> Tensor:
        logits, uncertainty = logits.detach(), entropies.detach()
        weights = torch.zeros_like(uncertainty)
        sure = (uncertainty < self.entropy_margin * math.log(classes)).nonzero().flatten()
        found = len(sure) if ranks.alone else float(ranks.sum(weights.new_tensor(len(sure))))
        if not found:
            return weights
        destroyed = shuffle_patches(inputs[sure], patches=self.patches, generator=generator)
        drop = probability_drop(logits[sure], forward(destroyed))
        # 1 / exp(-a), not exp(a): to the last bit the weights of the published code
        certain = 1 / (uncertainty[sure] - self.weight_margin * math.log(classes)).exp()
        weights[sure] = torch.where(drop > self.drop_margin, certain + 1 / (-drop).exp(), 0.0)
        return weights


def probability_drop(logits: Tensor, destroyed: Tensor) -> Tensor:
    """PLPD: how far the probability of the predicted class falls; in [-1, 1]."""
    before = at_least_single(logits).softmax(-1)
    after = at_least_single(destroyed).softmax(-1)
    predicted = before.argmax(-1, keepdim=True)
    return (before.gather(-1, predicted) - after.gather(-1, predicted))[..., 0]


def shuffle_patches(x: Tensor, *, patches: int, generator: torch.Generator) -> Tensor:
    """Cuts each image in patches x patches tiles and permutes them, each image its own way.

    Sides that do not divide are resized to a multiple, and back afterwards (bilinear, antialiased).
    """
    if x.dim() != 4 or min(x.shape[-2:]) < patches:
        raise InputError(
            f"deyo shuffles {patches} x {patches} patches of images (batch, channels, height, "
            f"width), each a pixel or more; given {tuple(x.shape)}. Use fewer patches, or eta."
        )
    count, channels, height, width = x.shape
    high, wide = height // patches, width // patches
    whole = (high * patches, wide * patches)
    tiles = _resize(x, whole).view(count, channels, patches, high, patches, wide)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(count, patches**2, channels, high, wide)
    draws = torch.rand(count, patches**2, generator=generator, device=x.device, dtype=torch.float32)
    order = draws.argsort(-1)
    tiles = tiles[torch.arange(count, device=x.device)[:, None], order]
    tiles = tiles.view(count, patches, patches, channels, high, wide).permute(0, 3, 1, 4, 2, 5)
    return _resize(tiles.reshape(count, channels, *whole), (height, width))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


@register("method", paper="deyo")
def deyo(
    *,
    lr: float = 2.5e-4,
    batch_size: int = 64,
    momentum: float = 0.9,
    entropy_margin: float = 0.5,
    drop_margin: float = 0.2,
    weight_margin: float = 0.4,
    patches: int = 4,
    scope: Scope = norm_affine_below_top,
) -> Recipe:
    """Learns from sure samples whose prediction depends on the object's shape.

    Use when: low entropy misleads: the model is sure for the wrong reason, such as the background.

    Not when: classes are not told apart by shape, or logits are dense.

    Args:
        lr: step size; 2.5e-4 for ResNets, 1e-3 * B / 64 for a ViT-B (code).
        batch_size: of the stream; below 32 the rate falls in proportion (code).
        momentum: of SGD.
        entropy_margin: tau_ent in units of ln C; 0.5 (code).
        drop_margin: tau_plpd; 0.2, and 0.3 for ImageNet-C with BatchNorm (code).
        weight_margin: E0 in units of ln C; 0.4 (code).
        patches: tiles a side; 4 (code).
        scope: which tensors may change; the code leaves out the top of the network.

    Example:
        >>> deyo().selection.patches
        4

    Reference: Lee et al., Entropy is not Enough for Test-Time Adaptation, ICLR 2024.
    """
    return Recipe(
        scope=scope,
        statistics=BatchStatistics(),
        objective=entropy,
        selection=ShapeMatters(
            entropy_margin=entropy_margin,
            drop_margin=drop_margin,
            weight_margin=weight_margin,
            patches=patches,
        ),
        optimizer=SGD(lr=rate_for_batch(lr, batch_size), momentum=momentum),
    )
