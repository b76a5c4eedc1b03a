"""Cheaper ways through a batch that change no result, and which of them a model and a recipe admit.

few       samples that may not teach pay for no backward: those that may go through once more
sooner    an answer comes from a forward without a graph, and one with a graph runs behind it
joined    changed copies of a batch share a forward, and each is normalised by itself
apart     a part of a batch is learnt from, and the rest only answered
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from testtime._core.devices import is_autocasting, wait_for
from testtime.adaptation.evidence import Evidence, answers_without_graph
from testtime.adaptation.layers import NormLayer
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import answers_again, answers_alone, answers_in_rows
from testtime.adaptation.parts.statistics import SourceStatistics
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe

WORTH = 1 << 17
"""Values of a batch from which a second forward of few samples pays."""
DEAR = {"cuda": 32}
"""How many times as many they must be where calls are dear beside what they compute."""
JOINED = {"cpu": 0}
"""Values of changed copies that share a forward, by device; a million on others, to save small calls.
On a CPU they go one by one: larger products round otherwise, and Adam makes whole steps of that."""
FEW = 0.5
"""Share of teaching samples below which their second forward and backward cost less than the
backward of all."""
SOME = 0.15
"""Share of teaching samples from which on it pays to keep what their second forward can take."""
TRIES = 3
"""Forwards of each kind that are measured: the first is slow, and others may be disturbed."""
WAIT = 1.05
"""What an answer may take, in the time of one without a graph."""


class Sooner:
    """Measures whether an answer comes sooner from a forward without a graph, with one more behind it.

    Both ways are tried `TRIES` times, in turn; then the one with a graph is kept, which costs less,
    unless the answer comes later by more than `WAIT`. While it measures it waits for the device, and
    no longer.

    Args:
        device: that answers.

    Example:
        >>> sooner = Sooner(torch.device("cpu"))
        >>> for _ in range(2 * TRIES):
        ...     with sooner:
        ...         time.sleep(0.001 if sooner.twice else 0.005)
        >>> sooner.twice
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.proven = False  # that both answer the same, to the last bit
        self.once: list[float] = []
        self.again: list[float] = []

    @property
    def twice(self) -> bool:
        """Whether the next forward does without a graph."""
        if len(self.again) == TRIES:
            return min(self.once) > WAIT * min(self.again)
        return len(self.again) < len(self.once)

    @property
    def _tried(self) -> list[float]:
        return self.again if self.twice else self.once

    def __enter__(self) -> None:
        if len(self._tried) < TRIES:
            wait_for(self.device)
        self._began = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        tried = self._tried
        if len(tried) < TRIES and error == (None, None, None):
            wait_for(self.device)
            tried.append(time.perf_counter() - self._began)


class Shortcuts:
    """Says of each batch which of these ways it may take.

    What shows only when the model runs is looked at once, by the first batch that asks.

    Args:
        recipe: the method.
        loan: of the model.
        norms: its normalisation layers.
        ranks: the processes that adapt together.
    """

    def __init__(
        self, recipe: Recipe, loan: Loan, norms: Sequence[NormLayer], ranks: Ranks
    ) -> None:
        self.recipe, self.loan, self.ranks = recipe, loan, ranks
        stored = isinstance(recipe.statistics, SourceStatistics)
        self._norms_mix = any(
            layer.kind == "batch" and not (layer.has_statistics and stored) for layer in norms
        )
        self._answers_alone: bool | None = None
        self._answers_again: bool | None = None
        self._in_rows: bool | None = None
        self._sooner: dict[torch.Size, Sooner | None] = {}

    def few(self, x: Tensor, teaching: float | None) -> bool:
        """Whether so few samples teach that the first forward of all need make no graph.

        Args:
            x: the batch.
            teaching: share of the samples that taught lately; None: not known yet.
        """
        return teaching is not None and teaching < FEW and self.may_leave_out(x)

    def may_leave_out(self, x: Tensor) -> bool:
        """Whether samples that may not teach can be left out of the backward, and it is worth it.

        That is so where no layer mixes samples, by structure and as a look at two samples shows, and
        where the loss is a mean over those that teach.
        """
        by_sample = self.recipe.loss_by_sample
        fits = by_sample and not self._norms_mix and self.ranks.alone and self.loan.own_functions
        if not fits or x.numel() < WORTH * DEAR.get(x.device.type, 1):
            return False
        return self._apart(x)

    def answers_apart(self, x: Tensor) -> bool | None:
        """Whether a batch may be run in parts, of which some are only answered.

        That is so where no layer mixes samples, what the model returns can be joined again, and the
        method answers and learns as it would from a smaller batch. None while answers that are no
        numbers hide it.
        """
        if not self.recipe.splits or self._norms_mix:
            return False
        if not self.ranks.alone or not self.loan.own_functions:
            return False
        if not self._apart(x):
            return self._answers_alone
        if self._in_rows is None:
            self._in_rows = answers_in_rows(self.loan, x)
        return self._in_rows

    def stay_whole(self) -> None:
        """Lets no batch be run in parts any more: what the model returned for some was seen not to fit."""
        self._in_rows = False

    def sooner(self, evidence: Evidence) -> Sooner | None:
        """Which forward answers such a batch sooner; None where only one may.

        To keep what a backward needs takes time: on a CPU for memory, on a GPU for the calls that keep
        less of it, where it waits for them. An answer may come without it, and a graph be made behind
        it, where the model answers the same when it is asked again, and torch computes the same, to the
        last bit, without a graph.
        """
        x = evidence.inputs
        if x.numel() < WORTH or is_autocasting(x.device):
            return None
        if not self.loan.own_functions or not self.ranks.alone:
            return None
        if self._answers_again is None:
            self._answers_again = answers_again(self.loan, x)
        sooner = self._sooner.setdefault(x.shape, Sooner(x.device)) if self._answers_again else None
        if sooner is not None and sooner.twice and not sooner.proven:
            proven = answers_without_graph(evidence)
            if proven is None:
                return None
            sooner.proven = proven
            if not proven:
                sooner = self._sooner[x.shape] = None
        return sooner

    def joinable(self, x: Tensor) -> int:
        """How many batches like this one may share a forward: each answered as if it came alone.

        As many as keep within `JOINED` values; one where layers would mix them, as moving averages
        or batches of one do.
        """
        fits = max(JOINED.get(x.device.type, 1 << 20) // max(x.numel(), 1), 1)
        alone = self.ranks.alone and len(x) > 1 and fits > 1
        if not alone or not self.loan.takes_groups(self.recipe.statistics):
            return 1
        return fits if self._apart(x) else 1

    def _apart(self, x: Tensor) -> bool:
        """Whether layers other than batch normalisation leave samples apart; looked at once."""
        if self._answers_alone is None:
            self._answers_alone = answers_alone(self.loan, x)
        return bool(self._answers_alone)
