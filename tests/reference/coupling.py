"""Couplings and bottlenecks again: the algorithm boxes word for word, and searches of all there is."""

import math

import numpy as np


def greedy_coupling(p, q):
    p, q, joint = p.copy(), q.copy(), np.zeros((len(p), len(q)))
    while p.max() > 1e-14 and q.max() > 1e-14:
        i, j = p.argmax(), q.argmax()
        mass = min(p[i], q[j])
        joint[i, j] += mass
        p[i] -= mass
        q[j] -= mass
    return joint


def greedy_bottleneck(masses, rate):
    """The masses of the codes, on lists."""
    groups = sorted((m for m in masses if m > 0), reverse=True)
    bits = lambda g: -sum(m * math.log2(m) for m in g)  # noqa: E731
    if bits(groups) <= rate + 1e-12:
        return groups
    while len(groups) > 1:
        small = [*groups[:-2], groups[-2] + groups[-1]]
        if bits(small) <= rate + 1e-12:
            return small
        groups = [groups[0] + groups[1], *groups[2:]]
        if bits(groups) <= rate + 1e-12:
            return groups
    return groups


def partitions(places):
    if not places:
        yield []
        return
    first, *rest = places
    for parts in partitions(rest):
        yield [[first], *parts]
        for k, part in enumerate(parts):
            yield [*parts[:k], [first, *part], *parts[k + 1 :]]


def best_move(joint, rate, steps=400):
    """The most information of all encoders that move some of one cell, to any column or a new one."""
    joint, best = np.hstack([joint, np.zeros((len(joint), 1))]), 0.0

    def bits(masses):
        return -np.where(masses > 0, masses * np.log2(np.where(masses > 0, masses, 1)), 0).sum(-1)

    for row, source in zip(*joint.nonzero(), strict=True):
        for target in set(range(joint.shape[1])) - {source}:
            tried = np.repeat(joint[None], steps + 1, 0)
            mass = joint[row, source] * np.linspace(0, 1, steps + 1)
            tried[:, row, source] -= mass
            tried[:, row, target] += mass
            codes = bits(tried.sum(1))
            known = codes + bits(joint.sum(1)) - bits(tried.reshape(steps + 1, -1))
            best = max(best, known[codes <= rate + 1e-9].max(initial=0.0))
    return best
