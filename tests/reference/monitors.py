"""Monitors, written from the papers in numpy, one point at a time."""

import itertools
import math

import numpy as np


def independence(x, y, gamma_x, gamma_y, memory=10**9, limit=0.5):
    """Log wealth of SKIT after each pair, all sums taken anew."""
    wealth, path, fraction, curvature = 0.0, [], 0.0, 1.0

    def kernel(gamma, a, b):
        return np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(-1))

    for t in range(2, len(x) - 1, 2):
        px, py = x[max(0, t - memory) : t], y[max(0, t - memory) : t]
        m = len(px)
        big_k, big_l = kernel(gamma_x, px, px), kernel(gamma_y, py, py)
        centre = np.eye(m) - 1 / m
        norm = math.sqrt(np.trace(big_k @ centre @ big_l @ centre)) / m

        def g(a, b, px=px, py=py, norm=norm):
            k, l = kernel(gamma_x, a[None], px)[0], kernel(gamma_y, b[None], py)[0]
            return ((k * l).mean() - k.mean() * l.mean()) / norm

        x1, x2, y1, y2 = x[t], x[t + 1], y[t], y[t + 1]
        f = (g(x1, y1) + g(x2, y2) - g(x1, y2) - g(x2, y1)) / 2
        wealth += math.log1p(fraction * f)
        z = f / (1 + fraction * f)
        curvature += z * z
        fraction = min(max(fraction + 2 / (2 - math.log(3)) * z / curvature, 0), limit)
        path.append(wealth)
    return path


def correlated_independence(x, y, gamma_x, gamma_y, kappa=None, memory=10**9):
    """Payoffs of COCO, or of KCC with kappa, by whole kernel matrices and eigenvectors."""

    def kernel(gamma, a, b):
        return np.exp(-gamma * ((a[:, None] - b[None]) ** 2).sum(-1))

    def side(points, gamma):
        n = len(points)
        whole = kernel(gamma, points, points)
        rest, centre = whole.copy(), np.eye(n) - 1 / n
        while np.trace(rest) > 1e-3 * n:
            i = rest.diagonal().argmax()
            rest = rest - np.outer(rest[:, i], rest[i]) / rest[i, i]
        sizes, basis = np.linalg.eigh(centre @ (whole - rest) @ centre)
        sizes, basis = sizes[sizes >= 1e-12], basis[:, sizes >= 1e-12]
        scale = np.ones(len(sizes)) if kappa is None else 1 / np.sqrt(sizes / n + kappa)
        return basis, np.sqrt(sizes), scale, np.trace(rest)

    def fit(px, py):
        (u, s, a, ex), (v, t, b, ey) = side(px, gamma_x), side(py, gamma_y)
        across = (u * s * a).T @ (v * t * b) / len(px)
        r, q = across.shape
        block = np.block([[np.zeros((r, r)), across], [across.T, np.zeros((q, q))]])
        top = np.linalg.eigh(block)[1][:, -1]
        alpha, beta = u @ (a / s * top[:r]), v @ (b / t * top[r:])
        alpha /= math.sqrt((alpha**2).sum() * ex + ((a * top[:r]) ** 2).sum())
        beta /= math.sqrt((beta**2).sum() * ey + ((b * top[r:]) ** 2).sum())
        return px, py, alpha, beta

    payoffs, due = [], [2 * k * k for k in range(1, 100)]
    for t in range(2, len(x) - 1, 2):
        if t in due:
            px, py, alpha, beta = fit(x[max(0, t - memory) : t], y[max(0, t - memory) : t])
        g, h = kernel(gamma_x, x[t : t + 2], px) @ alpha, kernel(gamma_y, y[t : t + 2], py) @ beta
        payoffs.append((h[1] - h[0]) * (g[1] - g[0]) / 4)
    return payoffs


def linear_independence(x, y):
    """Payoffs of the linear witness, all moments taken anew."""
    payoffs, seen = [], []
    for t in range(2, len(x) - 1, 2):
        c = np.cov(x[:t].T, y[:t].T, bias=True)[: x.shape[1], x.shape[1] :]
        w = (x[t] - x[t + 1]) @ c @ (y[t] - y[t + 1])
        payoffs.append(math.tanh(w / math.sqrt(np.mean(np.square(seen)))) if seen else 0.0)
        seen.append(w)
    return payoffs


def grapa(payoffs, limit=0.9):
    wealth, seen = 0.0, [(1e-3, 1.0)]
    for f in payoffs:
        mean, square = np.mean([s[0] for s in seen]), np.mean([s[1] for s in seen])
        wealth += math.log1p(min(max(mean / square, 0), limit) * f)
        seen.append((f, f * f))
    return wealth


def mixture(payoffs, fractions):
    return math.log(np.mean([np.prod(1 + fraction * np.array(payoffs)) for fraction in fractions]))


def starting(payoffs, fractions):
    """Every gambler who begins at every time, one by one."""
    n = len(payoffs)

    def tail(t):
        return 1 / math.log2(t + 2)

    total = tail(n)
    for start in range(n):
        share = (tail(start) - tail(start + 1)) / len(fractions)
        total += sum(share * np.prod(1 + f * np.array(payoffs[start:])) for f in fractions)
    return math.log(total)


