"""How much to bet: a gambler's wealth that is a test which may be stopped at any time.

    W_0 = 1,    W_t = W_(t-1) (1 + λ_t f_t),    alarm when W_t >= 1 / α

The payoff f_t lies in [-1, ∞) and, under the null hypothesis, its mean given the past is at most 0.
If λ_t in [0, 1) is chosen before f_t is seen, W is a non-negative supermartingale, and Ville's
inequality bounds the probability that it ever reaches 1 / α by α. The strategies here differ in how
λ_t is chosen, thus in how fast wealth grows when the null is false, never in this bound.

All take payoffs `(n, *streams)`, one row after another, and answer the logarithm of the wealth
after each row. A state is a dictionary of tensors `(..., *streams)`.

References: Ville, Étude critique de la notion de collectif, 1939. Shafer, Testing by Betting, 2021.
Waudby-Smith, Ramdas, Estimating Means of Bounded Random Variables by Betting, 2024.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, final

import torch
from torch import Tensor

from testtime._core.errors import OptionError
from testtime._core.options import shown
from testtime.guard.monitor import State


class Bets(Protocol):
    """A betting strategy."""

    def init(self, streams: torch.Size) -> State:
        """The state before the first payoff."""
        ...

    def run(self, state: State, payoffs: Tensor) -> tuple[State, Tensor]:
        """The state after the payoffs, and the log wealth after each of them."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class OnlineNewton:
    """Online Newton steps on the logarithm of the wealth.

        z = f / (1 + λ f),    a ← a + z²,    λ ← clip( λ + 2 / (2 - ln 3) · z / a, 0, limit )

    with λ = 0 and a = 1 at first.

    Args:
        limit: largest fraction that is bet; 0.5 (SKIT's notebook).

    Raises:
        OptionError: limit is not in (0, 1).

    Example:
        >>> bets = OnlineNewton()
        >>> _, log_wealth = bets.run(bets.init(torch.Size()), torch.ones(3))
        >>> [round(w, 4) for w in log_wealth.exp().tolist()]
        [1.0, 1.5, 2.25]

    Reference: Cutkosky, Orabona, Black-Box Reductions for Parameter-free Online Learning in Banach
    Spaces, COLT 2018.
    """

    limit: float = 0.5

    def __post_init__(self) -> None:
        _check_fractions("limit", (self.limit,))

    def init(self, streams: torch.Size) -> State:
        """No wealth won, nothing bet."""
        zero = torch.zeros(streams, dtype=torch.float64, device="cpu")
        return {"log_wealth": zero, "fraction": zero, "curvature": zero + 1}

    def run(self, state: State, payoffs: Tensor) -> tuple[State, Tensor]:
        """One Newton step after each payoff."""
        wealth, fraction, curvature = state["log_wealth"], state["fraction"], state["curvature"]
        payoffs = payoffs.to(wealth.device)
        path = torch.empty(payoffs.shape, dtype=torch.float64, device=wealth.device)
        rate = 2 / (2 - math.log(3))
        for i, payoff in enumerate(payoffs):
            path[i] = wealth = wealth + (fraction * payoff).log1p()
            slope = payoff / (1 + fraction * payoff)
            curvature = curvature + slope.square()
            fraction = (fraction + rate * slope / curvature).clamp(0, self.limit)
        return {"log_wealth": wealth, "fraction": fraction, "curvature": curvature}, path


@final
@dataclass(frozen=True, kw_only=True)
class Grapa:
    """The approximate growth-rate adaptive bet (aGRAPA): mean payoff over mean squared payoff.

        λ_t = clip( mean f / mean f², 0, limit )

    over past payoffs and one that was never paid, with f = 0.001 and f² = 1.

    Args:
        limit: largest fraction that is bet; 0.9 (SKIT's code).

    Raises:
        OptionError: limit is not in (0, 1).

    Example:
        >>> bets = Grapa()
        >>> _, log_wealth = bets.run(bets.init(torch.Size()), torch.ones(3))
        >>> [round(w, 4) for w in log_wealth.exp().tolist()]
        [1.001, 1.502, 2.504]

    Reference: Waudby-Smith, Ramdas, 2024, Appendix B.
    """

    limit: float = 0.9

    def __post_init__(self) -> None:
        _check_fractions("limit", (self.limit,))

    def init(self, streams: torch.Size) -> State:
        """As if one payoff of 0.001 had been seen, its square 1."""
        zero = torch.zeros(streams, dtype=torch.float64, device="cpu")
        return {"log_wealth": zero, "sum": zero + 1e-3, "squares": zero + 1}

    def run(self, state: State, payoffs: Tensor) -> tuple[State, Tensor]:
        """The fractions of all rows at once: each reads the sums of the rows before it."""
        payoffs = payoffs.to(state["sum"])
        total = state["sum"] + payoffs.cumsum(0)
        squares = state["squares"] + payoffs.square().cumsum(0)
        sums_before = torch.cat([state["sum"][None], total[:-1]])
        squares_before = torch.cat([state["squares"][None], squares[:-1]])
        fractions = (sums_before / squares_before).clamp(0, self.limit)
        path = state["log_wealth"] + (fractions * payoffs).log1p().cumsum(0)
        return _last(log_wealth=path, sum=total, squares=squares), path


