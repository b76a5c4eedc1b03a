"""Orders and counts of labels in plain numpy, written from the published algorithms."""

import numpy as np


def rotta_sequence(labels, shares, turns):
    """RoTTA's slots from given Dirichlet draws (C, S) and class orders (S, C)."""
    slots = [[] for _ in range(shares.shape[1])]
    for label, share in zip(np.unique(labels), shares, strict=True):
        members = np.flatnonzero(labels == label)
        cuts = (np.cumsum(share)[:-1] * len(members)).astype(int)
        for slot, run in zip(slots, np.split(members, cuts), strict=True):
            slot.append(run)
    return np.concatenate([slot[i] for slot, turn in zip(slots, turns, strict=True) for i in turn])


def rotta_draw(labels, delta, rng):
    """A whole RoTTA sequence with numpy's own chance."""
    classes = len(np.unique(labels))
    slots = min(classes, 100)
    shares = rng.dirichlet([delta] * slots, classes)
    return rotta_sequence(labels, shares, [rng.permutation(classes) for _ in range(slots)])


def long_tail(largest, ratio, classes):
    """Samples of each class, as in SADE: the largest times (1/ratio) ** (c / (C - 1))."""
    return [int(largest * (1 / ratio) ** (c / (classes - 1)) + 1e-9) for c in range(classes)]


def window_entropy(labels, window):
    """Mean entropy in nats of the label histogram over consecutive windows."""
    entropies = []
    for start in range(0, len(labels) - window + 1, window):
        p = np.bincount(labels[start : start + window]) / window
        entropies.append(-sum(x * np.log(x) for x in p if x > 0))
    return float(np.mean(entropies))
