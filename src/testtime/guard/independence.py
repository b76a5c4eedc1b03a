"""SKIT: is X independent of Y? A sequential kernel test by betting (Podkopaev et al., ICML 2023).

    given: kernels k(x, x') = exp(-γx |x - x'|²), l(y, y') alike; the first pair only begins
    for each further pair (X1, Y1), (X2, Y2), with D the m points before it:
        g(x, y) = ( mean_D k(x, ·) l(y, ·) - mean_D k(x, ·) mean_D l(y, ·) ) / c
        c² = tr(KL) / m² + (1'K1)(1'L1) / m⁴ - 2 (1'KL1) / m³           # its norm, so |f| <= 1
        f = ( g(X1, Y1) + g(X2, Y2) - g(X1, Y2) - g(X2, Y1) ) / 2       # mean 0 if independent
        W ← W (1 + λ f)                                                 # λ chosen before
        reject when W >= 1 / α

The witness g reads at most `memory` points, the latest, so that a pair costs O(memory) time, a
stream O(n · memory), and the state O(memory) numbers. Any choice of past points keeps the test
valid: g need only be known before the pair. The paper's other witnesses, COCO and KCC, are not here.
"""

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range, whole
from testtime.guard.betting import Bets, OnlineNewton
from testtime.guard.monitor import Alarm, State, finite, log_mean


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
        gamma_x: inverse squared width of the kernel on x; `Independence.fit` finds it.
        gamma_y: the same of y.
        alpha: bound on the probability of a false alarm; 0.05.
        bets: how much is bet; `OnlineNewton`, as in the authors' notebook.
        memory: points that the witness reads at most; 1000. The paper keeps all.

    Raises:
        OptionError: an option is out of its range, or memory is odd.

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

    gamma_x: float
    gamma_y: float
    alpha: float = 0.05
    bets: Bets = field(default_factory=OnlineNewton)
    memory: int = 1000

    def __post_init__(self) -> None:
        in_range(1e-300, gamma_x=self.gamma_x, gamma_y=self.gamma_y)
        in_range(1e-12, 1, alpha=self.alpha)
        whole(2, memory=self.memory)
        if self.memory % 2:
            raise OptionError(f"memory is {self.memory}; expected an even number, as pairs enter")

    @staticmethod
    def fit(
        x: Tensor,
        y: Tensor,
        *,
        alpha: float = 0.05,
        bets: Bets | None = None,
        memory: int = 1000,
    ) -> "Independence":
        """The test with the median heuristic, γ = 1 / (2 median |x - x'|²), on a first chunk.

        Do not send these points through the test as well: its kernels would know them.

        Raises:
            InputError: a median distance is 0: at least half of the pairs of points are equal.
        """
        return Independence(
            gamma_x=median_gamma("x", x),
            gamma_y=median_gamma("y", y),
            alpha=alpha,
            bets=bets or OnlineNewton(),
            memory=memory,
        )

    def init(self) -> State:
        """Nothing is remembered; the shapes are those of the first batch."""
        empty = torch.zeros(0, dtype=torch.float64)
        names = ("x", "y", "rows_k", "rows_l", "trace", "late_x", "late_y", "log_peak", "together")
        return dict.fromkeys((*names, *_bet_names(self.bets)), empty) | _times(self.bets)

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
        memory = _Memory(self, state)
        payoffs = [
            payoff
            for i in range(0, even, 2)
            if (payoff := memory.pair(x[i : i + 2], y[i : i + 2])) is not None
        ]
        bets = {name: state[f"bets_{name}"] for name in self.bets.init(streams)}
        together, peak = state["together"], state["log_peak"]
        if payoffs:
            bets, path = self.bets.run(bets, torch.stack(payoffs))
            together = path[-1]
            peak = torch.maximum(peak, log_mean(path.reshape(len(path), -1)).max())
        state = (
            memory.state()
            | {"late_x": x[even:].clone(), "late_y": y[even:].clone()}
            | {"log_peak": peak, "together": together}
            | {f"bets_{name}": value for name, value in bets.items()}
        )
        now = log_mean(together.reshape(-1))
        return state, Alarm(peak >= -torch.tensor(self.alpha).log(), now, together)

    def _begin(self, x: Tensor, y: Tensor) -> State:
        streams = x.shape[1:-1]
        zero = torch.zeros(streams, dtype=torch.float64)
        return {
            "x": x[:0], "y": y[:0], "late_x": x[:0], "late_y": y[:0],
            "rows_k": zero[None][:0], "rows_l": zero[None][:0], "trace": zero,
            "log_peak": torch.zeros((), dtype=torch.float64), "together": zero,
        } | {f"bets_{name}": value for name, value in self.bets.init(streams).items()}  # fmt: skip


