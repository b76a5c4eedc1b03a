"""Cauchy-Schwarz divergence and information again, pair by pair of samples."""

from decimal import Decimal

import numpy as np


def gram(a, b, s):
    return np.array([[np.exp(-((u - v) ** 2).sum() / (2 * s**2)) for v in b] for u in a])


def divergence(x, y, p, s, mode):
    k = gram(x, x, s)
    below = k.sum(1) ** 2 if mode == "paper" else (k**2).sum(1)

    def t(L):
        return sum((k[j] * L[j]).sum() / below[j] for j in range(len(k)))

    return -2 * np.log(t(gram(p, y, s))) + np.log(t(gram(y, y, s))) + np.log(t(gram(p, p, s)))


def information(x, z, s):
    """With 28 digits: with 16 the three logarithms of nearly equal samples leave nothing."""
    k, q = (exact_gram(v, s) for v in (x, z))
    n = len(x)
    cross = sum(k[i].sum() * q[i].sum() for i in range(n)) / n**3
    return ((k * q).sum() / n**2 * k.sum() * q.sum() / n**4 / cross**2).ln()


def exact_gram(a, s):
    a, below = [[Decimal(v) for v in row] for row in a.tolist()], 2 * Decimal(s) ** 2
    distances = [[sum((u - v) ** 2 for u, v in zip(p, q, strict=True)) for q in a] for p in a]
    return np.array([[(-far / below).exp() for far in row] for row in distances])
