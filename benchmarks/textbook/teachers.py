"""Methods with a student that learns in all its weights, and a teacher that follows."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from torch.nn import functional as F

from textbook.parts import (
    Loader,
    Step,
    View,
    configured,
    cross_entropy,
    follow,
    gathered,
    information,
    symmetric,
    taught,
    view,
    watched,
)


def cotta(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    restore: float = 0.01,
    views: int = 32,
    augment: View = view,
) -> Step:
    """CoTTA as its code for CIFAR: the views are made always, and used when the anchor is unsure."""
    model, teacher, optimizer = taught(model, lr)
    anchor = copy.deepcopy(teacher)
    kept = copy.deepcopy(model.state_dict())

    def step(x: Tensor) -> Tensor:
        s = model(x)
        with torch.no_grad():
            sure = anchor(x).softmax(1).amax(1).mean()
            t = teacher(x)
            averaged = torch.stack([teacher(augment(x)) for _ in range(views)]).mean(0)
            t = averaged if sure < 0.92 else t
        cross_entropy(s, t).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, model, momentum)
        with torch.no_grad():
            for name, p in model.named_parameters():
                mask = (torch.rand(p.shape, device=p.device) < restore).to(p.dtype)
                p.copy_(kept[name] * mask + p * (1 - mask))
        return t

    return step


def averaged(teacher: nn.Module, anchor: nn.Module, x: Tensor, views: int, augment: View) -> Tensor:
    """The teacher's logits, the mean over changed copies where the source model is unsure."""
    with torch.no_grad():
        if anchor(x).softmax(1).amax(1).mean() < 0.92:
            return torch.stack([teacher(augment(x)) for _ in range(views)]).mean(0)
        return teacher(x)


def least(model: nn.Module, share: float) -> list[Tensor]:
    """Where squared gradients are below their quantile."""
    importance = [p.grad**2 for p in model.parameters()]
    limit = float(np.quantile(torch.cat([each.flatten() for each in importance]), share))
    return [each < limit for each in importance]


def psmt(
    model: nn.Module,
    *,
    source: Loader,
    lr: float = 1e-3,
    momentum: float = 0.999,
    beta: float = 500.0,
    share: float = 0.03,
    views: int = 32,
    augment: View = view,
) -> Step:
    model, teacher, optimizer = taught(model, lr)
    anchor = copy.deepcopy(teacher)
    learnt = list(model.parameters())
    fisher = information(model, learnt, source)

    def step(x: Tensor) -> Tensor:
        t = averaged(teacher, anchor, x, views, augment)
        s, changed = model(x), model(augment(x))
        loss = (0.5 * symmetric(s, t) + 0.5 * symmetric(changed, t)).mean()
        for weight, now, was in zip(fisher, learnt, anchor.parameters(), strict=True):
            loss = loss + beta * (weight * (now - was) ** 2).sum()
        loss.backward()
        optimizer.step()
        follow(teacher, model, momentum)
        masks = least(model, share)
        optimizer.zero_grad()
        with torch.no_grad():
            for mask, now, was, theirs in zip(
                masks, learnt, anchor.parameters(), teacher.parameters(), strict=True
            ):
                now.copy_(torch.where(mask, was, now))
                moved = momentum * theirs + (1 - momentum) * now
                theirs.copy_(torch.where(mask, now, moved))
        return t + s.detach()

    return step


