"""The thing to beat: each method as one would write it down first, and two floors.

Each is made with a model and gives a function of a batch. Whole models are copied, all is done with
`torch.optim` and `backward()`, copies for a reset are kept, views and teachers are forwarded one by
one, images changed with torchvision. None of it comes from testtime.
"""

import copy
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T

Step = Callable[[Tensor], Tensor]
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
NORMS = (BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1)


def configured(model: nn.Module, *, everything: bool = False) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the model on batch statistics, and the parameters that learn."""
    model = copy.deepcopy(model).eval().requires_grad_(everything)
    learnt: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            module.train()
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        if isinstance(module, NORMS):
            learnt += [p.requires_grad_() for p in module.parameters()]
    return model, list(model.parameters()) if everything else learnt


def plain(model: nn.Module) -> Step:
    """Inference: the floor of every method."""

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        return model(x)

    return step


def minimal(model: nn.Module) -> Step:
    """A forward, and the backward that reaches only what adapts: the floor of Tent."""
    model, learnt = configured(model)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        torch.autograd.grad(entropy(z).mean(), learnt)
        return z.detach()

    return step


def tent(model: nn.Module) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.Adam(learnt, lr=1e-3)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def step(x: Tensor, kept: object = kept) -> Tensor:
        z = model(x)
        entropy(z).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return z.detach()

    return step


def eta(
    model: nn.Module, *, margin: float = 0.4, redundancy: float = 0.05, fisher: bool = False
) -> Step:
    """ETA; EATA with a Fisher penalty, whose information is 1 here: what it is costs nothing."""
    model, learnt = configured(model)
    optimizer = torch.optim.SGD(learnt, lr=2.5e-4, momentum=0.9)
    known = [(torch.ones_like(p), p.detach().clone()) for p in learnt] if fisher else []
    mean: Tensor | None = None

    def step(x: Tensor) -> Tensor:
        nonlocal mean
        z = model(x)
        limit = margin * math.log(z.shape[1])
        h = entropy(z)
        kept = torch.where(h < limit)[0]
        p = z.detach().softmax(1)
        if mean is not None:
            similar = F.cosine_similarity(mean[None], p[kept], dim=1).abs()
            kept = kept[similar < redundancy]
        if len(kept):
            fresh = p[kept].mean(0)
            mean = fresh if mean is None else 0.9 * mean + 0.1 * fresh
            loss = ((limit - h[kept].detach()).exp() * h[kept]).mean()
            for now, (weight, was) in zip(learnt, known, strict=False):
                loss = loss + 2000 * (weight * (now - was) ** 2).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return z.detach()

    return step


def eata(model: nn.Module, *, margin: float = 0.4, redundancy: float = 0.05) -> Step:
    return eta(model, margin=margin, redundancy=redundancy, fisher=True)


def sar(model: nn.Module, *, margin: float = 0.4) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.SGD(learnt, lr=2.5e-4, momentum=0.9)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        limit = margin * math.log(z.shape[1])
        h = entropy(z)
        first = h < limit
        if first.any():
            h[first].mean().backward()
            old = [p.detach().clone() for p in learnt]
            grads = [p.grad for p in learnt if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            with torch.no_grad():
                for p in learnt:
                    if p.grad is not None:
                        p.add_(0.05 * p.grad / (norm + 1e-12))
            optimizer.zero_grad()
            again = entropy(model(x))
            second = first & (again < limit)
            if second.any():
                again[second].mean().backward()
            with torch.no_grad():
                for p, was in zip(learnt, old, strict=True):
                    p.copy_(was)
            if second.any():
                optimizer.step()
            optimizer.zero_grad()
        return z.detach()

    return step


def deyo(model: nn.Module, *, entropy_margin: float = 0.5, drop_margin: float = 0.2) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.SGD(learnt, lr=2.5e-4, momentum=0.9)

    def shuffled(x: Tensor, tiles: int = 4) -> Tensor:
        b, c, high, wide = x.shape
        x = F.interpolate(x, (high // tiles * tiles, wide // tiles * tiles))
        high, wide = x.shape[2] // tiles, x.shape[3] // tiles
        x = x.view(b, c, tiles, high, tiles, wide).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        x = torch.stack([image[torch.randperm(tiles**2)] for image in x])
        x = x.view(b, tiles, tiles, c, high, wide).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(b, c, high * tiles, wide * tiles)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        limit = math.log(z.shape[1])
        h = entropy(z)
        kept = torch.where(h < entropy_margin * limit)[0]
        if len(kept):
            with torch.no_grad():
                after = model(shuffled(x[kept])).softmax(1)
            p = z.detach()[kept].softmax(1)
            c = p.argmax(1, keepdim=True)
            drop = (p.gather(1, c) - after.gather(1, c))[:, 0]
            chosen = drop > drop_margin
            if chosen.any():
                weight = (0.4 * limit - h[kept].detach()).exp() + drop.exp()
                (weight * h[kept])[chosen].mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return z.detach()

    return step


def view(x: Tensor) -> Tensor:
    """The transform of CoTTA's code, with torchvision's operations in its order."""
    for change in torch.randperm(5).tolist():
        if change == 0:
            x = T.adjust_brightness(x, random.uniform(0.6, 1.4))
        elif change == 1:
            x = T.adjust_contrast(x, random.uniform(0.7, 1.3))
        elif change == 2:
            x = T.adjust_saturation(x, random.uniform(0.5, 1.5))
        elif change == 3:
            x = T.adjust_hue(x, random.uniform(-0.06, 0.06))
        else:
            x = x.clamp(1e-8, 1).pow(random.uniform(0.7, 1.3))
    size = x.shape[-1]
    x = F.pad(x, [size // 2] * 4, mode="replicate")
    far = x.shape[-1] / 16
    x = T.affine(
        x,
        angle=random.uniform(-15, 15),
        translate=[round(random.uniform(-far, far)), round(random.uniform(-far, far))],
        scale=random.uniform(0.9, 1.1),
        shear=[0.0, 0.0],
        interpolation=T.InterpolationMode.BILINEAR,
    )
    x = T.gaussian_blur(x, [5, 5], [random.uniform(0.001, 0.5)] * 2)
    x = T.center_crop(x, [size, size])
    if random.random() < 0.5:
        x = T.horizontal_flip(x)
    return (x + 0.005 * torch.randn_like(x)).clamp(0, 1)


def cotta(model: nn.Module, views: int) -> Step:
    """CoTTA as its code for CIFAR: the views are made always, and used when the anchor is unsure.

    Args:
        model: square images in [0, 1] to logits.
        views: copies.
    """
    model, learnt = configured(model, everything=True)
    teacher, anchor = copy.deepcopy(model), copy.deepcopy(model)
    kept = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(learnt, lr=1e-3)

    def step(x: Tensor) -> Tensor:
        s = model(x)
        with torch.no_grad():
            sure = anchor(x).softmax(1).amax(1).mean()
            t = teacher(x)
            averaged = torch.stack([teacher(view(x)) for _ in range(views)]).mean(0)
            t = averaged if sure < 0.92 else t
        (-(t.softmax(1) * s.log_softmax(1)).sum(1)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(teacher.parameters(), model.parameters(), strict=True):
                a.copy_(0.999 * a + 0.001 * b)
            for name, p in model.named_parameters():
                mask = (torch.rand(p.shape) < 0.01).float()
                p.copy_(kept[name] * mask + p * (1 - mask))
        return t

    return step


class RobustNorm(nn.Module):
    """RoTTA's normalisation with moving averages, as one writes it down."""

    def __init__(self, layer: nn.Module, alpha: float = 0.05) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.alpha = layer.weight, layer.bias, layer.eps, alpha
        self.register_buffer("mean", layer.running_mean.clone())
        self.register_buffer("var", layer.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            sides = [0, *range(2, x.dim())]
            now_var, now_mean = torch.var_mean(x, dim=sides, unbiased=False)
            mean = (1 - self.alpha) * mean + self.alpha * now_mean
            var = (1 - self.alpha) * var + self.alpha * now_var
            self.mean, self.var = mean.detach().clone(), var.detach().clone()
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)