def relative_uncertainty(tune, labels, probs, weight):
    """Scores of probs (n, K), with the matrix from tuning probabilities, sample by sample."""
    k = tune.shape[1]
    wrong, right, count = np.zeros((k, k)), np.zeros((k, k)), [0, 0]
    for p, y in zip(tune, labels, strict=True):
        if p.argmax() == y:
            right += np.outer(p, p)
            count[1] += 1
        else:
            wrong += np.outer(p, p)
            count[0] += 1
    m = weight * wrong / max(count[0], 1) - (1 - weight) * right / max(count[1], 1)
    np.fill_diagonal(m, 0)
    m = np.maximum((m + m.T) / 2, 0)
    if not m.any():
        m = 1 - np.eye(k)
    m /= np.sqrt((m**2).sum())
    return np.array([p @ m @ p for p in probs])


def searched_relative_uncertainty(weights, tune, labels, held, truth):
    """(temperature, epsilon, FPR) of a linear model, slopes by differences, FPR by thresholds."""

    def probs(x, temperature):
        z = np.exp(x @ weights / temperature)
        return z / z.sum(1, keepdims=True)

    wrong, best = (held @ weights).argmax(1) != truth, None
    for temperature in (0.2, 0.4, 0.6, 0.8, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 2):

        def score(x, temperature=temperature):
            known = probs(tune, temperature)
            return relative_uncertainty(known, labels, probs(x, temperature), 0.5)

        step = 1e-6 * np.eye(held.shape[1])
        slope = np.stack([score(held + each) - score(held - each) for each in step], 1)
        for epsilon in (0, 0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035, 0.004):
            scores = score(held + epsilon * np.sign(slope))
            rates = [
                (scores[~wrong] >= t).mean() for t in scores if (scores[wrong] >= t).mean() >= 0.95
            ]
            higher = (scores[wrong][:, None] > scores[~wrong]).mean()
            if best is None or (min(rates), -higher) < best[0]:
                best = (min(rates), -higher), (temperature, epsilon, min(rates))
    return best[1]


def doctor(probs):
    """Odds that two draws of a sample's answer differ, pair by pair of classes."""
    k = range(probs.shape[1])
    alike = np.array([sum(p[i] * p[j] for i in k for j in k if i == j) for p in probs])
    other = np.array([sum(p[i] * p[j] for i in k for j in k if i != j) for p in probs])
    return other / alike


def aurc(scores, wrong):
    """A threshold after the other, as the authors of Rel-U do, and the trapezium rule by hand."""
    points = [
        ((scores <= t).mean(), wrong[scores <= t].sum() / (scores <= t).sum())
        for t in np.unique(scores)
    ]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))


def pairwise_uncertainty(probs, different=False):
    """Total, aleatoric and epistemic of members (S, K), pair by pair."""
    s = len(probs)
    pairs = [(a, b) for a in range(s) for b in range(s) if a != b or not different]
    aleatoric = np.mean([-(p * np.log(p)).sum() for p in probs])
    kl = np.mean([(probs[a] * np.log(probs[a] / probs[b])).sum() for a, b in pairs])
    return aleatoric + kl, aleatoric, kl


def uncertainty_cell(probs, predicting, truth):
    """Total and epistemic of members (S, K): which model predicts, what stands for the true one."""
    average = [probs.mean(0)]
    p = {"single": probs[:1], "average": average, "expected": probs}[predicting]
    q = {"single": probs[-1:], "average": average, "expected": probs}[truth]
    total = np.mean([-(a * np.log(b)).sum() for a in p for b in q])
    return total, total - np.mean([-(a * np.log(a)).sum() for a in p])


def gaussian_score(x, points, ridge):
    """Slope of the logarithm of the Gaussian of samples x, at one point after the other."""
    precision = np.linalg.inv(np.cov(x.T) + ridge * np.eye(x.shape[1]))
    return np.array([-precision @ (point - x.mean(0)) for point in points])


def score_shift(x, y, drawn, ridge):
    """φ of each feature, over what was drawn from both densities."""
    scores = zip(gaussian_score(x, drawn, ridge), gaussian_score(y, drawn, ridge), strict=True)
    return sum((p - q) ** 2 for p, q in scores) / len(drawn)


def gaussian_conditional(mean, covariance, points, j):
    """Means and standard deviation of coordinate j given the others, from the parted covariance."""
    rest = np.arange(len(mean)) != j
    across = np.linalg.solve(covariance[rest][:, rest], covariance[rest][:, j])
    variance = covariance[j, j] - covariance[j, rest] @ across
    return mean[j] + (points[:, rest] - mean[rest]) @ across, math.sqrt(variance)


def coverage(samples, truth, references, metric, bins):
    """Ranks, levels and expected coverage of TARP, one simulation after the other."""
    low, span, ranks = truth.min(0), np.ptp(truth, 0), []
    power = 2 if metric == "euclidean" else 1
    for drawn, true, at in zip(samples.swapaxes(0, 1), truth, references, strict=True):
        scaled = [(each - low) / span for each in (drawn, true, at)]
        far = (np.abs(scaled[1] - scaled[2]) ** power).sum()
        ranks.append(np.mean([(np.abs(s - scaled[2]) ** power).sum() < far for s in scaled[0]]))
    density, levels = np.histogram(ranks, density=True, bins=bins, range=(0, 1))
    return ranks, levels, np.append(0, np.cumsum(density) / bins)
