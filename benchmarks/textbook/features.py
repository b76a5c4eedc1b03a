"""Methods that read features: what goes into the last layer."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textbook.parts import Loader, Step, configured, gathered, watched


def lame(model: nn.Module, *, neighbours: int = 5) -> Step:
    run = watched(copy.deepcopy(model).eval())

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        g, z = run(x)
        g = F.normalize(g, dim=1)
        distance = torch.cdist(g, g).fill_diagonal_(torch.inf)
        nearest = distance.topk(min(neighbours, len(g) - 1), largest=False).indices
        likeness = torch.zeros_like(distance).scatter_(1, nearest, 1.0)
        unary = -(z.softmax(1) + 1e-10).log()
        y = (-unary).softmax(1)
        before = torch.inf
        for number in range(100):
            pull = likeness @ y
            y = (pull - unary).softmax(1)
            energy = float((y * (unary - pull + (y + 1e-20).log())).sum())
            if number > 1 and abs(energy - before) <= 1e-8 * abs(before):
                break
            before = energy
        return y.log()

    return step


def cafa(model: nn.Module, *, source: Loader, lr: float = 1e-3, shrinkage: float = 0.01) -> Step:
    g, y, classes = gathered(copy.deepcopy(model).eval(), source)
    means = torch.stack(
        [g[y == c].mean(0) if (y == c).any() else g.mean(0) for c in range(classes)]
    )
    covariance = (g - means[y]).T @ (g - means[y]) / len(g)
    ridge = shrinkage * covariance.diagonal().mean()
    ridge = ridge * torch.eye(len(covariance), dtype=g.dtype, device=g.device)
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance + ridge)).T
    centres = means @ whiten
    model, learnt = configured(model)
    optimizer = torch.optim.Adam(learnt, lr=lr)
    run = watched(model)

    def step(x: Tensor) -> Tensor:
        g, z = run(x)
        distances = ((g @ whiten)[:, None] - centres).square().sum(2)
        own = distances.gather(1, z.argmax(1, keepdim=True))[:, 0]
        (own / (distances.sum(1) - own)).log().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return z.detach()

    return step


def adanpc(
    model: nn.Module, *, source: Loader, k: int = 100, tau: float = 0.1, beta: float = 0.1
) -> Step:
    model = copy.deepcopy(model).eval()
    g, labels, classes = gathered(copy.deepcopy(model), source)
    memory = F.normalize(g, dim=1)
    run = watched(model)

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        nonlocal memory, labels
        g = F.normalize(run(x)[0], dim=1)
        likeness, places = (g @ memory.T).topk(min(k, len(memory)))
        weights = (likeness / tau).softmax(1)
        scores = torch.zeros(len(g), classes, dtype=g.dtype, device=g.device)
        scores = (scores.scatter_add(1, labels[places], weights) + 1e-5).clamp(max=1)
        sure = scores.softmax(1).amax(1) >= beta
        memory = torch.cat([memory, g[sure]])
        labels = torch.cat([labels, scores.argmax(1)[sure]])
        return scores.log()

    return step
