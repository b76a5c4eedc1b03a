"""SKIT: is X independent of Y? A sequential kernel test by betting (Podkopaev et al., ICML 2023).

    the first pair only begins
    for each further pair (X1, Y1), (X2, Y2), with D the m points before it:
        f = the payoff of a witness that D was used to find             # mean 0 if independent
        W ← W (1 + λ f)                                                 # λ chosen before
        reject when W >= 1 / α

The witnesses, HSIC, COCO, KCC and a linear one, are in `witnesses`. They read at most `memory`
points, the latest, so that a pair costs O(memory) time, a stream O(n · memory), and the state
O(memory) numbers. Any choice of past points keeps the test valid: the witness need only be known
before the pair.
"""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range, whole
from testtime.guard.betting import Bets, OnlineNewton
from testtime.guard.monitor import Alarm, State, finite, log_mean
from testtime.guard.witnesses import WITNESSES, begin, kernel_widths, resume


@final
@dataclass(frozen=True, kw_only=True)
class Independence:
    """Watches whether pairs (x, y) of a stream are independent.

    The null hypothesis: points come in pairs, and within each pair, given the past, exchanging the
    two y's changes no probability. It holds when points are independent of each other and x of y,
    also when the distributions of x and of y drift slowly. Under it the probability that the alarm
    is ever raised is at most alpha.

    A batch is x (n, d) and y (n, e), or (n, streams, d) and (n, streams, e) for streams that are
    tested side by side; then `Alarm.parts` has the log wealth of each, and the alarm stands for the
    mean of them. A point without a partner waits for the next batch.

    Args:
        gamma_x: inverse squared width of the kernel on x; `Independence.fit` finds it. The witness
            "linear" has no kernels and does not read it; the others need it.
        gamma_y: the same of y.
        alpha: bound on the probability of a false alarm; 0.05.
        bets: how much is bet; `OnlineNewton`, as in the authors' notebook.
        memory: points that the witness reads at most; 1000. The paper keeps all.
        witness: "hsic", as in the authors' notebook, "coco", "kcc", or "linear", which sees
            correlations only, has no kernels and no memory of points, and no bound to its inputs.

    Raises:
        OptionError: an option is out of its range, memory is odd, there is no such witness, or it
            needs a gamma that was not given.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> chance = torch.Generator().manual_seed(0)
        >>> x, noise = torch.randn(2, 600, 1, generator=chance)
        >>> test = Independence.fit(x[:100], noise[:100])
        >>> bool(Monitor(test).update(x[100:], noise[100:]))
        False
        >>> bool(Monitor(test).update(x[100:], (x + noise)[100:]))
        True

    Reference: Podkopaev, Blöbaum, Kasiviswanathan, Ramdas, Sequential Kernelized Independence
    Testing, ICML 2023.
    """

    gamma_x: float | None = None
    gamma_y: float | None = None
    alpha: float = 0.05
    bets: Bets = field(default_factory=OnlineNewton)
    memory: int = 1000
    witness: str = "hsic"

    def __post_init__(self) -> None:
        given = {"gamma_x": self.gamma_x, "gamma_y": self.gamma_y}
        in_range(1e-300, **{name: gamma for name, gamma in given.items() if gamma is not None})
        in_range(1e-12, 1, alpha=self.alpha)
        whole(2, memory=self.memory)
        if self.memory % 2:
            raise OptionError(f"memory is {self.memory}; expected an even number, as pairs enter")
        if self.witness not in WITNESSES:
            raise OptionError(f"witness is {self.witness!r}; expected {', '.join(WITNESSES)}")
        if self.witness != "linear":
            kernel_widths(self)

    @staticmethod
    def fit(
        x: Tensor,
        y: Tensor,
        *,
        alpha: float = 0.05,
        bets: Bets | None = None,
        memory: int = 1000,
        witness: str = "hsic",
    ) -> "Independence":
        """The test with the median heuristic, γ = 1 / (2 median |x - x'|²), on a first chunk.

        Do not send these points through the test as well: its kernels would know them. The witness
        "linear" has no kernels, so nothing of the points is kept.

        Raises:
            InputError: a median distance is 0: at least half of the pairs of points are equal.
        """
        return Independence(
            gamma_x=None if witness == "linear" else median_gamma("x", x),
            gamma_y=None if witness == "linear" else median_gamma("y", y),
            alpha=alpha,
            bets=bets or OnlineNewton(),
            memory=memory,
            witness=witness,
        )

    def init(self) -> State:
        """Nothing is remembered; the shapes are those of the first batch."""
        empty = torch.zeros(0, dtype=torch.float64, device="cpu")
        state = self._begin(empty[:, None], empty[:, None])
        counters = {name: value for name, value in state.items() if not value.is_floating_point()}
        return dict.fromkeys(state, empty) | counters

    def step(self, state: State, x: Tensor, y: Tensor) -> tuple[State, Alarm]:
        """Bets on every whole pair of the batch.

        Raises:
            InputError: x and y are of unlike length, not finite, or of other shapes than before.
        """
        x, y = _pairs(state, finite("x", x), finite("y", y))
        streams = x.shape[1:-1]
        if not state["log_peak"].numel():
            state = self._begin(x, y)
        x = torch.cat([state["late_x"], x])
        y = torch.cat([state["late_y"], y])
        even = len(x) // 2 * 2
        witness = resume(self, state)
        payoffs = [
            payoff
            for i in range(0, even, 2)
            if (payoff := witness.pair(x[i : i + 2], y[i : i + 2])) is not None
        ]
        bets = {name: state[f"bets_{name}"] for name in self.bets.init(streams)}
        together, peak = state["together"], state["log_peak"]
        if payoffs:
            bets, path = self.bets.run(bets, torch.stack(payoffs))
            together = path[-1].clone()
            peak = torch.maximum(peak, log_mean(path.reshape(len(path), -1)).max())
        state = (
            witness.state()
            | {"late_x": x[even:].clone(), "late_y": y[even:].clone()}
            | {"log_peak": peak, "together": together}
            | {f"bets_{name}": value for name, value in bets.items()}
        )
        now = log_mean(together.reshape(-1))
        return state, Alarm(peak >= -math.log(self.alpha), now, together)

    def _begin(self, x: Tensor, y: Tensor) -> State:
        streams = x.shape[1:-1]
        zero = torch.zeros(streams, dtype=torch.float64, device="cpu")
        common = {
            "late_x": x[:0], "late_y": y[:0],
            "log_peak": torch.zeros((), dtype=torch.float64, device="cpu"), "together": zero,
        }  # fmt: skip
        bets = {f"bets_{name}": value for name, value in self.bets.init(streams).items()}
        return begin(self.witness, x, y) | common | bets