def posterior(
    model: nn.Module, source: Loader, passes: int, lr: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of the weights after each epoch of further training but the first."""
    model, learnt = configured(model, everything=True)
    optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9, weight_decay=5e-4)
    kept: list[list[Tensor]] = []
    for _ in range(passes):
        for x, y in source:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        kept.append([p.detach().clone() for p in learnt])
    stacks = [torch.stack(each) for each in zip(*kept[1:], strict=True)]
    return [each.mean(0) for each in stacks], [each.var(0, correction=0) for each in stacks]


def petal(
    model: nn.Module,
    *,
    source: Loader,
    lr: float = 1e-3,
    momentum: float = 0.999,
    rho: float = 1e-9,
    share: float = 0.03,
    views: int = 32,
    passes: int = 5,
    source_lr: float = 1e-2,
    augment: View = view,
) -> Step:
    means, variances = posterior(model, source, passes, source_lr)
    model, teacher, optimizer = taught(model, lr)
    anchor = copy.deepcopy(teacher)
    learnt = list(model.parameters())

    def step(x: Tensor) -> Tensor:
        t = averaged(teacher, anchor, x, views, augment)
        loss = cross_entropy(model(x), t).mean()
        for now, mean, variance in zip(learnt, means, variances, strict=True):
            loss = loss + 0.5 * rho * ((now - mean) ** 2 / (variance + 1e-6)).sum()
        loss.backward()
        optimizer.step()
        follow(teacher, model, momentum)
        masks = least(model, share)
        optimizer.zero_grad()
        with torch.no_grad():
            for mask, now, was in zip(masks, learnt, anchor.parameters(), strict=True):
                now.copy_(torch.where(mask, was, now))
        return t

    return step


def rmt(
    model: nn.Module,
    *,
    source: Loader,
    lr: float = 1e-3,
    momentum: float = 0.999,
    projector: nn.Module | None = None,
    augment: View = view,
) -> Step:
    """RMT without replay and warm-up, so that nothing but prototypes is kept of the source."""
    g, y, classes = gathered(configured(model)[0], source)
    means = torch.stack([g[y == c].mean(0) for c in range(classes) if (y == c).any()])
    if projector is None:
        projector = nn.Sequential(nn.Linear(g.shape[1], 128), nn.ReLU(), nn.Linear(128, 128))
    model, teacher, optimizer = taught(model, lr)
    optimizer.add_param_group({"params": projector.parameters()})
    run = watched(model)

    def contrast(views: list[Tensor]) -> Tensor:
        """Supervised contrastive loss of the views of a sample with each other."""
        h = F.normalize(projector(torch.cat(views)), dim=1)
        itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
        likeness = (h @ h.T / 0.1).masked_fill(itself, -torch.inf)
        log_p = likeness.log_softmax(1)
        same = torch.eye(len(views[0]), dtype=torch.bool, device=views[0].device).repeat(
            len(views), len(views)
        )
        return -log_p[same & ~itself].mean()

    def step(x: Tensor) -> Tensor:
        g, z = run(x)
        again, changed = run(augment(x))
        with torch.no_grad():
            t = teacher(x)
            nearest = (F.normalize(g, dim=1) @ F.normalize(means, dim=1).T).argmax(1)
        loss = (0.5 * symmetric(z, t) + 0.5 * symmetric(changed, t)).mean()
        (loss + contrast([means[nearest], g, again])).backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, model, momentum)
        return z.detach() + t

    return step


def vcotta(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    momentum: float = 0.999,
    views: int = 32,
    margin: float = 0.3,
    temperature: float = 8e-4,
    weight: float = 1 / 500_000,
    augment: View = view,
) -> Step:
    """VCoTTA with Gaussians around the model's own weights, of convolutions and linear layers."""
    model, _ = configured(model, everything=True)
    source = copy.deepcopy(model).requires_grad_(False)
    teacher = copy.deepcopy(source)
    rhos = {
        f"{name}.{key}": torch.full_like(p, -4.0).requires_grad_()
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for key, p in module.named_parameters(recurse=False)
    }
    source_rhos, teacher_rhos = ({n: r.detach().clone() for n, r in rhos.items()} for _ in "st")
    optimizer = torch.optim.Adam([*model.parameters(), *rhos.values()], lr=lr)

    def opinion(asked: nn.Module, copies: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, the mean over the sure views, and how sure all are."""
        z = torch.stack([asked(each) for each in copies])
        p = z.softmax(2)
        sure = p.amax(2) >= p[0].amax(1) + margin
        sure[0] = True
        return (z * sure[..., None]).sum(0) / sure.sum(0)[:, None], (p.exp() * p).mean()

    def divergence(prior: nn.Module, others: dict[str, Tensor]) -> Tensor:
        means, own = dict(prior.named_parameters()), dict(model.named_parameters())
        pairs = [
            (Normal(own[n], F.softplus(rho)), Normal(means[n], F.softplus(others[n])))
            for n, rho in rhos.items()
        ]
        return torch.stack([kl_divergence(q, p).sum() for q, p in pairs]).sum()

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            copies = [x, *[augment(x) for _ in range(views)]]
            (t, sure), (s, known) = opinion(teacher, copies), opinion(source, copies)
            trust = (torch.stack([sure, known]) / temperature).softmax(0)
            answer = trust[0] * t + trust[1] * s
        share, order = torch.rand(()), torch.randperm(len(x))
        drawn = dict(model.named_parameters())
        for n, rho in rhos.items():
            drawn[n] = drawn[n] + torch.randn_like(rho) * F.softplus(rho)
        z = functional_call(model, drawn, share * x + (1 - share) * x[order])
        loss = symmetric(z, share * answer + (1 - share) * answer[order]).mean()
        priors = trust[0] * divergence(teacher, teacher_rhos)
        priors = priors + trust[1] * divergence(source, source_rhos)
        (loss + weight * priors).backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, model, momentum)
        with torch.no_grad():
            for n, rho in rhos.items():
                teacher_rhos[n] = momentum * teacher_rhos[n] + (1 - momentum) * rho
        return answer

    return step
