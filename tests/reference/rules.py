"""SQRL again, in numpy: rules one by one, and the loss of one batch."""

import itertools

import numpy as np
from scipy.special import expit, softmax

CUTS = (5, 20, 35, 50, 65, 80, 95)


def class_rules(values, labels, groups, held, purity, validated):
    """Set of (feature, above, threshold, label, low, high)."""
    found = set()
    for feature, above in itertools.product(range(values.shape[1]), (True, False)):
        for cut in np.unique(np.percentile(values[~held, feature], CUTS)):
            match = (values[:, feature] > cut) == above
            train, val = labels[match & ~held], labels[match & held]
            if not len(train) or not len(val):
                continue
            label = np.bincount(train).argmax()
            if (train == label).mean() > purity and (val == label).mean() > validated:
                scores = []
                for group in np.unique(groups):
                    own = labels[match & (groups == group)]
                    if len(own):
                        share = (own == label).mean()
                        scores.append(2 * share / (1 + share))
                low, high = np.percentile(scores, [1, 99])
                found.add((feature, above, cut, label, low, high))
    return found


def rule_loss(logits, values, rules):
    probs, losses = softmax(logits, -1), []
    for feature, above, cut, label, low, high in rules:
        g = expit(100 * (probs[(values[:, feature] > cut) == above, label] - 0.5))
        if len(g):
            score = 2 * g.sum() / (2 * g.sum() + (1 - g).sum() + 1e-16)
            losses.append(max(low - score, score - high, 0))
    broken = [loss for loss in losses if loss > 0]
    return sum(broken) / max(len(broken), 1)
