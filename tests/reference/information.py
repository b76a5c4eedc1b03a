"""Variational estimates again, pair by pair, and what trains a linear critic, with numpy."""

import numpy as np
from scipy import linalg


def softplus(z):
    return np.log1p(np.exp(z))


def apart(F):
    return np.array([F[i, j] for i in range(len(F)) for j in range(len(F)) if i != j])


def dv(F):
    return np.mean(np.diag(F)) - np.log(np.mean(np.exp(apart(F))))


def nwj(F):
    return 1 + np.mean(np.diag(F) - 1) - np.mean(np.exp(apart(F) - 1))


def tuba(F, a):
    return 1 + np.mean(np.diag(F) - a) - np.mean(np.exp(apart(F - a[:, None])))


def infonce(F):
    terms = [np.log(len(F) * np.exp(F[i, i]) / np.exp(F[i]).sum()) for i in range(len(F))]
    return np.mean(terms)


def js_objective(F):
    return -np.mean(softplus(-np.diag(F))) - np.mean(softplus(apart(F)))


def js(F):
    return nwj(1 + F)


def smile(F, tau):
    return np.mean(np.diag(F)) - np.log(np.mean(np.exp(np.clip(apart(F), -tau, tau))))


def divergence_of_points(a, b, w, steps, penalty, lr, decay):
    """A linear critic between the points a and b: the value after the training, and -L on the way."""
    a, b, w = (np.array(v) for v in (a, b, w))
    mean, second, trace = w.copy(), 0, []

    def gain(w):
        return w @ (a - b) - penalty * (np.linalg.norm(w) - 1) ** 2

    for t in range(steps):
        trace.append(gain(w))
        slope = (a - b) - 2 * penalty * (np.linalg.norm(w) - 1) * w / np.linalg.norm(w)
        second = 0.9 * second + 0.1 * slope**2
        w = w + lr * (1 - t / steps) * slope / np.sqrt(second / (1 - 0.9 ** (t + 1)))
        mean = decay * mean + (1 - decay) * w
    return gain(mean), trace


def frechet(x, y):
    """Of two samples' Gaussians."""
    c, d = (np.atleast_2d(np.cov(v.T)) for v in (x, y))
    root = np.sqrt(np.maximum(linalg.eigvals(c @ d).real, 0)).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + d) - 2 * root
