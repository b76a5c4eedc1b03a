"""Variational estimates again, pair by pair, with numpy."""

import numpy as np


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
