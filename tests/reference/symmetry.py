"""Divergences under symmetry again, over functions of the samples, with numpy and scipy."""

import numpy as np
from scipy.optimize import linear_sum_assignment, minimize


def conjugate(v, a):
    """f* of f(w) = (w^a - 1) / (a (a - 1)), for a > 1, and its derivative."""
    k, v = a / (a - 1), np.maximum(v, 0)
    scale = (a - 1) ** k / a
    return scale * v**k + 1 / (a * (a - 1)), scale * k * v ** (k - 1)


def orbit_distances(p, group):
    return np.array([[min(np.linalg.norm(a - g @ b) for g in group) for b in p] for a in p])


def alpha_divergence(x, y, group, a):
    """sup of E_x g - inf_c (c + E_y f*(g - c)) over the values of g on all samples, and c."""
    m, n = len(x), len(y)
    apart = orbit_distances(np.concatenate([x, y]), group)
    pairs = [(k, j) for k in range(m + n) for j in range(m + n) if k != j]
    rows = np.zeros((len(pairs), m + n + 1))
    for row, (k, j) in zip(rows, pairs, strict=True):
        row[k], row[j] = -1, 1
    bounds = np.array([apart[k, j] for k, j in pairs])

    def loss(v):
        values, slopes = conjugate(v[m : m + n] - v[-1], a)
        gradient = np.concatenate([np.full(m, -1 / m), slopes / n, [1 - slopes.mean()]])
        return -v[:m].mean() + v[-1] + values.mean(), gradient

    found = minimize(
        loss,
        np.full(m + n + 1, 1 / (a - 1)) * np.r_[np.ones(m + n), 0],
        jac=True,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: rows @ v + bounds, "jac": lambda _: rows},
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    assert found.success, found.message
    return -found.fun


def wasserstein(x, y, group):
    """W1 of as many samples each, over all ways to pair them off."""
    cost = orbit_distances(np.concatenate([x, y]), group)[: len(x), len(x) :]
    return cost[linear_sum_assignment(cost)].mean()