def median_gamma(name: str, points: Tensor) -> float:
    """1 / (2 median |x - x'|²) over pairs of different points, of at most the first 1000.

    Raises:
        InputError: fewer than two points, NaN, or a median distance of 0 or beyond the numbers.

    Example:
        >>> median_gamma("x", torch.tensor([[0.0], [1.0], [2.0]]))
        0.5
    """
    points = finite(name, points)
    if points.dim() < 2 or len(points) < 2:
        raise InputError(
            f"{name} has the shape {tuple(points.shape)}; expected (n, d) with at least 2 points."
        )
    flat = points.flatten(0, -2)[:1000]
    median = float(torch.nn.functional.pdist(flat).square().quantile(0.5))
    if median == 0:
        raise InputError(
            f"the median distance of points of {name} is 0: they are constant, or most are equal. "
            "Say gamma yourself, or leave this variable out; a constant depends on nothing."
        )
    if not math.isfinite(median):
        raise InputError(
            f"squared distances of points of {name} overflow; divide them by a constant."
        )
    return 1 / (2 * median)


def _pairs(state: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != y.dim() or x.dim() not in (2, 3) or x.shape[:-1] != y.shape[:-1]:
        raise InputError(
            f"x has the shape {tuple(x.shape)} and y {tuple(y.shape)}; expected (n, d) and (n, e), "
            "or (n, streams, d) and (n, streams, e), with the same n."
        )
    if state["log_peak"].numel():
        for name, given in (("x", x), ("y", y)):
            before = state[f"late_{name}"].shape[1:]
            if given.shape[1:] != before:
                raise InputError(
                    f"points of {name} have the shape {tuple(given.shape[1:])}; those before had "
                    f"{tuple(before)}. Call reset for another stream."
                )
    return x, y
