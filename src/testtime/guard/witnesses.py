"""What the sequential independence test bets on: four functions that tell pairs from strangers.

    given: kernels k(x, x') = exp(-γx |x - x'|²), l(y, y') alike, and D, the m points before the pair

HSIC    g(x, y) = ( mean_D k(x, ·) l(y, ·) - mean_D k(x, ·) mean_D l(y, ·) ) / c
        c² = tr(KL) / m² + (1'K1)(1'L1) / m⁴ - 2 (1'KL1) / m³            # its norm
        f = ( g(X1, Y1) + g(X2, Y2) - g(X1, Y2) - g(X2, Y1) ) / 2

COCO    K ≈ GG', L ≈ FF' by incomplete Cholesky, up to a trace of 0.001 m; centre the columns
        g, h = the leading singular pair of G'F / m, each with a norm of at most 1
        f = ( g(X2) - g(X1) ) ( h(Y2) - h(Y1) ) / 4
KCC     the same of  (G'G / m + κ)^(-1/2) G'F / m (F'F / m + κ)^(-1/2),  κ = 0.1

linear  C = the covariance of x and y over all points before, W = (X1 - X2)' C (Y1 - Y2)
        f = tanh( W / root mean square of W so far )                     # for kernels without a bound

All lie in [-1, 1] and change their sign where the two y are exchanged, so each has the mean 0 under
the null hypothesis, whatever the points before are. The pair of COCO and KCC is found anew when
2, 8, 18, …, 2k² points were seen, in O(m r²) for r columns of the factors: few columns where points
have few coordinates, nearly m where they have many.

The authors' code multiplies factors whose rows it has permuted, those of x otherwise than those of
y, so its COCO and KCC learn from points that belong to different pairs; here rows stay in order. Its
rule for when to seek anew gives 2k², but the counter it uses is raised by every pair as well, which
makes 2, 8, 30, 100, 314, … With these two mended the payoffs are equal. Where the first two points
are nearly equal it adds noise; here such points bet nothing.
"""

import math
from typing import Protocol, final

import torch
from torch import Tensor

from testtime._core.errors import OptionError
from testtime.guard.monitor import State

WITNESSES = ("hsic", "coco", "kcc", "linear")

RIDGE = 0.1
"""κ of KCC (code)."""


class Kernels(Protocol):
    """What a witness reads of its test."""

    @property
    def gamma_x(self) -> float | None: ...
    @property
    def gamma_y(self) -> float | None: ...
    @property
    def witness(self) -> str: ...
    @property
    def memory(self) -> int: ...


