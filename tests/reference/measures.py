"""The measures again, from their definitions, with numpy, scipy and scikit-learn in float64."""

import itertools

import numpy as np
from scipy.special import log_softmax, rel_entr, softmax, xlogy


def entropy(z):
    return -xlogy(softmax(z, -1), softmax(z, -1)).sum(-1)


def renyi(z, order):
    p = softmax(z, -1)
    if order == 1:
        return entropy(z)
    if order == np.inf:
        return -np.log(p.max(-1))
    return np.log(np.where(p > 0, p**order, 0).sum(-1)) / (1 - order)


def tsallis(z, order):
    return entropy(z) if order == 1 else (1 - (softmax(z, -1) ** order).sum(-1)) / (order - 1)


def mutual_information(z):
    p = softmax(z, -1)
    return -xlogy(p.mean(0), p.mean(0)).sum(-1) - entropy(z).mean(0)


def kl(p, q):
    return rel_entr(softmax(p, -1), softmax(q, -1)).sum(-1)


def js(p, q):
    p, q = softmax(p, -1), softmax(q, -1)
    return (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(-1) / 2


def alpha(p, q, a):
    if a in (0, 1):
        return kl(p, q) if a else kl(q, p)
    log_power = a * log_softmax(p, -1) + (1 - a) * log_softmax(q, -1)
    return (1 - np.exp(log_power).sum(-1)) / (a * (1 - a))


def gaps(groups):
    """Σ n_b |acc_b − conf_b| over groups of (confidences, hits)."""
    return sum(len(c) * abs(h.mean() - c.mean()) for c, h in groups if len(c))


def calibration_error(confidence, hit, bins):
    lower = np.arange(bins) / bins
    inside = [(confidence > low) & (confidence <= low + 1 / bins) for low in lower]
    inside[0] |= confidence == 0
    return gaps((confidence[i], hit[i]) for i in inside) / len(hit)


def adaptive_calibration_error(confidence, hit, bins):
    """Without ties: consecutive ranks, from ceil(b n / M) on."""
    order = np.argsort(confidence)
    edges = [-(-b * len(hit) // bins) for b in range(bins + 1)]
    parts = [order[a:b] for a, b in itertools.pairwise(edges)]
    return gaps((confidence[i], hit[i]) for i in parts) / len(hit)


def classwise_calibration_error(probs, labels, bins):
    classes = range(probs.shape[1])
    return np.mean([calibration_error(probs[:, c], labels == c, bins) for c in classes])


def auroc(scores, positive):
    gap = scores[positive][:, None] - scores[~positive]
    return np.mean((gap > 0) + 0.5 * (gap == 0))


def fpr_at_95_tpr(scores, positive):
    enough = [
        t for t in np.unique(scores) if 20 * (scores[positive] >= t).sum() >= 19 * positive.sum()
    ]
    return np.mean(scores[~positive] >= max(enough))


def oscr(scores, hit, unknown):
    """Walks through every threshold and adds trapezoids; the curve begins at (0, 0)."""
    known = ~unknown
    curve = [(0.0, 0.0)]
    for t in np.unique(scores):
        correct = (hit & known & (scores <= t)).sum() / known.sum()
        curve.append(((scores[unknown] <= t).mean(), correct))
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))


def h_score(scores, hit, unknown):
    rates = [hit[~unknown].mean(), auroc(scores, unknown)]
    return 0.0 if 0 in rates else len(rates) / sum(1 / rate for rate in rates)