class _Memory:
    """The points that the witness reads, and the sums that give its norm.

    trace is tr(KL), rows_k is K1 and rows_l is L1. A pair changes them in O(memory).
    """

    def __init__(self, test: Independence, state: State) -> None:
        self.test = test
        self.x, self.y = state["x"], state["y"]
        self.rows_k, self.rows_l, self.trace = state["rows_k"], state["rows_l"], state["trace"]

    def state(self) -> State:
        # clones: these may be views of larger tensors
        return {
            name: getattr(self, name).clone() for name in ("x", "y", "rows_k", "rows_l", "trace")
        }

    def pair(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The payoff of a pair, which then enters; None for the first."""
        k = [_kernel(self.test.gamma_x, self.x, each) for each in x]
        l = [_kernel(self.test.gamma_y, self.y, each) for each in y]  # noqa: E741
        payoff = self._payoff(k[0] - k[1], l[0] - l[1]) if len(self.x) else None
        self._enter(x, y, k, l)
        if len(self.x) > self.test.memory:
            self._leave()
        return payoff

    def _payoff(self, k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        m = len(k)
        norm = (
            self.trace / m**2
            + self.rows_k.sum(0) * self.rows_l.sum(0) / m**4
            - 2 * (self.rows_k * self.rows_l).sum(0) / m**3
        )
        witness = (k * l).mean(0) - k.mean(0) * l.mean(0)
        # where all points of one variable are equal, the witness is 0 and nothing can be won
        safe = norm > 1e-12
        return torch.where(safe, witness / (2 * norm.clamp(min=1e-12).sqrt()), 0).clamp(-1, 1)

    def _enter(self, x: Tensor, y: Tensor, k: list[Tensor], l: list[Tensor]) -> None:  # noqa: E741
        k_both = _kernel(self.test.gamma_x, x[:1], x[1])[0]
        l_both = _kernel(self.test.gamma_y, y[:1], y[1])[0]
        self.trace = self.trace + 2 * (1 + k_both * l_both)
        self.trace = self.trace + 2 * (k[0] * l[0] + k[1] * l[1]).sum(0)
        new_k = torch.stack([1 + k_both + each.sum(0) for each in k])
        new_l = torch.stack([1 + l_both + each.sum(0) for each in l])
        self.rows_k = torch.cat([self.rows_k + k[0] + k[1], new_k])
        self.rows_l = torch.cat([self.rows_l + l[0] + l[1], new_l])
        self.x, self.y = torch.cat([self.x, x]), torch.cat([self.y, y])

    def _leave(self) -> None:
        """The oldest two points are forgotten."""
        for _ in range(2):
            k = _kernel(self.test.gamma_x, self.x, self.x[0])
            l = _kernel(self.test.gamma_y, self.y, self.y[0])  # noqa: E741
            self.trace = self.trace - 2 * (k * l).sum(0) + 1
            self.rows_k, self.rows_l = (self.rows_k - k)[1:], (self.rows_l - l)[1:]
            self.x, self.y = self.x[1:], self.y[1:]


def median_gamma(name: str, points: Tensor) -> float:
    """1 / (2 median |x - x'|²) over pairs of different points, of at most the first 1000.

    Raises:
        InputError: fewer than two points, NaN, or a median distance of 0.

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
    return 1 / (2 * median)


def _kernel(gamma: float, points: Tensor, point: Tensor) -> Tensor:
    """exp(-γ |points - point|²): (m, *streams)."""
    return (points - point).square().sum(-1).mul(-gamma).exp()


def _pairs(state: State, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != y.dim() or x.dim() not in (2, 3) or x.shape[:-1] != y.shape[:-1]:
        raise InputError(
            f"x has the shape {tuple(x.shape)} and y {tuple(y.shape)}; expected (n, d) and (n, e), "
            "or (n, streams, d) and (n, streams, e), with the same n."
        )
    if state["log_peak"].numel():
        for name, given in (("x", x), ("y", y)):
            if given.shape[1:] != state[name].shape[1:]:
                raise InputError(
                    f"points of {name} have the shape {tuple(given.shape[1:])}; those before had "
                    f"{tuple(state[name].shape[1:])}. Call reset for another stream."
                )
    return x, y


def _bet_names(bets: Bets) -> list[str]:
    return [f"bets_{name}" for name in bets.init(torch.Size())]


def _times(bets: Bets) -> State:
    """Whole numbers of a strategy's state: counters, which are the same for all streams."""
    state = bets.init(torch.Size())
    return {f"bets_{k}": v for k, v in state.items() if not v.is_floating_point()}
