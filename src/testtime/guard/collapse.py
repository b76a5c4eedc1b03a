"""Has an adapted model collapsed? Class shares, their entropy, and disagreement with the source.

    for each 16 samples, with classes a of the adapted and s of the source model:
        share_c       = share of a = c less share of s = c                              in [-1, 1]
    for each block of 64:
        narrowness    = ( H(shares of s) - H(shares of a) ) / ln min(C, block)          in [-1, 1]
        disagreement  = share of a ≠ s                                                  in [0, 1]
    bet that the mean of each is above its limit

At the default limits a bet wins less than as much again as there was, so an alarm takes a dozen
bets at least, and mostly more. Crowding, which a few samples tell, is bet on more often than the
others: few samples make an entropy too low; and a source that is mostly wrong is rightly disagreed
with for a while.

Only answers count, not how sure they are. The entropy of a block's mean probabilities is too low by
more the surer a model is: of a hundred classes and more, a model that only became surer would look
narrow. The entropy of the shares of answers is too low for both models alike: if both give the classes
with the same probabilities, narrowness has the mean 0, however many classes there are.

The source answers the same samples, so a stream in which one class is frequent, or alone, is no
collapse: the source sees it, too.
"""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from testtime._core.errors import InputError, StateError
from testtime._core.options import in_range, whole
from testtime.guard.betting import Bets, Starting
from testtime.guard.monitor import Alarm, State, check_real, log_mean
from testtime.measures.entropy import entropy_of_probs

PART = 16
"""Samples of a block that one bet on the classes' shares is about; fewer where a block ends."""