def robust(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, BATCH_NORMS):
            setattr(module, name, RobustNorm(child))
        else:
            robust(child)


def rotta(model: nn.Module, *, size: int = 64) -> Step:  # noqa: PLR0915  (the paper, in one piece)
    """RoTTA: a bank of images, balanced over classes, and an update after as many have come.

    Args:
        model: square images in [0, 1] to logits, with batch normalisation.
        size: of the bank.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    robust(model)
    learnt: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, RobustNorm):
            learnt += [module.weight.requires_grad_(), module.bias.requires_grad_()]
    teacher = copy.deepcopy(model).requires_grad_(False)
    kept = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(learnt, lr=1e-3)
    bank: dict[int, list[list]] = {}  # class -> [image, age, uncertainty]
    seen = 0

    def badness(item: list, classes: int) -> float:
        return 1 / (1 + math.exp(-item[1] / size)) + item[2] / math.log(classes)

    def offer(image: Tensor, label: int, doubt: float, classes: int) -> None:
        new, own = [image, 0, doubt], bank.setdefault(label, [])
        among = [label]
        if len(own) < size / classes:
            if sum(map(len, bank.values())) < size:
                own.append(new)
                return
            most = max(map(len, bank.values()))
            among = [c for c, items in bank.items() if len(items) == most]
        held = [(badness(item, classes), c, item) for c in among for item in bank[c]]
        worst = max(held, key=lambda entry: entry[0], default=None)
        if worst is None or worst[0] > badness(new, classes):
            if worst is not None:
                bank[worst[1]] = [item for item in bank[worst[1]] if item is not worst[2]]
            own = bank[label]
            own.append(new)

    def update() -> None:
        items = [item for own in bank.values() for item in own]
        images = torch.stack([item[0] for item in items])
        ages = torch.tensor([item[1] / size for item in items])
        model.train()
        teacher.train()
        with torch.no_grad():
            t = teacher(images)
        s = model(view(images))
        weight = (-ages).exp() / (1 + (-ages).exp())
        (-(t.softmax(1) * s.log_softmax(1)).sum(1) * weight).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(teacher.parameters(), model.parameters(), strict=True):
                a.copy_(0.999 * a + 0.001 * b)

    def step(x: Tensor, kept: object = kept) -> Tensor:
        nonlocal seen
        teacher.eval()
        with torch.no_grad():
            z = teacher(x)
            p = z.softmax(1)
        for image, row in zip(x, p, strict=True):
            doubt = float(-(row * (row + 1e-6).log()).sum())
            for items in bank.values():
                for item in items:
                    item[1] += 1
            offer(image, int(row.argmax()), doubt, z.shape[1])
            seen += 1
            if seen % size == 0:
                update()
        return z

    return step


TEXTBOOK: dict[str, Callable[..., Step]] = {
    "tent": tent,
    "eta": eta,
    "eata": eata,
    "sar": sar,
    "deyo": deyo,
}
"""Methods whose textbook form needs only a model, and options."""
