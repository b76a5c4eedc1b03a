"""Risk monitoring: has a mean risen above what it was, or above what may be tolerated?

    payoff f_t = (s_t - b) / b for scores s_t in [0, 1] and a bound b;  W ← W (1 + λ f_t)

The null hypothesis is that the mean of each score, given the past, is at most b. Nothing else is
asked of the stream: scores may depend on each other and need not be alike. But a stretch in which
scores can be foreseen to be higher, as of one class where labels come sorted, breaks it, though the
mean of the whole stream be at most b. `Risk.fit` takes b from source data: an upper confidence bound
of the source's mean, so that the two errors together stay below alpha at any stopping time.
"""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime.guard.betting import Bets, Mixture, Starting
from testtime.guard.monitor import Alarm, State, finite


@final
@dataclass(frozen=True, kw_only=True)
class Risk:
    """Watches whether the mean of a score in [0, 1] exceeds a bound: with labels a loss, without
    them entropy over ln C, 1 - confidence, disagreement with a second model.

    A batch is scores (n,). Under the null hypothesis, E[s_t | past] <= bound for all t, the
    probability that the alarm is ever raised is at most alpha. The order within a batch is time.

    Args:
        bound: what the mean may be at most, in (0, 1).
        alpha: bound on the probability of a false alarm; 0.05.
        bets: how much is bet; `Starting`, which is ready for a late change.

    Raises:
        OptionError: an option is out of its range.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> source = torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 4
        >>> risk = Risk.fit(source, tolerance=0.05)
        >>> round(risk.bound, 2)
        0.2
        >>> bool(Monitor(risk).update(source)), bool(Monitor(risk).update(source + 0.3))
        (False, True)

    Reference: Podkopaev, Ramdas, Tracking the Risk of a Deployed Model and Detecting Harmful
    Distribution Shifts, ICLR 2022.
    """

    bound: float
    alpha: float = 0.05
    bets: Bets = field(default_factory=Starting)

    def __post_init__(self) -> None:
        in_range(1e-9, 1 - 1e-9, bound=self.bound)
        in_range(1e-12, 1, alpha=self.alpha)

    @staticmethod
    def fit(
        scores: Tensor, *, tolerance: float = 0.0, alpha: float = 0.05, bets: Bets | None = None
    ) -> "Risk":
        """The monitor whose bound is the source's mean, as far as it can be known, plus a tolerance.

        Half of alpha is spent on the confidence bound, half on the stream: if source scores are
        independent draws, the probability of an alarm while the mean of each score, given the past,
        stays within `tolerance` of the source's is at most alpha.

        Args:
            scores: (n,) of source data that was not trained on.
            tolerance: rise of the mean that is still no alarm.
            alpha: bound on the probability of a false alarm.
            bets: how much is bet; `Starting`.

        Raises:
            InputError: scores are not in [0, 1], or so high or so few that no bound below 1 is left.
        """
        in_range(0, 1, tolerance=tolerance)
        in_range(1e-12, 1, alpha=alpha)
        bound = upper_bound(scores, alpha=alpha / 2) + tolerance
        if bound >= 1 - 1e-9:
            raise InputError(
                f"the mean of {len(scores)} source scores may be as high as {bound:.3g} with the "
                "tolerance; expected less than 1. Give more scores, or tolerate less."
            )
        return Risk(bound=max(bound, 1e-9), alpha=alpha / 2, bets=bets or Starting())

    def init(self) -> State:
        """Wealth 1, nothing seen."""
        return self.bets.init(torch.Size()) | {
            "log_peak": torch.zeros((), dtype=torch.float64, device="cpu")
        }

    def step(self, state: State, scores: Tensor) -> tuple[State, Alarm]:
        """Bets on each score in turn.

        Raises:
            InputError: scores are not (n,), or not in [0, 1].
        """
        payoffs = unit("scores", scores) / self.bound - 1
        bets, path = self.bets.run(state, payoffs)
        peak = torch.maximum(state["log_peak"], path.max())
        raised = peak >= -math.log(self.alpha)
        return bets | {"log_peak": peak}, Alarm(raised, path[-1], path[-1:])


def upper_bound(scores: Tensor, *, alpha: float) -> float:
    """An upper confidence bound of the mean of independent scores in [0, 1], by betting.

    It is the smallest m at which a gambler against "the mean is at least m", with payoffs
    (m - s) / (1 - m), reaches the wealth 1 / alpha. Wealth grows with m, so bisection finds it.

    Args:
        scores: (n,) in [0, 1].
        alpha: probability that the mean is higher.

    Returns:
        The bound; 1 where the scores are too few to exclude anything.

    Raises:
        InputError: scores are empty, not finite or not in [0, 1].

    Example:
        >>> round(upper_bound(torch.zeros(100), alpha=0.05), 3)
        0.045

    Reference: Waudby-Smith, Ramdas, Estimating Means of Bounded Random Variables by Betting,
    JRSS-B 2024.
    """
    in_range(1e-12, 1, alpha=alpha)
    scores = unit("scores", scores)
    bets, low, high = Mixture(), float(scores.mean()), 1.0
    if low == high:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        payoffs = (middle - scores) / (1 - middle)
        wealth = bets.run(bets.init(torch.Size()), payoffs)[1].max()
        low, high = (low, middle) if wealth >= -math.log(alpha) else (middle, high)
    return high


def unit(name: str, scores: Tensor) -> Tensor:
    """Scores (n,) as float64; refuses those outside of [0, 1].

    Example:
        >>> unit("scores", torch.tensor([1.5]))
        Traceback (most recent call last):
        testtime._core.errors.InputError: scores lie between 1.5 and 1.5; expected [0, 1]...
    """
    scores = finite(name, scores)
    if scores.dim() != 1:
        raise InputError(f"{name} have the shape {tuple(scores.shape)}; expected (n,).")
    low, high = scores.aminmax()
    if low < -1e-6 or high > 1 + 1e-6:
        raise InputError(
            f"{name} lie between {low:.4g} and {high:.4g}; expected [0, 1]. Divide by the largest "
            "value they can take, e.g. entropies by the logarithm of the number of classes."
        )
    return scores.clamp(0, 1)
