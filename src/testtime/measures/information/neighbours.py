"""Entropy and mutual information from the distances of nearest neighbours; nothing is trained.

    e_i = distance of sample i to its k-th neighbour

    Kozachenko-Leonenko   H = psi(n) - psi(k) + ln V_d + d mean ln e_i
    KSG, first variant    I = psi(n) + psi(k) - mean[ psi(nx_i + 1) + psi(ny_i + 1) ]
    KSG, second variant   I = psi(n) + psi(k) - 1/k - mean[ psi(mx_i) + psi(my_i) ]

V_d is the volume of the unit ball. Distances within x and within y are Euclidean, so that rotations
change nothing; that of a pair is the larger of the two. nx_i counts the samples whose x is closer
than e_i; mx_i those whose x is not farther than the farthest x of the k neighbours. Where all k have the very x
or the very y of sample i, as of a discrete variable, its box is a line, and its 1/k is left out.

Samples share neighbours, so the terms t_i of such a mean depend on each other. The standard error is that
of the terms with what sample i does to those of others, the infinitesimal jackknife:

    entropy       u_i = t_i - N_i / k
    information   u_i = t_i + N_i s_k - sum_j [ 1{i within nx_j} / (nx_j + 1) + the same in y ]
    error^2       = max( var t, var u - twice ) / n
    twice         = 1.6 d / ((d + 1.7) k)  min(1, var t / psi'(k))  (1 - (k / n)^(1 / d))

N_i counts the samples that i is a neighbour of: each one's ln volume would be 1 / k larger without it.
s_k = 1 / k, for the box 1 / k + 1 / (k (k + 1)). `twice` is what a jackknife counts more than once: the first
factor, in a flat density of d coordinates, was fitted to integrals and simulations of d = 1 to 10 and k = 1 to
10; the second is less where terms vary less; the third is less where neighbours are not near.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from testtime._core.arrays import magnitude
from testtime._core.errors import InputError, OptionError
from testtime._core.options import whole
from testtime.measures.information.estimate import (
    Estimate,
    checked,
    constant,
    paired,
)

ENTRIES = 2**22
"""Distances that are held at one time, for each of the two variables."""

EXACT = 2.0**30
"""Shares are multiples of its inverse: their sums are exact, in whatever order."""


def ksg(x: Tensor, y: Tensor, *, k: int = 3, variant: Literal[1, 2] = 1) -> Estimate:
    """Mutual information of x and y in nats, after Kraskov, Stoegbauer and Grassberger.

    Right to about a hundredth for a few coordinates and thousands of samples, and close to zero for
    independent ones. In ten dimensions or for more than about ln n nats it falls short. Slightly
    negative values occur. A variable that is constant tells nothing: 0. Costs O(n^2) time and
    bounded memory. A few repeated pairs only add bias; with more than k copies of one pair there is
    no density, and no answer. One of the two variables may be discrete. With fewer samples than coordinates
    the value says little.

    The standard error counts that samples share neighbours. Of six laws, 200 to 5000 pairs of one or two
    coordinates and k = 1 to 10 it was 0.83 to 1.22 of the spread of values over draws; of 200 independent
    pairs of five coordinates up to 1.34.

    Args:
        x: (n, dx) or (n,), in units like those of y; `normal_scores` of both where tails are heavy.
        y: (n, dy) or (n,), the partner of each.
        k: which neighbour; the paper advises 2 to 4. More is less variance and more bias.
        variant: 1 counts within a cube, 2 within a box, with less bias for strong dependence.

    Raises:
        InputError: for NaN, lengths that differ, k samples or fewer, or more than k equal pairs.
        OptionError: for another variant, or a k below 1.

    Example:
        >>> x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(2000, generator=torch.Generator().manual_seed(1))
        >>> round(ksg(x, 0.8 * x + 0.6 * noise).value, 1)  # the truth is 0.51
        0.5

    Reference: Kraskov, Stoegbauer, Grassberger, Estimating Mutual Information, 2004.
    """
    whole(1, k=k)
    if variant not in (1, 2):
        raise OptionError(f"variant is {variant!r}; expected 1 or 2")
    x, y = paired(x, y, least=k + 1)
    if constant(x) or constant(y):
        return Estimate(0.0, 0.0)
    scale = magnitude(torch.maximum(x.abs().amax(), y.abs().amax()))
    x, y = x / scale, y / scale
    terms: list[Tensor] = []
    chosen, counted, on_lines = x.new_zeros(3, len(x))
    for rows in _chunks(x):
        dx, dy = _distances(x, rows), _distances(y, rows)
        joint = torch.maximum(dx, dy)
        near = joint.topk(k, largest=False)
        if not near.values[:, -1].all():
            raise _ties("(x, y)", k)
        if variant == 1:
            within = [d < near.values[:, -1:] for d in (dx, dy)]
            lines = rows < 0  # none
        else:
            sides = [d.gather(1, near.indices).amax(1, True) for d in (dx, dy)]
            within = [d <= side for d, side in zip((dx, dy), sides, strict=True)]
            lines = (torch.minimum(*sides) == 0)[:, 0]
        counts = torch.stack([each.sum(1) for each in within]).double() + (variant == 1)
        terms.append(lines / k - counts.digamma().sum(0))
        on_lines += near.indices[lines].flatten().bincount(minlength=len(x))
        chosen += near.indices.flatten().bincount(minlength=len(x))
        for each, count in zip(within, counts, strict=True):
            counted += each.double().T @ ((EXACT / count).round() / EXACT)
    offset = _digamma(len(x)) + _digamma(k) - (1 / k if variant == 2 else 0)
    further = 1 / (k * (k + 1)) if variant == 2 else 0
    others = (1 / k + further) * chosen - further * on_lines - counted
    dims = _varying(x) + _varying(y)
    return _estimate(torch.cat(terms) + offset, others, k, dims)


def kozachenko_leonenko(x: Tensor, *, k: int = 3) -> Estimate:
    """Differential entropy of x in nats, which may be negative. Costs O(n^2) time, bounded memory.

    With fewer samples than coordinates the value says little. A constant coordinate is no error by
    itself, but x then has no density and the value depends on the number of samples; so it does where
    coordinates are functions of others, as copies are. The standard error counts that samples share
    neighbours: of four laws of one to five coordinates it was 0.89 to 1.10 of the spread of values over draws.

    Args:
        x: (n, d) or (n,).
        k: which neighbour.

    Raises:
        InputError: for NaN, k samples or fewer, or more than k equal samples: there the entropy is
            minus infinity.
        OptionError: for a k below 1.

    Example:
        >>> x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> round(kozachenko_leonenko(x).value, 1)  # ln(2 pi e) / 2 = 1.42
        1.4

    Reference: Kozachenko, Leonenko, Sample Estimate of the Entropy of a Random Vector, 1987.
    """
    whole(1, k=k)
    x = checked(x, "x", least=k + 1)
    scale = magnitude(x.abs().amax())
    x = x / scale
    near = [_distances(x, rows).topk(k, largest=False) for rows in _chunks(x)]
    radius = torch.cat([each.values[:, -1] for each in near])
    if not radius.all():
        raise _ties("x", k)
    chosen = torch.cat([each.indices for each in near]).flatten().bincount(minlength=len(x))
    d = x.shape[1]
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1) + d * math.log(float(scale))
    terms = d * radius.log() + _digamma(len(x)) - _digamma(k) + log_ball
    return _estimate(terms, -chosen / k, k, _varying(x))


def _estimate(terms: Tensor, others: Tensor, k: int, dims: int) -> Estimate:
    """Their mean; `others` is what each sample does to the terms of others."""
    n, own = len(terms), float(terms.var())
    noise = math.pi**2 / 6 - sum(1 / j**2 for j in range(1, k))  # psi'(k)
    twice = 1.6 * dims / ((dims + 1.7) * k) * min(1.0, own / noise) * (1 - (k / n) ** (1 / dims))
    square = max(own, float((terms + others).var()) - twice)
    return Estimate(float(terms.mean()), math.sqrt(square / n))


def _varying(x: Tensor) -> int:
    """How many coordinates are no constants."""
    return int((x != x[0]).any(0).sum())


def _chunks(x: Tensor) -> Iterator[Tensor]:
    size = max(1, ENTRIES // len(x))
    for first in range(0, len(x), size):
        yield torch.arange(first, min(first + size, len(x)), device=x.device)


def _distances(x: Tensor, rows: Tensor) -> Tensor:
    """(rows, n), infinite from a sample to itself. Exact: no expanded squares."""
    found = torch.cdist(x[rows], x, compute_mode="donot_use_mm_for_euclid_dist")
    return found.scatter(1, rows[:, None], math.inf)


def _digamma(value: int) -> float:
    return float(torch.digamma(torch.tensor(float(value), dtype=torch.float64, device="cpu")))


def _ties(name: str, k: int) -> InputError:
    return InputError(
        f"more than k = {k} samples of {name} are equal, so it has no density; expected a "
        "continuous variable. Remove the copies, take a larger k, or add a little noise."
    )
