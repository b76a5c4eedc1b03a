"""SADE again, in numpy: the training loss, and steps on the weights with the gradient by hand."""

import numpy as np
from scipy.special import log_softmax, softmax


def diverse_experts_loss(logits, labels, prior, tau):
    prior = np.asarray(prior) / np.sum(prior)
    ranks = prior.argsort().argsort()
    inverse = np.sort(prior)[::-1][ranks]
    shifts = (0, np.log(prior + 1e-9), np.log(prior + 1e-9) - tau * np.log(inverse + 1e-9))
    return sum(
        -log_softmax(v + shift, -1)[np.arange(len(labels)), labels].mean()
        for v, shift in zip(logits, shifts, strict=True)
    )


def agreement(first, second, w):
    a = softmax(w)
    one, two = (softmax(np.tensordot(v, a, (1, 0)), -1) for v in (first, second))
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    return ((one * two).sum(-1) / norms).mean()


def sade(pairs, *, experts, lr, momentum, decay, floor):
    """Weights w after each pair of copies (B, E, C); the gradient by central differences."""
    w, direction, path, stopped = np.full(experts, 1 / 3), None, [], False
    for first, second in pairs:
        if not stopped:
            steps = 1e-5 * np.eye(experts)
            rise = [
                agreement(first, second, w + s) - agreement(first, second, w - s) for s in steps
            ]
            grad = -np.array(rise) / 2e-5 + decay * w
            direction = grad if direction is None else momentum * direction + grad
            w = w - lr * (grad + momentum * direction)
            stopped = np.round(softmax(w), 2).min() < floor
        path.append(w)
    return path
