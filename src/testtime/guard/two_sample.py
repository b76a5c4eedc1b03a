"""Two samples, one stream: are new points distributed as points of a reference that come with them?

Each pair is a reference point with the label 0 and a new point with the label 1, and SKIT asks
whether point and label are independent. With labels, its witness is that of the maximum mean
discrepancy, g(z) ∝ mean_D k(z, new) - mean_D k(z, reference), and its payoff is
( g(new) - g(reference) ) / √2 with g of norm 1.
"""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime.guard.betting import Bets, OnlineNewton
from testtime.guard.independence import Independence, median_gamma
from testtime.guard.monitor import Alarm, State, finite

APART = 50.0
"""Kernel parameter of labels: exp(-50) between unlike ones, which is none."""


@final
@dataclass(frozen=True, kw_only=True)
class TwoSample:
    """Watches whether new points have the distribution of fresh reference points.

    A batch is reference (n, d) and new points (n, d), or (n, streams, d) of both. The null
    hypothesis: in each pair, given the past, exchanging the two changes no probability. Under it
    the probability that the alarm is ever raised is at most alpha, so the reference points must be
    fresh: drawn from the source, not sent twice. Where the reference is a fixed set that a long
    stream would use up, `Exchangeability` is the test to use.

    Args:
        gamma: inverse squared width of the kernel; `TwoSample.fit` finds it.
        alpha: bound on the probability of a false alarm; 0.05.
        bets: how much is bet.
        memory: points that the witness reads at most, both kinds together.

    Raises:
        OptionError: an option is out of its range.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> chance = torch.Generator().manual_seed(0)
        >>> first, reference, new = torch.randn(3, 300, 2, generator=chance)
        >>> test = TwoSample.fit(first)
        >>> bool(Monitor(test).update(reference, new))
        False
        >>> bool(Monitor(test).update(reference, new + 1))
        True

    References: Shekhar, Ramdas, Nonparametric Two-Sample Testing by Betting, 2023. Podkopaev et
    al., ICML 2023.
    """

    gamma: float
    alpha: float = 0.05
    bets: Bets = field(default_factory=OnlineNewton)
    memory: int = 1000

    def __post_init__(self) -> None:
        self._test()

    @staticmethod
    def fit(
        reference: Tensor, *, alpha: float = 0.05, bets: Bets | None = None, memory: int = 1000
    ) -> "TwoSample":
        """The test with the median heuristic on reference points that are not sent again.

        Raises:
            InputError: a median distance is 0: at least half of the pairs of points are equal.
        """
        gamma = median_gamma("reference", reference)
        return TwoSample(gamma=gamma, alpha=alpha, bets=bets or OnlineNewton(), memory=memory)

    def init(self) -> State:
        """Nothing is remembered."""
        return self._test().init()

    def step(self, state: State, reference: Tensor, new: Tensor) -> tuple[State, Alarm]:
        """Bets on every pair of a reference point and a new one.

        Raises:
            InputError: the two are of unlike shapes, not finite, or of other shapes than before.
        """
        reference, new = finite("reference", reference), finite("new", new)
        if reference.shape != new.shape or new.dim() not in (2, 3):
            raise InputError(
                f"reference has the shape {tuple(reference.shape)} and new {tuple(new.shape)}; "
                "expected (n, d) or (n, streams, d), the same for both."
            )
        points = torch.stack([reference, new], 1).flatten(0, 1)
        labels = torch.zeros(*points.shape[:-1], 1, dtype=torch.float64, device="cpu")
        labels[1::2] = 1
        return self._test().step(state, points, labels)

    def _test(self) -> Independence:
        return Independence(
            gamma_x=self.gamma, gamma_y=APART, alpha=self.alpha, bets=self.bets, memory=self.memory
        )
