"""Methods that learn scales and shifts of normalisation layers, from the batch itself."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textbook.parts import (
    Loader,
    Step,
    View,
    climb,
    configured,
    entropy,
    information,
    put_back,
    symmetric,
    view,
)


def bn_adapt(model: nn.Module) -> Step:
    model, _ = configured(model)

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        return model(x)

    return step


def tent(model: nn.Module, *, lr: float = 1e-3) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.Adam(learnt, lr=lr)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def step(x: Tensor, kept: object = kept) -> Tensor:
        z = model(x)
        entropy(z).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return z.detach()

    return step


def eta(
    model: nn.Module,
    *,
    lr: float = 2.5e-4,
    margin: float = 0.4,
    redundancy: float = 0.05,
    reset_every: int | None = None,
    source: Loader = (),
    beta: float = 2000.0,
) -> Step:
    """ETA; EATA where there is source data, RDumb with resets."""
    model, learnt = configured(model)
    optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9)
    fisher = information(model, learnt, source) if source else []
    known = [(weight, p.detach().clone()) for weight, p in zip(fisher, learnt, strict=False)]
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    mean: Tensor | None = None
    seen = 0

    def step(x: Tensor) -> Tensor:
        nonlocal mean, seen
        if reset_every and seen % reset_every == 0:
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
            mean = None
        seen += 1
        z = model(x)
        limit = margin * math.log(z.shape[1])
        h = entropy(z)
        sure = torch.where(h < limit)[0]
        p = z.detach().softmax(1)
        if mean is not None:
            similar = F.cosine_similarity(mean[None], p[sure], dim=1).abs()
            sure = sure[similar < redundancy]
        if len(sure):
            fresh = p[sure].mean(0)
            mean = fresh if mean is None else 0.9 * mean + 0.1 * fresh
            loss = ((limit - h[sure].detach()).exp() * h[sure]).mean()
            for now, (weight, was) in zip(learnt, known, strict=False):
                loss = loss + beta * (weight * (now - was) ** 2).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return z.detach()

    return step


def rdumb(model: nn.Module, *, reset_every: int = 1000, **options: float) -> Step:
    return eta(model, reset_every=reset_every, **options)


def sar(
    model: nn.Module, *, lr: float = 2.5e-4, margin: float = 0.4, recover_below: float = 0.2
) -> Step:
    model, learnt = configured(model, top=False)
    optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    average: float | None = None

    def step(x: Tensor) -> Tensor:
        nonlocal average
        z = model(x)
        limit = margin * math.log(z.shape[1])
        h = entropy(z)
        first = h < limit
        if first.any():
            h[first].mean().backward()
            old = climb(learnt)
            again = entropy(model(x))
            second = first & (again < limit)
            if second.any():
                loss = again[second].mean()
                loss.backward()
                average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
            put_back(learnt, old)
            if second.any():
                optimizer.step()
            optimizer.zero_grad()
        if average is not None and average < recover_below:
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
            average = None
        return z.detach()

    return step


def deyo(
    model: nn.Module,
    *,
    lr: float = 2.5e-4,
    entropy_margin: float = 0.5,
    drop_margin: float = 0.2,
) -> Step:
    model, learnt = configured(model, top=False)
    optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9)

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


def ostta(model: nn.Module, *, lr: float = 1e-3, diversity: float = 0.5) -> Step:
    model, learnt = configured(model)
    source = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(learnt, lr=lr)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            before, chosen = source(x).softmax(1).max(1)
        z = model(x)
        after = z.detach().softmax(1).gather(1, chosen[:, None])[:, 0]
        kept = after >= before
        mean = z.softmax(1).mean(0)
        loss = diversity * (mean * mean.log()).sum()
        if kept.any():
            loss = loss + entropy(z)[kept].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return z.detach()

    return step


def lerm(model: nn.Module, *, lr: float = 1e-3) -> Step:
    model, learnt = configured(model)
    optimizer = torch.optim.Adam(learnt, lr=lr)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        p = z.softmax(1)
        codes = p.T @ p / p.sum(0)[:, None]
        (codes - torch.eye(len(codes), dtype=p.dtype, device=p.device)).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return z.detach()

    return step


def smooth_view(x: Tensor) -> Tensor:
    """CoTTA's transform without blur and noise."""
    return view(x, padding="reflect", rough=False)


def roid(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    momentum: float = 0.99,
    temperature: float = 1 / 3,
    augment: View = smooth_view,
) -> Step:
    model, learnt = configured(model)
    source = [p.detach().clone() for p in learnt]
    optimizer = torch.optim.Adam(learnt, lr=lr)
    usual: Tensor | None = None

    def scaled(values: Tensor) -> Tensor:
        return (values - values.min()) / (values.max() - values.min())

    def step(x: Tensor) -> Tensor:
        nonlocal usual
        z = model(x)
        p = z.detach().softmax(1)
        mean, classes = p.mean(0), z.shape[1]
        if usual is None:
            usual = torch.full_like(mean, 1 / classes)
        diverse = scaled(1 - F.cosine_similarity(usual[None], p, dim=1))
        kept = diverse >= diverse.mean()
        weights = (diverse * scaled(-entropy(z.detach())) / temperature).exp()[kept]
        usual = 0.9 * usual + 0.1 * mean
        q = z[kept].softmax(1).clamp(max=0.99)
        ratio = -(q * (q / (1 - q) + 1e-5).log()).sum(1)
        agreement = symmetric(model(augment(x[kept])), z[kept])
        ((weights * (ratio + agreement)).sum() / len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for now, was in zip(learnt, source, strict=True):
                now.copy_(momentum * now + (1 - momentum) * was)
        smooth = max(1 / len(x), 1 / classes) / mean.max()
        return z.detach() * (mean + smooth) / (1 + smooth * classes)

    return step
