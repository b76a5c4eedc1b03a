"""TeSLA: a teacher, and a policy of image changes that learns to be hard for it."""

import copy
import math
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from textbook.parts import BATCH_NORMS, NORMS, Step, View, follow


def warped(x: Tensor, place: tuple[int, int], size: Tensor) -> Tensor:
    """Resampled with one entry of the affine matrix changed."""
    change = torch.zeros(2, 3, dtype=x.dtype, device=x.device)
    change[place] = 1.0
    return resampled(
        x, torch.eye(2, 3, dtype=x.dtype, device=x.device) + size.view(-1, 1, 1) * change
    )


def resampled(x: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(matrices, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def turned(x: Tensor, size: Tensor) -> Tensor:
    cos, sin, zero = size.cos(), size.sin(), torch.zeros_like(size)
    return resampled(x, torch.stack([cos, sin, zero, -sin, cos, zero], 1).view(-1, 2, 3))


def blended(base: Tensor, x: Tensor, size: Tensor) -> Tensor:
    return base + size.view(-1, 1, 1, 1) * (x - base)


def greyed(x: Tensor, size: Tensor) -> Tensor:
    return blended(T.rgb_to_grayscale(x), x, size) if x.shape[1] == 3 else x


def sharpened(x: Tensor, size: Tensor) -> Tensor:
    kernel = torch.ones(3, 3, dtype=x.dtype, device=x.device)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(x.shape[1], 1, 3, 3)
    return blended(F.conv2d(F.pad(x, [1] * 4, "replicate"), kernel, groups=x.shape[1]), x, size)


def straight(changed: Tensor, *through: Tensor) -> Tensor:
    """With the gradient passed straight through to image, or size, or both."""
    for each in through:
        changed = changed + each - each.detach()
    return changed


def eight_bits(x: Tensor) -> Tensor:
    return (255 * x.detach()).to(torch.uint8)


def equalized(x: Tensor, size: Tensor) -> Tensor:
    return straight(T.equalize(eight_bits(x)).to(x.dtype) / 255, x, size.view(-1, 1, 1, 1))


def posterized(x: Tensor, size: Tensor) -> Tensor:
    images = zip(eight_bits(x), size.tolist(), strict=True)
    coarse = torch.stack([T.posterize(image, int(bits)) for image, bits in images])
    return straight(coarse.to(x.dtype) / 255, x, size.view(-1, 1, 1, 1))


def solarized(x: Tensor, size: Tensor) -> Tensor:
    size = size.view(-1, 1, 1, 1)
    return straight(torch.where(x < size, x, 1 - x), size, x)


CHANGES = [
    (lambda x, size: warped(x, (0, 1), size), -0.3, 0.3, True),  # shears
    (lambda x, size: warped(x, (1, 0), size), -0.3, 0.3, True),
    (lambda x, size: warped(x, (0, 2), size), -0.45, 0.45, True),  # translations
    (lambda x, size: warped(x, (1, 2), size), -0.45, 0.45, True),
    (lambda x, size: blended(x.mean((1, 2, 3), keepdim=True), x, size), 0.1, 1.9, False),
    (greyed, 0.1, 1.9, False),
    (lambda x, size: blended(torch.zeros_like(x), x, size), 0.1, 1.9, False),
    (sharpened, 0.1, 1.9, False),
    (turned, -math.pi / 6, -math.pi / 6, True),
    (lambda x, size: straight(T.autocontrast(x.detach()), x, size.view(-1, 1, 1, 1)), 0, 1, False),
    (lambda x, size: straight(1 - x, size.view(-1, 1, 1, 1)), 0, 1, False),
    (equalized, 0, 1, False),
    (solarized, 0, 1, False),
    (posterized, 4, 8, False),
]
"""Operations of TeSLA's code, their ranges, and whether half of the sizes change sign."""


def changed(x: Tensor, which: Tensor, shares: Tensor) -> Tensor:
    """Images (B, ...) after their own operations (B, r), one after the other."""
    signs = torch.where(torch.rand(which.shape) < 0.5, -1.0, 1.0).to(shares.dtype)
    for place in range(which.shape[1]):
        x = x.clamp(0, 1)
        out = x
        for number, (change, low, high, signed) in enumerate(CHANGES):
            own = torch.where(which[:, place] == number)[0]
            if len(own):
                size = low + shares[own, place] * (high - low)
                size = size * signs[own, place] if signed else size
                out = out.index_copy(0, own, change(x[own], size).clamp(0, 1))
        x = out
    return x


def weak_view(x: Tensor) -> Tensor:
    """A crop of at least four fifths, and a mirror image half of the times."""
    return v2.RandomHorizontalFlip()(v2.RandomResizedCrop(x.shape[-2:], scale=(0.8, 1.0))(x))


def tesla(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    momentum: float = 0.99,
    views: int = 4,
    operations: int = 2,
    likeness: float = 1.0,
    distillation: float = 1.0,
    augment: View = weak_view,
) -> Step:
    """TeSLA for CIFAR and ImageNet-C: without a queue."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].requires_grad_(False)
    teacher = copy.deepcopy(model).requires_grad_(False)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=lr)
    choices = torch.tensor(list(combinations(range(len(CHANGES)), operations)))
    selection = torch.zeros(len(choices), dtype=learnt[0].dtype, requires_grad=True)
    sizes = torch.zeros(choices.shape, dtype=learnt[0].dtype, requires_grad=True)
    policy = torch.optim.Adam([selection, sizes], lr=0.1)
    levels: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Tensor]) -> None:
        last = isinstance(layer, nn.LayerNorm)
        x = args[0].flatten(1, -2).mean(1) if last else args[0].flatten(2).mean(2)
        levels.append(x)

    for layer in teacher.modules():
        if isinstance(layer, NORMS):
            layer.register_forward_pre_hook(note)

    def training(on: bool) -> None:
        for each in (model, teacher):
            for layer in each.modules():
                if isinstance(layer, BATCH_NORMS):
                    layer.train(on)

    def taught(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        levels.clear()
        return teacher(x), list(levels)

    def step(x: Tensor) -> Tensor:
        training(True)
        copies = [x, *[augment(x) for _ in range(views)]]
        shown = copies[int(torch.randint(len(copies), ()))]
        with torch.no_grad():
            _, plain = taught(shown)
        drawn = torch.randint(len(choices), (len(x),))
        z, moved = taught(changed(shown, choices[drawn], sizes.sigmoid()[drawn]))
        far = torch.stack([(a - b).square().mean(1) for a, b in zip(moved, plain, strict=True)])
        loss = likeness * far.mean(0) + (z.softmax(1) * z.log_softmax(1)).sum(1)
        (loss + loss.detach() * selection.log_softmax(0)[drawn]).mean().backward()
        policy.step()
        policy.zero_grad()
        with torch.no_grad():
            drawn = torch.multinomial(selection.softmax(0), len(x), replacement=True)
            hard = changed(shown, choices[drawn], sizes.sigmoid()[drawn])
            t = torch.stack([taught(each)[0].softmax(1) for each in reversed(copies)]).mean(0)
        s = model(shown).softmax(1)
        mean = s.mean(0)
        loss = (mean * mean.log()).sum() - (s * t.log()).sum(1).mean()
        distilled = F.kl_div(model(hard).log_softmax(1), t, reduction="batchmean")
        (loss + distillation * distilled).backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, model, momentum)
        training(False)
        with torch.no_grad():
            return taught(x)[0]

    return step
