"""Does a stream still look like the reference? An exact test that never ends, in bounded memory.

    given: n reference values; their order statistics cut the line into n + 1 gaps, in K bins
    for each new value, in bin b:
        p = ( Σ_(j > b) c_j + U c_b ) / Σ_j c_j,    U uniform       # c_j: gaps of bin j + values in it
        bet on 2p - 1, on 1 - 2p (it rose, it fell), on 4|p - 1/2| - 1 and its negative (wider, narrower)
        c_b ← c_b + 1

If reference and stream are exchangeable, the next value falls into bin j with probability
c_j / Σ c exactly, whatever the distribution: the shares of the bins are Dirichlet and the counts an
urn. So each p is uniform given all before it, and the wealth is a test martingale: a conformal
one whose memory are K counts for each signal instead of all values. Equal values are put in a random
order, so ties and constants are exact, too.
"""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import generator
from testtime.guard.betting import Bets, Starting
from testtime.guard.monitor import Alarm, State, finite, log_mean

AT_ONCE = 64
"""Samples that are ranked in one go, which bounds the memory of a large batch."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Exchangeability:
    """Watches whether signals of a stream keep the distribution of a reference.

    A batch is (n, signals), or (n,) of a single one: one number or many for each sample, such as
    entropy, confidence, features, statistics of normalisation layers (`testtime.guard.signals`).
    The null hypothesis: each signal's reference values and stream are exchangeable, e.g. independent
    draws of one distribution, known or not. Signals may depend on each other. Under it the
    probability that the alarm is ever raised is at most alpha, however long the stream and whenever
    one looks.

    A stream whose samples depend on each other (sorted labels, video) is not exchangeable, and that
    may raise the alarm as well; `Risk` asks less of a stream, but not nothing.

    Args:
        edges: (bins - 1, signals) reference values between the bins, made by `fit`.
        keys: (bins - 1, signals) the random order of equal values.
        gaps: (bins,) gaps in each bin.
        alpha: bound on the probability of a false alarm; 0.05.
        bets: how much is bet on each of the four payoffs of a signal.
        seed: of the random order of equal values, and of U.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> chance = torch.Generator().manual_seed(0)
        >>> reference, stream = torch.randn(2, 500, 3, generator=chance)
        >>> monitor = Monitor(Exchangeability.fit(reference))
        >>> bool(monitor.update(stream))
        False
        >>> stream[:, 1] += 1
        >>> alarm = monitor.update(stream)
        >>> bool(alarm), int(alarm.parts.argmax())
        (True, 1)

    References: Vovk, Nouretdinov, Gammerman, Testing Exchangeability On-Line, ICML 2003. Vovk et
    al., Retrain or Not Retrain: Conformal Test Martingales for Change-Point Detection, 2021.
    """

    edges: Tensor
    keys: Tensor
    gaps: Tensor
    alpha: float = 0.05
    bets: Bets = field(default_factory=Starting)
    seed: int = 0

    @staticmethod
    def fit(
        reference: Tensor,
        *,
        alpha: float = 0.05,
        bins: int = 50,
        bets: Bets | None = None,
        seed: int = 0,
    ) -> "Exchangeability":
        """The test against reference values (n, signals) that the model was not trained on.

        Args:
            reference: (n, signals), finite.
            alpha: bound on the probability of a false alarm.
            bins: how finely values are told apart; at most n + 1 are used.
            bets: how much is bet; `Starting`.
            seed: of the random order of equal values.

        Raises:
            InputError: the reference is not (n, signals) of finite numbers.
            OptionError: an option is out of its range.
        """
        in_range(1e-12, 1, alpha=alpha)
        whole(2, bins=bins)
        values = _signals("reference", reference)
        count = len(values)
        key = torch.rand(
            values.shape, generator=generator(seed, "reference"), dtype=torch.float64, device="cpu"
        )
        order = key.argsort(0)
        order = order.gather(0, values.gather(0, order).argsort(dim=0, stable=True))
        # a bin ends at order statistic r: the gaps up to there are r + 1
        ends = torch.arange(1, bins, device="cpu") * (count + 1) // bins
        ends = ends[ends > 0].unique()
        place = order[ends - 1]
        gaps = torch.cat([ends, torch.tensor([count + 1], device="cpu")]).diff(
            prepend=torch.zeros(1, device="cpu").long()
        )
        return Exchangeability(
            edges=values.gather(0, place), keys=key.gather(0, place), gaps=gaps,
            alpha=alpha, bets=bets or Starting(), seed=seed,
        )  # fmt: skip

    def init(self) -> State:
        """The reference alone: each bin counts its gaps."""
        signals = self.edges.shape[1]
        return self.bets.init(torch.Size([signals, 4])) | {
            "counts": self.gaps.double()[:, None].expand(-1, signals).clone(),
            "chance": generator(self.seed, "stream").get_state(),
            "log_peak": torch.zeros((), dtype=torch.float64, device="cpu"),
        }

    def step(self, state: State, signals: Tensor) -> tuple[State, Alarm]:
        """Bets on each value of each signal, in the order of the samples.

        Raises:
            InputError: the batch is not (n, signals) of finite numbers.
        """
        alone = isinstance(signals, Tensor) and signals.dim() == 1
        values = _signals("signals", signals[:, None] if alone else signals)
        if values.shape[1] != self.edges.shape[1]:
            raise InputError(
                f"the batch has {values.shape[1]} signals, shape {tuple(signals.shape)}; the "
                f"reference has {self.edges.shape[1]}. A gate is shown one, entropies over ln C: fit it to those."
            )
        path = torch.empty(0, device="cpu")
        for part in values.split(AT_ONCE):
            state, path = self._bet(state, part)
        return state, Alarm(state["log_peak"] >= -math.log(self.alpha), log_mean(path), path)

    def p_values(self, state: State, values: Tensor) -> tuple[State, Tensor]:
        """Conformal p-values (n, signals), near 0 for high values, and the state with the counts.

        Example:
            >>> test = Exchangeability.fit(torch.arange(99.0)[:, None])
            >>> _, p = test.p_values(test.init(), torch.tensor([[200.0], [-1.0], [49.5]]).double())
            >>> (p * 10).round().flatten().tolist()
            [0.0, 10.0, 5.0]
        """
        values = values.to(self.edges.device)
        chance = torch.Generator()
        chance.set_state(state["chance"])
        key, blur = torch.rand(
            2, *values.shape, generator=chance, dtype=torch.float64, device="cpu"
        )
        above = values[:, None] > self.edges
        above |= (values[:, None] == self.edges) & (key[:, None] > self.keys)
        own = torch.nn.functional.one_hot(above.sum(1), len(self.gaps)).double().transpose(1, 2)
        counts = state["counts"] + own.cumsum(0) - own
        over = counts.flip(1).cumsum(1).flip(1) - counts
        p = ((over + blur[:, None] * counts) * own).sum(1) / counts.sum(1)
        return state | {"counts": counts[-1] + own[-1], "chance": chance.get_state()}, p

    def _bet(self, state: State, values: Tensor) -> tuple[State, Tensor]:
        state, p = self.p_values(state, values)
        place, width = 1 - 2 * p, 4 * (p - 0.5).abs() - 1
        payoffs = torch.stack([place, -place, width, -width], -1)
        bets, path = self.bets.run(state, payoffs)
        path = log_mean(path)
        peak = torch.maximum(state["log_peak"], log_mean(path).max())
        return state | bets | {"log_peak": peak}, path[-1]


def _signals(name: str, values: Tensor) -> Tensor:
    values = finite(name, values)
    if values.dim() != 2:
        raise InputError(
            f"{name} has the shape {tuple(values.shape)}; expected (n, signals). A single signal is "
            "values[:, None]."
        )
    return values
