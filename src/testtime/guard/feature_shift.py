"""Which feature has shifted? Tests of all conditional distributions (Kulinski et al., NeurIPS 2020).

    given: reference X (n, d), query Y (n, d)
    p̂ ← density of X, q̂ ← density of Y;  S ← m samples of each
    φ_j = (1 / 2m) Σ_(s in S) ( ∂_j ln p̂(s) - ∂_j ln q̂(s) )²       # score of p(x_j | x_-j)
    null: B times, X* and Y* without a shift, φ* from them
        simple: drawn with replacement from X and Y together
        time:   contiguous windows on both sides of a random cut of clean data
    detect where some φ_j exceeds the quantile 1 - α / d of φ*_j
    localise, if detected: the largest (φ_j - mean φ*_j) / std φ*_j

This is a test of one pair of samples: for each look the false-alarm rate is about alpha if the rounds
are many (few raise it, as `feature_shift` says), and it grows with the number of looks.
"""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range, whole
from testtime._core.seeds import generator
from testtime.guard.densities import Gaussian
from testtime.guard.monitor import State, finite
from testtime.guard.shift_statistics import GaussianScore, Statistic


@dataclass(frozen=True)
class FeatureShift:
    """What the test found.

    Attributes:
        detected: whether any feature's statistic exceeds its threshold.
        features: the features said to have shifted, the most suspicious first; empty if none was
            detected.
        statistic: (d,) φ of each feature.
        threshold: (d,) its quantile 1 - alpha / d without a shift.
        excess: (d,) standard deviations above its mean without a shift.
        p_value: (d,) share of statistics at least as large without a shift, the own one among them:
            of each feature alone, so that d times the least is that of the batch (Bonferroni), and
            never below 1 / (B + 1).
        change_point: sample of a series at which the shift began, as far as it can be told; None
            for a pair of batches, and where none was detected.
    """

    detected: bool
    features: tuple[int, ...]
    statistic: Tensor
    threshold: Tensor
    excess: Tensor
    p_value: Tensor
    change_point: int | None = None

    def __bool__(self) -> bool:
        return self.detected


