"""Nearest-neighbour estimators again, one sample after another, with numpy and scipy."""

import numpy as np
from scipy.special import digamma, gammaln, polygamma


def distances(x):
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    np.fill_diagonal(d, np.inf)
    return d


def ksg(x, y, k, variant):
    dx, dy, n, total = distances(x), distances(y), len(x), 0.0
    for i in range(n):
        near = np.argsort(np.maximum(dx[i], dy[i]), kind="stable")[:k]
        if variant == 1:
            e = max(dx[i, near[-1]], dy[i, near[-1]])
            total += digamma((dx[i] < e).sum() + 1) + digamma((dy[i] < e).sum() + 1)
        else:
            ex, ey = dx[i, near].max(), dy[i, near].max()
            total += 1 / k + digamma((dx[i] <= ex).sum()) + digamma((dy[i] <= ey).sum())
    return digamma(k) + digamma(n) - total / n


def entropy(x, k):
    n, d = x.shape
    e = np.sort(distances(x), axis=1)[:, k - 1]
    ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    return digamma(n) - digamma(k) + ball + d * np.log(e).mean()


def error(terms, others, k, d):
    """Of their mean, where adding a sample changes those of others by `others`."""
    n = len(terms)
    share = min(1, terms.var(ddof=1) / polygamma(1, k)) * (1 - (k / n) ** (1 / d))
    twice = 1.6 * d / (d + 1.7) / k * share
    return np.sqrt(max(terms.var(ddof=1), (terms + others).var(ddof=1) - twice) / n)


def ksg_error(x, y, k, variant):
    dx, dy, n = distances(x), distances(y), len(x)
    terms, others = np.zeros(n), np.zeros(n)
    for i in range(n):
        near = np.argsort(np.maximum(dx[i], dy[i]), kind="stable")[:k]
        others[near] += 1 / k if variant == 1 else 2 / k - 1 / (k + 1)
        for d in (dx[i], dy[i]):
            if variant == 1:
                inside = np.flatnonzero(d < max(dx[i, near[-1]], dy[i, near[-1]]))
            else:
                inside = np.flatnonzero(d <= d[near].max())
            count = len(inside) + (variant == 1)
            terms[i] -= digamma(count)
            others[inside] -= 1 / count
    return error(terms, others, k, x.shape[1] + y.shape[1])


def entropy_error(x, k):
    n, d = x.shape
    order = np.argsort(distances(x), axis=1, kind="stable")[:, :k]
    e = np.take_along_axis(distances(x), order, 1)[:, -1]
    return error(d * np.log(e), -np.bincount(order.ravel(), minlength=n) / k, k, d)