@final
@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The mean wealth of gamblers who each bet one fraction for ever.

    Args:
        fractions: of the gamblers; 19 from 0.05 to 0.95 (SKIT's code).

    Raises:
        OptionError: a fraction is not in (0, 1), or there is none.

    Example:
        >>> bets = Mixture(fractions=(0.25, 0.75))
        >>> _, log_wealth = bets.run(bets.init(torch.Size()), torch.ones(2))
        >>> [round(w, 4) for w in log_wealth.exp().tolist()]
        [1.5, 2.3125]
    """

    fractions: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))

    def __post_init__(self) -> None:
        _check_fractions("fractions", self.fractions)

    def init(self, streams: torch.Size) -> State:
        """All gamblers with the same wealth; together 1."""
        shape = (len(self.fractions), *streams)
        return {
            "gamblers": torch.full(shape, -math.log(shape[0]), dtype=torch.float64, device="cpu")
        }

    def run(self, state: State, payoffs: Tensor) -> tuple[State, Tensor]:
        """The log wealth of all gamblers together."""
        steps = _log_factors(self.fractions, payoffs.to(state["gamblers"]))
        paths = state["gamblers"] + steps.cumsum(0)
        return _last(gamblers=paths), paths.logsumexp(1)


@final
@dataclass(frozen=True, kw_only=True)
class Starting:
    """A mixture over fractions and over the time at which betting begins, for late changes.

    A share of the first wealth is kept for gamblers who begin at each time t:

        share(t) = tail(t) - tail(t + 1),    tail(t) = 1 / log2(t + 2)

    so that a change at time t costs ln t + 2 ln ln t + O(1) nats, and not what a gambler lost in
    betting before it. The wealth is a mean of non-negative supermartingales, and so is one. Time
    and memory for each payoff do not grow.

    Args:
        fractions: of the gamblers who begin at each time.

    Raises:
        OptionError: a fraction is not in (0, 1), or there is none.

    Example:
        >>> bets = Starting()
        >>> quiet = bets.run(bets.init(torch.Size()), -torch.ones(1000))[0]
        >>> bets.run(quiet, torch.ones(40))[1][-1] > math.log(1 / 0.05)
        tensor(True)
    """

    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)

    def __post_init__(self) -> None:
        _check_fractions("fractions", self.fractions)

    def init(self, streams: torch.Size) -> State:
        """Nobody has begun."""
        shape = (len(self.fractions), *streams)
        return {
            "gamblers": torch.full(shape, -math.inf, dtype=torch.float64, device="cpu"),
            "time": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def run(self, state: State, payoffs: Tensor) -> tuple[State, Tensor]:
        """The log wealth of those who wait and of those who bet.

        The gamblers' mass follows M ← (M + share) (1 + λ f). With C the cumulated log factors this
        is log M_t = C_t + log( M_0 + Σ_(s <= t) share_s e^(-C_(s-1)) ), for all rows at once.
        """
        time = state["time"] + torch.arange(len(payoffs) + 1, device=state["time"].device)
        tail = 1 / (time.double() + 2).log2()
        share = ((tail[:-1] - tail[1:]) / len(self.fractions)).log()
        share = share.view(-1, *[1] * payoffs.dim())
        steps = _log_factors(self.fractions, payoffs.to(state["gamblers"]))
        gone = steps.cumsum(0)
        begun = torch.cat([state["gamblers"][None], share - (gone - steps)])
        paths = gone + begun.logcumsumexp(0)[1:]
        waiting = tail[1:].log().view(-1, *[1] * (payoffs.dim() - 1))
        together = torch.logaddexp(paths.logsumexp(1), waiting)
        return _last(gamblers=paths, time=time), together


def _log_factors(fractions: tuple[float, ...], payoffs: Tensor) -> Tensor:
    """ln(1 + λ f) for each fraction, of payoffs in float64: (n, fractions, *streams)."""
    column = payoffs.new_tensor(fractions).view(-1, *[1] * (payoffs.dim() - 1))
    return (column * payoffs[:, None]).log1p()


def _last(**paths: Tensor) -> State:
    """Clones of the last rows: a view would keep all of them."""
    return {name: path[-1].clone() for name, path in paths.items()}


def _check_fractions(name: str, fractions: tuple[float, ...]) -> None:
    several = isinstance(fractions, tuple | list) and len(fractions) > 0
    if not several or not all(isinstance(each, Real) and 0 < each < 1 for each in fractions):
        raise OptionError(
            f"{name} is {shown(fractions)}; expected numbers between 0 and 1, both excluded: who bets "
            "all can lose all."
        )
