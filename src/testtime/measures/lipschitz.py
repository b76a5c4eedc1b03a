"""Alpha-divergences whose witness is Lipschitz: between an alpha-divergence and optimal transport.

    f(w) = (w^a - 1) / (a (a - 1)),   f*(v) = sup_w (w v - f(w)),   a > 1
    D(P || Q) = sup over 1-Lipschitz g of E_P g - inf_c (c + E_Q f*(g - c))
              = min over laws R of W1(P, R) + E_Q f(dR / dQ)

The second line is the infimal convolution; of samples it is a convex program over transport plans of
which only the rows are given. It is solved by a primal-dual interior-point method with Mehrotra's
corrector, until the two lines agree.
"""

import math
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError, WorkFailed
from testtime._core.options import in_range

AGREEMENT = 1e-9
"""Between the two values, relative to 1 + the mean distance."""
STEPS = 200
NEAREST = 1e-6
"""Of alpha to 1: f is a difference of terms of the size of 1 / (alpha - 1)."""


def lipschitz_divergence(distances: Float[Tensor, "m n"], *, alpha: float = 2.0) -> float:
    """D(P || Q) for samples of P, the rows, and of Q, the columns.

    Never below 0, nor above W1 of the samples. It is not symmetric. For functions of another Lipschitz
    constant L hand in L times the distances: for L near 0 the answer is L W1. In m^2 n time.

    Args:
        distances: (m, n), finite and not negative; those of a metric.
        alpha: a in f, above 1. The default, 2, is half of chi-squared.

    Returns:
        What the best Lipschitz function found attains, at most a billionth of 1 + the mean distance
        below the least upper bound found.

    Raises:
        InputError: distances that are empty, negative or not finite.
        OptionError: an alpha that is not above 1 by a millionth; nearer, rounding is all that is left.
        WorkFailed: the two values do not come to agree.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(lipschitz_divergence(torch.cdist(x, x + 1.0)), 3)
        0.875

    Reference: Birrell, Dupuis, Katsoulakis, Pantazis, Rey-Bellet, (f, Gamma)-Divergences, JMLR 2022.
    """
    in_range(1, alpha=alpha)
    if alpha < 1 + NEAREST:
        raise OptionError(f"alpha is {alpha!r}; expected a number above 1, {1 + NEAREST} at least")
    check_tensors(distances=distances)
    if (
        distances.dim() != 2
        or not distances.numel()
        or distances.is_complex()
        or not bool((distances.isfinite() & (distances >= 0)).all())
    ):
        raise InputError(
            f"distances are of shape {tuple(distances.shape)} and type {distances.dtype}; expected "
            "finite distances (m, n), none below 0."
        )
    cost = distances.detach().double()
    return _solved(cost, alpha)


class _Point(NamedTuple):
    plan: Tensor
    slack: Tensor
    potential: Tensor

    def moved(self, by: "_Point", step: float) -> "_Point":
        return _Point(*(old + step * change for old, change in zip(self, by, strict=True)))


def _solved(cost: Tensor, alpha: float) -> float:
    """The value, by Newton steps towards plan * slack = mu with mu falling to 0."""
    rows, columns = cost.shape
    tolerance = AGREEMENT * (1 + float(cost.mean()))
    flat = 1 / (alpha - 1)
    potential = (flat - cost.mean()).expand(rows)
    at = _Point(
        torch.full_like(cost, 1 / (rows * columns)), cost + flat - potential[:, None], potential
    )
    best, least = 0.0, math.inf  # a constant function attains 0
    for _ in range(STEPS):
        weight = columns * at.plan.sum(0)
        best = max(best, _attained(cost, weight, alpha))
        least = min(least, _spent(cost, at.plan, alpha))
        if least - best <= tolerance:
            return best
        middle = (at.plan * at.slack).mean()
        ahead = _direction(at, cost, weight, alpha, -at.plan * at.slack)
        reached = at.moved(ahead, _longest(at, ahead, 1.0))
        left = (reached.plan * reached.slack).mean() / middle
        aim = left**3 * middle - at.plan * at.slack - ahead.plan * ahead.slack
        change = _direction(at, cost, weight, alpha, aim)
        at = at.moved(change, _longest(at, change, 0.995))
        if not bool(at.plan.isfinite().all() & at.slack.isfinite().all()):
            break
    raise WorkFailed(
        f"the divergence lies between {best} and {least}, and further steps brought no better; "
        "distances of fewer orders of magnitude, or a smaller alpha, are easier."
    )


def _direction(at: _Point, cost: Tensor, weight: Tensor, alpha: float, aim: Tensor) -> _Point:
    """Newton's step: rows sum to 1/m, cost + f'(weight) = potential + slack, plan * slack as aimed."""
    rows, columns = cost.shape
    ease = at.plan / at.slack
    curvature = columns * weight ** (alpha - 2)
    pull = aim / at.slack - ease * (_slope(weight, alpha) + cost - at.potential[:, None] - at.slack)
    damped = 1 + curvature * ease.sum(0)
    system = ease.sum(1).diag() - (ease * (curvature / damped)) @ ease.mT
    wanted = 1 / rows - at.plan.sum(1) - pull.sum(1) + ease @ (curvature / damped * pull.sum(0))
    potential = cast(Tensor, torch.linalg.solve_ex(system, wanted)[0])  # pyright: ignore[reportUnknownMemberType]
    gained = (pull.sum(0) + potential @ ease) / damped
    plan = pull + ease * (potential[:, None] - curvature * gained)
    return _Point(plan, (aim - at.slack * plan) / at.plan, potential)


def _longest(at: _Point, change: _Point, share: float) -> float:
    """The share of the way to where a plan or slack gets 0, at most the whole step."""
    ways = [(-new / old).amax() for old, new in ((at.plan, change.plan), (at.slack, change.slack))]
    return min(1.0, share / max(float(max(ways)), 1e-300))


def _slope(weight: Tensor, alpha: float) -> Tensor:
    return weight ** (alpha - 1) / (alpha - 1)


def _attained(cost: Tensor, weight: Tensor, alpha: float) -> float:
    """The first line, for the largest 1-Lipschitz function that is at most f'(weight) on the columns."""
    slope = _slope(weight, alpha)
    conjugate = weight**alpha / alpha + 1 / (alpha * (alpha - 1))
    return float((slope + cost).amin(1).mean() - conjugate.mean())


def _spent(cost: Tensor, plan: Tensor, alpha: float) -> float:
    """The second line, for the plan with its rows put right."""
    plan = plan / (len(cost) * plan.sum(1, keepdim=True))
    weight = cost.shape[1] * plan.sum(0)
    return float((plan * cost).sum() + ((weight**alpha - 1) / (alpha * (alpha - 1))).mean())