@final
@dataclass(frozen=True, kw_only=True)
class Collapse:
    """Watches an adapted model beside its frozen source.

    A batch is two tensors of logits (n, classes), of the adapted and of the source model. The null
    hypothesis: given the past, the mean of every statistic above is at most its limit, in each 16
    samples or each block. Under it the probability that the alarm is ever raised is at most alpha. That the limits
    tell collapse from useful adaptation is a choice, and heuristic: a model that is rightly
    changed on more than `disagreement` of its answers raises the alarm as well.

    `Alarm.parts` are the log wealth of the classes' shares (their mean), of narrowness and of
    disagreement.

    Args:
        classes: number of classes C, at least 2.
        share: by how much a class may be more frequent than the source says; 0.25.
        narrowness: by how much the entropy of the classes' shares may be lower than the source's, as
            a part of the most that a block can have, ln min(C, block); 0.1.
        disagreement: share of answers that may differ from the source's; 0.6.
        block: samples that one bet on narrowness and disagreement is about; 64. Each 16 of them,
            and those that are left at its end, are one on shares. Smaller batches are collected.
        alpha: bound on the probability of a false alarm; 0.05.
        bets: how much is bet.

    Raises:
        OptionError: an option is out of its range.

    Example:
        >>> from testtime.guard.monitor import Monitor
        >>> source = 5 * torch.eye(10).repeat(64, 1)
        >>> monitor = Monitor(Collapse(classes=10))
        >>> bool(monitor.update(source, source))
        False
        >>> collapsed = torch.zeros(640, 10).index_fill(1, torch.tensor(3), 5.0)
        >>> bool(monitor.update(collapsed, source)) or bool(monitor.update(collapsed, source))
        True
    """

    classes: int
    share: float = 0.25
    narrowness: float = 0.1
    disagreement: float = 0.6
    block: int = 64
    alpha: float = 0.05
    bets: Bets = field(default_factory=Starting)

    def __post_init__(self) -> None:
        whole(2, classes=self.classes)
        whole(1, block=self.block)
        limits = {"share": self.share, "narrowness": self.narrowness}
        in_range(0, 0.999, **limits, disagreement=self.disagreement)
        in_range(1e-12, 1, alpha=self.alpha)

    def init(self) -> State:
        """Wealth 1, an empty block."""
        sums = torch.zeros(self.classes, dtype=torch.float64, device="cpu")
        return self.bets.init(torch.Size([self.classes + 2])) | {
            "shares": sums, "adapted": sums, "source": sums,
            "differ": sums[0], "seen": torch.zeros((), dtype=torch.int64, device="cpu"),
            "wealth": torch.zeros(self.classes + 2, dtype=torch.float64, device="cpu"),
            "log_peak": torch.zeros((), dtype=torch.float64, device="cpu"),
        }  # fmt: skip

    def step(self, state: State, adapted: Tensor, source: Tensor) -> tuple[State, Alarm]:
        """Bets on each part of a block, and on each block, that becomes full.

        Raises:
            InputError: the logits are not (n, classes), or not finite.
            StateError: the state is of a detector with longer blocks.
        """
        pair = [self._answers("adapted", adapted), self._answers("source", source)]
        if len(pair[0]) != len(pair[1]):
            raise InputError(
                f"{len(pair[0])} adapted and {len(pair[1])} source answers; expected those of the "
                "same samples."
            )
        if int(state["seen"]) >= self.block:
            raise StateError(
                f"the state holds {int(state['seen'])} samples of a block, and block is {self.block}; "
                "expected fewer. Load it into the detector it was taken from, or call reset."
            )
        while len(pair[0]):
            seen = int(state["seen"])
            free = min(self.block - seen, PART - seen % PART)
            state = self._collect(state, *(each[:free] for each in pair))
            pair = [each[free:] for each in pair]
            seen = int(state["seen"])
            if seen == self.block or seen % PART == 0:
                state = self._bet(state, part=(seen - 1) % PART + 1, whole=seen == self.block)
        parts = self._parts(state["wealth"])
        raised = state["log_peak"] >= -math.log(self.alpha)
        return state, Alarm(raised, log_mean(parts), parts)

    def _collect(self, state: State, ours: Tensor, theirs: Tensor) -> State:
        count = [each.bincount(minlength=self.classes).double() for each in (ours, theirs)]
        return state | {
            "shares": state["shares"] + count[0] - count[1],
            "adapted": state["adapted"] + count[0],
            "source": state["source"] + count[1],
            "differ": state["differ"] + (ours != theirs).sum(),
            "seen": state["seen"] + len(ours),
        }

    def _bet(self, state: State, *, part: int, whole: bool) -> State:
        """One round of all bets; who has nothing to bet on, with a payoff of 0, keeps what he has."""
        payoffs = (state["shares"] / part - self.share) / (1 + self.share)
        others = torch.zeros(2, dtype=torch.float64, device="cpu")
        if whole:
            entropies = [
                entropy_of_probs(state[name] / self.block) for name in ("adapted", "source")
            ]
            narrow = (entropies[1] - entropies[0]) / math.log(max(2, min(self.classes, self.block)))
            differ = state["differ"] / self.block - self.disagreement
            others = torch.stack(
                [
                    (narrow - self.narrowness) / (1 + self.narrowness),
                    differ / max(self.disagreement, 1 / self.block),
                ]
            )
        payoffs = torch.cat([payoffs, others])
        bets, path = self.bets.run(state, payoffs[None])
        peak = torch.maximum(state["log_peak"], log_mean(self._parts(path[-1])))
        done = ("shares", *("adapted", "source", "differ", "seen") * whole)
        fresh = {name: torch.zeros_like(state[name]) for name in done}
        return state | bets | fresh | {"wealth": path[-1], "log_peak": peak}

    def _parts(self, wealth: Tensor) -> Tensor:
        return torch.cat([log_mean(wealth[: self.classes])[None], wealth[self.classes :]])

    def _answers(self, name: str, logits: Tensor) -> Tensor:
        check_real(f"{name} logits", logits)
        if logits.dim() != 2 or len(logits) == 0 or logits.shape[1] != self.classes:
            raise InputError(
                f"{name} logits have the shape {tuple(logits.shape)}; expected (n, {self.classes}), "
                "with n at least 1, as said by classes=. Dense logits: each pixel is a sample."
            )
        highest, answers = logits.detach().cpu().max(1)
        if not bool(highest.isfinite().all()):
            raise InputError(
                f"{name} logits of {int((~highest.isfinite()).sum())} of {len(logits)} samples hold "
                "NaN or +inf, or -inf alone; leave these samples out."
            )
        return answers