class Witness(Protocol):
    """A bet that learns from the pairs it was paid for."""

    def state(self) -> State:
        """All that it remembers."""
        ...

    def pair(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The payoff of a pair, (*streams,), which then enters; None for the first."""
        ...


def kernel_widths(test: Kernels) -> tuple[float, float]:
    """Both gammas of a test whose witness has kernels.

    Raises:
        OptionError: one was not given.
    """
    if test.gamma_x is None or test.gamma_y is None:
        missing = "gamma_x" if test.gamma_x is None else "gamma_y"
        raise OptionError(
            f"{missing} is None; expected a number above 0, as the witness {test.witness!r} has "
            "kernels. Let Independence.fit find it, or take witness='linear', which has none."
        )
    return test.gamma_x, test.gamma_y


def begin(witness: str, x: Tensor, y: Tensor) -> State:
    """The state of a witness before points like these, (n, *streams, d) and (n, *streams, e)."""
    none = x[:0, ..., 0]
    if witness == "linear":
        across = x[:0, ..., :, None] * y[:0, ..., None, :]
        return {
            "seen": torch.zeros((), dtype=torch.int64, device="cpu"), "squares": none.sum(0),
            "mean_x": x[:0].sum(0), "mean_y": y[:0].sum(0), "across": across.sum(0),
        }  # fmt: skip
    if witness == "hsic":
        own = {"rows_k": none, "rows_l": none, "trace": x.new_zeros(x.shape[1:-1])}
    else:
        own = {
            "seen": torch.zeros((), dtype=torch.int64, device="cpu"),
            "fitted_x": x[:0], "fitted_y": y[:0], "weights_x": none, "weights_y": none,
        }  # fmt: skip
    return {"x": x[:0], "y": y[:0]} | own


def resume(test: Kernels, state: State) -> Witness:
    """The witness of a test where its state was left."""
    if test.witness == "linear":
        return Linear(state)
    return Hsic(test, state) if test.witness == "hsic" else Correlated(test, state)


@final
class Hsic:
    """All points in memory, and the sums that give the norm of their witness.

    trace is tr(KL), rows_k is K1 and rows_l is L1. A pair changes them in O(memory).
    """

    def __init__(self, test: Kernels, state: State) -> None:
        self.test, self.gammas = test, kernel_widths(test)
        self.x, self.y = state["x"], state["y"]
        self.rows_k, self.rows_l, self.trace = state["rows_k"], state["rows_l"], state["trace"]

    def state(self) -> State:
        """Clones: these may be views of larger tensors."""
        return {
            name: getattr(self, name).clone() for name in ("x", "y", "rows_k", "rows_l", "trace")
        }

    def pair(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The payoff of a pair, which then enters; None for the first."""
        near_x = [kernel(self.gammas[0], self.x, each) for each in x]
        near_y = [kernel(self.gammas[1], self.y, each) for each in y]
        risen = near_x[0] - near_x[1], near_y[0] - near_y[1]
        payoff = self._payoff(*risen) if len(self.x) else None
        self._enter(x, y, near_x, near_y)
        while len(self.x) > self.test.memory:  # more than one pair where a state had more
            self._leave()
        return payoff

    def _payoff(self, near_x: Tensor, near_y: Tensor) -> Tensor:
        m = len(near_x)
        norm = (
            self.trace / m**2
            + self.rows_k.sum(0) * self.rows_l.sum(0) / m**4
            - 2 * (self.rows_k * self.rows_l).sum(0) / m**3
        )
        witness = (near_x * near_y).mean(0) - near_x.mean(0) * near_y.mean(0)
        # where all points of one variable are equal, the witness is 0 and nothing can be won
        safe = norm > 1e-12
        return torch.where(safe, witness / (2 * norm.clamp(min=1e-12).sqrt()), 0).clamp(-1, 1)

    def _enter(self, x: Tensor, y: Tensor, near_x: list[Tensor], near_y: list[Tensor]) -> None:
        k_both = kernel(self.gammas[0], x[:1], x[1])[0]
        l_both = kernel(self.gammas[1], y[:1], y[1])[0]
        self.trace = self.trace + 2 * (1 + k_both * l_both)
        self.trace = self.trace + 2 * (near_x[0] * near_y[0] + near_x[1] * near_y[1]).sum(0)
        new_k = torch.stack([1 + k_both + each.sum(0) for each in near_x])
        new_l = torch.stack([1 + l_both + each.sum(0) for each in near_y])
        self.rows_k = torch.cat([self.rows_k + near_x[0] + near_x[1], new_k])
        self.rows_l = torch.cat([self.rows_l + near_y[0] + near_y[1], new_l])
        self.x, self.y = torch.cat([self.x, x]), torch.cat([self.y, y])

    def _leave(self) -> None:
        """The oldest two points are forgotten."""
        for _ in range(2):
            near_x = kernel(self.gammas[0], self.x, self.x[0])
            near_y = kernel(self.gammas[1], self.y, self.y[0])
            self.trace = self.trace - 2 * (near_x * near_y).sum(0) + 1
            self.rows_k = (self.rows_k - near_x)[1:]
            self.rows_l = (self.rows_l - near_y)[1:]
            self.x, self.y = self.x[1:], self.y[1:]


@final
class Correlated:
    """COCO and KCC: a function of x and one of y that covaried most when they were last sought.

    g = Σ weights_x k(fitted_x, ·), h alike; seen counts all points that have entered.
    """

    def __init__(self, test: Kernels, state: State) -> None:
        self.test, self.gammas = test, kernel_widths(test)
        self.x, self.y, self.seen = state["x"], state["y"], int(state["seen"])
        self.fitted = state["fitted_x"], state["fitted_y"]
        self.weights = state["weights_x"], state["weights_y"]

    def state(self) -> State:
        """Clones: these may be views of larger tensors."""
        return {
            "x": self.x.clone(), "y": self.y.clone(), "seen": torch.tensor(self.seen, device="cpu"),
            "fitted_x": self.fitted[0].clone(), "fitted_y": self.fitted[1].clone(),
            "weights_x": self.weights[0].clone(), "weights_y": self.weights[1].clone(),
        }  # fmt: skip

    def pair(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The payoff of a pair, which then enters; None for the first."""
        payoff = self._rise(0, x) * self._rise(1, y) / 4 if self.seen else None
        memory = self.test.memory
        self.x, self.y = torch.cat([self.x, x])[-memory:], torch.cat([self.y, y])[-memory:]
        self.seen += 2
        if 2 * math.isqrt(self.seen // 2) ** 2 == self.seen:
            self._fit()
        return payoff

    def _rise(self, side: int, pair: Tensor) -> Tensor:
        """g(X2) - g(X1), or the same of h."""
        gamma = self.gammas[side]
        first, second = (kernel(gamma, self.fitted[side], each) for each in pair)
        return (self.weights[side] * (second - first)).sum(0)

    def _fit(self) -> None:
        ridge = RIDGE if self.test.witness == "kcc" else None
        self.fitted = self.x, self.y
        if self.x.dim() == 2:
            self.weights = leading_pair(self.x, self.y, self.gammas, ridge=ridge)
            return
        streams = zip(self.x.unbind(1), self.y.unbind(1), strict=True)
        found = [leading_pair(x, y, self.gammas, ridge=ridge) for x, y in streams]
        self.weights = (
            torch.stack([x for x, _ in found], 1), torch.stack([y for _, y in found], 1)
        )  # fmt: skip


@final
class Linear:
    """All points at once: their number, means, and m times their covariance, as `across`.

    squares is the sum of W² of all pairs but the first; memory does not matter.
    """

    def __init__(self, state: State) -> None:
        self.seen, self.squares, self.across = (
            int(state["seen"]), state["squares"], state["across"]
        )  # fmt: skip
        self.mean_x, self.mean_y = state["mean_x"], state["mean_y"]

    def state(self) -> State:
        """Clones: these may be views of larger tensors."""
        names = ("squares", "mean_x", "mean_y", "across")
        return {name: getattr(self, name).clone() for name in names} | {
            "seen": torch.tensor(self.seen, device="cpu")
        }

    def pair(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The payoff of a pair, which then enters; None for the first, 0 for the second."""
        payoff = None
        if self.seen:
            covariance = self.across / self.seen
            w = torch.einsum("...d,...de,...e->...", x[0] - x[1], covariance, y[0] - y[1])
            scale = (self.squares / max(self.seen // 2 - 1, 1)).sqrt()
            # squares that leave the numbers bet nothing
            payoff = torch.where(scale > 0, (w / scale).nan_to_num(nan=0.0), 0).tanh()
            self.squares = self.squares + w.square()
        for point, other in zip(x, y, strict=True):
            self.seen += 1
            away = point - self.mean_x
            self.mean_x = self.mean_x + away / self.seen
            self.mean_y = self.mean_y + (other - self.mean_y) / self.seen
            self.across = self.across + away[..., :, None] * (other - self.mean_y)[..., None, :]
        return payoff


def leading_pair(
    x: Tensor, y: Tensor, gammas: tuple[float, float], *, ridge: float | None
) -> tuple[Tensor, Tensor]:
    """Weights of the points, (m,) each, of the two functions that covary most; 0 for constants.

    Args:
        x: (m, d) in double precision.
        y: (m, e) alike.
        gammas: of the two kernels.
        ridge: κ of KCC; None for COCO.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
        >>> g, h = leading_pair(x, 5 * x, (1.0, 1.0), ridge=None)
        >>> bool((g * h > 0).all())
        True
    """
    m, sides = len(x), []
    for points, gamma in zip((x, y), gammas, strict=True):
        factor, error = incomplete_cholesky(points, gamma, tolerance=1e-3 * m)
        basis, sizes, _ = torch.linalg.svd(factor - factor.mean(0), full_matrices=False)
        kept = sizes >= 1e-8
        basis, sizes = basis[:, kept], sizes[kept]
        scale = torch.ones_like(sizes) if ridge is None else (sizes**2 / m + ridge).rsqrt()
        sides.append((basis, sizes, scale, error))
    (left, *_), (right, *_) = sides
    if not left.numel() or not right.numel():
        return x.new_zeros(m), y.new_zeros(m)
    across = (left * sides[0][1] * sides[0][2]).T @ (right * sides[1][1] * sides[1][2])
    u, _, v = torch.linalg.svd(across, full_matrices=False)
    weights = []
    for (basis, sizes, scale, error), top in zip(sides, (u[:, 0], v[0]), strict=True):
        own = basis @ (scale / sizes * top)
        # a'Ka <= |G'a|² + |a|² tr(K - GG'), so the function's norm is at most 1
        weights.append(own / (own.square().sum() * error + (scale * top).square().sum()).sqrt())
    return weights[0], weights[1]


def incomplete_cholesky(points: Tensor, gamma: float, *, tolerance: float) -> tuple[Tensor, Tensor]:
    """G (m, r) with K ≈ GG', and the trace of what is left, at most the tolerance.

    The column of the point that is explained least comes next; K itself is never written down.

    Example:
        >>> points = torch.tensor([[0.0], [0.0], [9.0]], dtype=torch.float64)
        >>> factor, left = incomplete_cholesky(points, 1.0, tolerance=1e-6)
        >>> factor.shape, bool(left < 1e-6)
        (torch.Size([3, 2]), True)
    """
    left = points.new_ones(len(points))
    factor = points.new_zeros(len(points), 0)
    while bool(left.sum() > tolerance):
        worst = left.argmax()
        column = kernel(gamma, points, points[worst]) - factor @ factor[worst]
        column = column / left[worst].sqrt()
        factor = torch.cat([factor, column[:, None]], 1)
        left = (left - column.square()).clamp(min=0)
    return factor, left.sum()


def kernel(gamma: float, points: Tensor, point: Tensor) -> Tensor:
    """exp(-γ |points - point|²): (m, *streams).

    Example:
        >>> kernel(1.0, torch.zeros(2, 3), torch.zeros(3))
        tensor([1., 1.])
    """
    return (points - point).square().sum(-1).mul(-gamma).exp()
