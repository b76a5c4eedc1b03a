"""The thing to beat: each method as one would write it down first, and two floors.

Each is made with a model and gives a function of a batch. Whole models are copied, all is done with
`torch.optim` and `backward()`, copies for a reset are kept, views and teachers are forwarded one by
one. None of it comes from testtime.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def eta(model: nn.Module) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.SGD(learnt, lr=2.5e-4, momentum=0.9)
    mean: Tensor | None = None

    def step(x: Tensor) -> Tensor:
        nonlocal mean
        z = model(x)
        margin = 0.4 * math.log(z.shape[1])
        h = entropy(z)
        kept = torch.where(h < margin)[0]
        p = z.detach().softmax(1)
        if mean is not None:
            similar = F.cosine_similarity(mean[None], p[kept], dim=1).abs()
            kept = kept[similar < 0.05]
        if len(kept):
            fresh = p[kept].mean(0)
            mean = fresh if mean is None else 0.9 * mean + 0.1 * fresh
            ((margin - h[kept].detach()).exp() * h[kept]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return z.detach()

    return step


def sar(model: nn.Module) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.SGD(learnt, lr=2.5e-4, momentum=0.9)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        margin = 0.4 * math.log(z.shape[1])
        h = entropy(z)
        first = h < margin
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
            second = first & (again < margin)
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


def deyo(model: nn.Module) -> Step:
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
        kept = torch.where(h < 0.5 * limit)[0]
        if len(kept):
            with torch.no_grad():
                after = model(shuffled(x[kept])).softmax(1)
            p = z.detach()[kept].softmax(1)
            c = p.argmax(1, keepdim=True)
            drop = (p.gather(1, c) - after.gather(1, c))[:, 0]
            chosen = drop > 0.2
            if chosen.any():
                weight = (0.4 * limit - h[kept].detach()).exp() + drop.exp()
                (weight * h[kept])[chosen].mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return z.detach()

    return step


def cotta(model: nn.Module, view: Step, views: int) -> Step:
    """CoTTA as its code for CIFAR: the views are made always, and used when the anchor is unsure.

    Args:
        model: images in [0, 1] to logits.
        view: makes one changed copy of a batch.
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


TEXTBOOK: dict[str, Callable[[nn.Module], Step]] = {
    "tent": tent,
    "eta": eta,
    "sar": sar,
    "deyo": deyo,
}
"""Methods whose textbook form needs only a model."""