def feature_shift(
    x: Tensor,
    y: Tensor,
    *,
    statistic: Statistic | None = None,
    bootstrap: int = 250,
    alpha: float = 0.05,
    compromised: int = 1,
    seed: int = 0,
) -> FeatureShift:
    """Tests whether features of a batch have shifted, and which.

    Fitted covariances have 1e-5 added to their diagonal (code), which drowns features whose standard
    deviation is much below 0.003; multiply such ones by a constant.

    Args:
        x: (n, d) reference.
        y: (n', d) query, best as many as in x.
        statistic: `GaussianScore()` by default, or another of `testtime.guard.shift_statistics`.
        bootstrap: B, rounds without a shift; 250 in the paper's experiments. Few raise the rate of false
            alarms: a feature exceeds its quantile of B rounds with a chance of
            (1 + (B - 1) α / d) / (B + 1), so that any of d does with up to α + d / (B + 1), 9 % for ten
            features, 250 rounds and an alpha of 5 %. Give ten times d / alpha, and it is near alpha.
        alpha: probability of a false alarm, shared out to the features after Bonferroni.
        compromised: number of features that are named when a shift is detected.
        seed: of samples and bootstrap.

    Raises:
        InputError: fewer than two samples on a side, unlike numbers of features, or NaN, also of the
            statistic.
        OptionError: an option is out of its range.

    Example:
        >>> chance = torch.Generator().manual_seed(1)
        >>> x, y = torch.randn(2, 400, 4, generator=chance) + torch.randn(2, 400, 1, generator=chance)
        >>> bool(feature_shift(x, y))
        False
        >>> y[:, 2] = y[torch.randperm(400, generator=chance), 2]  # every marginal stays the same
        >>> feature_shift(x, y).features
        (2,)

    Reference: Kulinski, Bagchi, Inouye, Feature Shift Detection: Localizing Which Features Have
    Shifted via Conditional Distribution Tests, NeurIPS 2020.
    """
    x, y = _features("x", x), _features("y", y)
    _check(x, y.shape[1], bootstrap, alpha, compromised)
    statistic = statistic or GaussianScore()
    chance = generator(seed, "feature shift")
    both, count = torch.cat([x, y]), len(x)
    rounds: list[Tensor] = []
    for size in _parts(bootstrap, both.numel()):
        drawn = both[torch.randint(len(both), (size, len(both)), generator=chance, device="cpu")]
        rounds.append(statistic(drawn[:, :count], drawn[:, count:], chance))
    return _decide(statistic(x, y, chance), torch.cat(rounds), alpha, compromised)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesShift:
    """The test for a series: the window just seen against a clean one, for use in `Monitor`.

    A batch is (n, d), or (n,) of one feature, in the order of time. Once a window is full, each update compares it with the
    clean reference window. The threshold is one of a single look (see above); an alarm says which
    features, and where in the window the shift seems to have begun.

    Args:
        reference: (window, d) clean samples.
        null: (B, d) statistics of pairs of clean windows, made by `fit`.
        statistic: what is compared, as of `feature_shift`.
        alpha: level, as there.
        compromised: features that may have shifted, as there.
        seed: of the samples of densities, as there.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> chance = torch.Generator().manual_seed(0)
        >>> series = torch.randn(1500, 4, generator=chance) + torch.randn(1500, 1, generator=chance)
        >>> monitor = Monitor(SeriesShift.fit(series[:1000], window=200))
        >>> bool(monitor.update(series[1000:1200]))
        False
        >>> series[1300:, 1] += 2
        >>> found = monitor.update(series[1200:1400])
        >>> found.features, abs(found.change_point - 300) <= 20
        ((1,), True)
    """

    reference: Tensor
    null: Tensor
    statistic: Statistic
    alpha: float = 0.05
    compromised: int = 1
    seed: int = 0

    @staticmethod
    def fit(
        clean: Tensor,
        *,
        window: int,
        statistic: Statistic | None = None,
        bootstrap: int = 250,
        alpha: float = 0.05,
        compromised: int = 1,
        seed: int = 0,
    ) -> "SeriesShift":
        """Of clean samples (n, d) in the order of time, at least two windows of them.

        Give many: pairs of windows overlap, so with few windows the threshold is too low, more so with
        heavy tails. For windows of 50 and three features of five laws without a shift, at alpha 0.05, a
        look raised an alarm 13 to 27 % of the time with six clean windows, 4 to 13 % with twenty, 3 to
        10 % with sixty.

        Raises:
            InputError: fewer samples than two windows, or NaN.
            OptionError: an option is out of its range.
        """
        whole(2, window=window)
        clean = _features("clean", clean)
        _check(clean, clean.shape[1], bootstrap, alpha, compromised)
        if len(clean) < 2 * window:
            raise InputError(
                f"{len(clean)} clean samples; expected at least two windows, {2 * window}."
            )
        statistic = statistic or GaussianScore()
        chance = generator(seed, "feature shift")
        cuts = torch.randint(
            window, len(clean) - window + 1, (bootstrap,), generator=chance, device="cpu"
        )
        inside = torch.arange(-window, window, device="cpu")
        rounds: list[Tensor] = []
        start = 0
        for size in _parts(bootstrap, 2 * window * clean.shape[1]):
            both = clean[cuts[start : start + size, None] + inside]
            rounds.append(statistic(both[:, :window], both[:, window:], chance))
            start += size
        return SeriesShift(
            reference=clean[-window:], null=torch.cat(rounds), statistic=statistic,
            alpha=alpha, compromised=compromised, seed=seed,
        )  # fmt: skip

    def init(self) -> State:
        """No sample seen."""
        return {
            "latest": self.reference[:0],
            "seen": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def step(self, state: State, x: Tensor) -> tuple[State, FeatureShift]:
        """Compares the latest window with the reference.

        Raises:
            InputError: the batch is not (n, d) with the features of the reference, or NaN.
        """
        if isinstance(x, Tensor) and x.dim() == 1 and self.reference.shape[1] == 1:
            x = x[:, None]
        x, window = _features("x", x, fewest=1), len(self.reference)
        if x.shape[1] != self.reference.shape[1]:
            raise InputError(
                f"the batch has {x.shape[1]} features, and the reference {self.reference.shape[1]}."
            )
        latest = torch.cat([state["latest"], x])[-window:].clone()
        state = {"latest": latest, "seen": state["seen"] + len(x)}
        chance = generator(self.seed, "look", int(state["seen"]))
        if len(latest) < window:
            zero = torch.zeros(x.shape[1], dtype=torch.float64, device="cpu")
            threshold = _threshold(self.null, self.alpha)
            return state, FeatureShift(False, (), zero, threshold, zero, zero + 1)
        value = self.statistic(self.reference, latest, chance)
        found = _decide(value, self.null, self.alpha, self.compromised)
        if not found:
            return state, found
        began = int(state["seen"]) - window + _cut(self.reference, latest)
        return state, replace(found, change_point=began)


def _cut(reference: Tensor, latest: Tensor) -> int:
    """The cut of a window after which it is most likely no longer of the reference's density.

    It maximises, over cuts c, the log-likelihood of the samples after c under the window's own end
    less that under the reference, both Gaussian; the end is the last quarter.
    """
    after = Gaussian.fit(latest[-max(len(latest) // 4, 2) :])
    gain = _log_density(after, latest) - _log_density(Gaussian.fit(reference), latest)
    return int(gain.flip(0).cumsum(0).flip(0).argmax())


def _log_density(density: Gaussian, x: Tensor) -> Tensor:
    away = x - density.mean
    return 0.5 * (away * density.score(x)).sum(-1) - 0.5 * torch.logdet(density.covariance)


def _decide(value: Tensor, null: Tensor, alpha: float, compromised: int) -> FeatureShift:
    if not bool(value.isfinite().all() & null.isfinite().all()):
        raise InputError(
            f"the statistic is {value.tolist()}, or not finite without a shift; expected finite numbers. "
            "Give more samples, or another statistic."
        )
    threshold = _threshold(null, alpha)
    excess = (value - null.mean(0)) / null.std(0).clamp(min=torch.finfo(null.dtype).tiny)
    detected = bool((value > threshold).any())
    order = excess.argsort(descending=True).tolist()
    p_value = (1 + (null >= value).sum(0)).double() / (1 + len(null))
    return FeatureShift(
        detected, tuple(order[:compromised]) if detected else (), value, threshold, excess, p_value
    )


def _threshold(null: Tensor, alpha: float) -> Tensor:
    return null.quantile(1 - alpha / null.shape[1], dim=0)


def _parts(rounds: int, size: int) -> list[int]:
    """Rounds that are computed at once, of at most 4 million numbers."""
    at_once = max(1, min(rounds, 4_000_000 // size))
    return [min(at_once, rounds - start) for start in range(0, rounds, at_once)]


def _features(name: str, x: Tensor, fewest: int = 2) -> Tensor:
    x = finite(name, x)
    if x.dim() != 2 or len(x) < fewest:
        raise InputError(
            f"{name} has the shape {tuple(x.shape)}; expected (n, d) with at least {fewest} samples."
        )
    return x


def _check(x: Tensor, features: int, bootstrap: int, alpha: float, compromised: int) -> None:
    if x.shape[1] != features:
        raise InputError(f"x has {x.shape[1]} features and y {features}; expected the same number.")
    whole(2, bootstrap=bootstrap)
    in_range(1e-12, 1, alpha=alpha)
    whole(1, compromised=compromised)
    if compromised > features:
        raise OptionError(f"compromised is {compromised}; there are only {features} features")
