"""Decoding methods once more, as plainly as their algorithm boxes; nothing here is the library's."""

import math

import torch


def adam_em_inf(row, delta, lr, n, weight):
    """One row, with autograd and the Adam of torch."""
    z0 = row.clone()
    p0 = z0.softmax(-1)
    z = z0.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=lr)
    for _ in range(n):
        p = z.softmax(-1)
        h = -(p * (p + 1e-12).log()).sum()
        if h < delta:
            break
        there = p0 > 0
        kl = (p0[there] * (p0[there].log() - z.log_softmax(-1)[there])).sum()
        adam.zero_grad()
        (h + weight * kl).backward()
        adam.step()
    return z.detach()


def edt_temperature(row, t0, theta):
    p = row.softmax(-1).tolist()
    h = -sum(v * math.log(v) for v in p if v > 0)
    return max(t0 * 0.8 ** (theta / h), min(1e-2, t0)) if h > 1e-12 else min(1e-2, t0)


def adaptive_temperature(row, ratio, floor, tolerance):
    """The temperature of one row, by bisection."""

    def h(t):
        p = (row / t).softmax(-1).tolist()
        return -sum(v * math.log(v) for v in p if v > 0)

    if h(1.0) <= floor:
        return 1.0
    target, low, high = max(floor, ratio * h(1.0)), 0.01, 1.0
    for _ in range(100):
        t = (low + high) / 2
        if abs(h(t) - target) < tolerance:
            break
        low, high = (low, t) if h(t) > target else (t, high)
    return t


def uscd_scores(row, lame, c, f, w):
    """Steps 2 and 3 with the paper's theta, which c stands for."""
    p, q, v = row.softmax(-1), lame.softmax(-1), len(row)
    theta = math.sqrt((c - 1 / v) / (v - 1))
    if p.std(correction=1) > theta:
        return p
    inside = p >= f * p.mean()
    score = torch.where(inside, p, 0) + w * torch.where(inside, q, 0)
    score = score.clamp(min=0)
    return p if score.sum() == 0 else score / score.sum()


def min_p_kept(row, base):
    p = row.softmax(-1)
    kept = p >= base * p.max()
    kept[p.argmax()] = True
    return kept


def next_logits(model, ids):
    """From scratch, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def greedy(model, ids, n, end=2):
    new = []
    while len(new) < n and (not new or new[-1] != end):
        new.append(int(next_logits(model, ids + new).argmax()))
    return new


def ead(small, large, ids, n, tau, w, d, signal="active", end=2):
    """The algorithm box with every logit recomputed from scratch."""

    def bits(logits):
        p = logits.softmax(-1)
        return float(-(p * p.clamp(min=1e-300).log2()).sum())

    new, seen, since = [], [], math.inf
    active = "large" if tau == 0 or bits(next_logits(small, ids)) > tau else "small"
    who = []
    while len(new) < n and (not new or new[-1] != end):
        models = {"small": small, "large": large}
        logits = next_logits(models[active], ids + new)
        seen.append(bits(logits if signal == "active" else next_logits(small, ids + new)))
        new.append(int(logits.argmax()))
        who.append(active)
        since += 1
        mean = sum(seen[-w:]) / len(seen[-w:])
        wanted = "large" if mean > tau or tau == 0 else "small"
        if wanted != active and since >= d:
            active, since = wanted, 0
    return new, who
