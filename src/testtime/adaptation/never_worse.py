"""The guard that `True` stands for: does harm show in the answers of two models alone?"""

import math
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import generator

RUN = 48
"""Samples in a row that are looked at before others are let go."""
SHUFFLES = 4
"""Random orders that give what two sequences of answers share by chance."""


class NeverWorse:
    """A guard that reads answers alone: no labels, no confidence, no threshold of the model's.

        of the last `memory` samples, with the answers a of the adapted and s of the source model:
            kept    = ( I(a; s) - chance ) / ( H(s) - chance )    # chance: I with a in random order
            spread  = H(a) - H(s)                                 # of the last `recent` samples
            runs_x  = share of neighbours in time with equal x, less what the counts of the classes
                      among `block` samples make one expect
            told_x  = I( x; its neighbour in time ) - chance      # x in random order in each block
        trusted if kept >= `kept`, and
            runs_a >= runs_s and told_a >= told_s  where runs_s > `runs`,  else spread >= 0

    What each says. An adapted model is worth nothing once its answers have nothing to do with the
    source's (`kept`): single samples on batch statistics, garbage, collapse. Where labels come in
    an order, so do a good model's answers, and the better follows it more closely: its neighbours
    are equal more often (`runs`), and each tells more of the next (`told`). Better answers show
    both, and each can be had without them: equal neighbours by crowding into few classes, what
    neighbours tell by errors that come in an order. Where labels do not, a model in a shift it was not made for confuses classes and crowds its answers into
    few, so that more even ones are better (`spread`).

    This is heuristic. It fails where the source model gives one and the same answer for hundreds of
    samples, which it does not trust anybody to mend; it holds back gains that narrow the answers
    rightly, as on long-tailed streams; and it trusts answers that follow an order of labels as
    closely as the source's do, and are less right.

    Args:
        kept: share of what the source's answers tell that the adapted ones must tell as well.
        runs: excess of equal neighbours from which labels count as ordered.
        memory: samples that are judged together.
        recent: samples whose spread is judged; it changes with the conditions.
        block: samples in a row within which neighbours are counted.

    Raises:
        OptionError: an option is out of its range.

    Example:
        >>> guard = NeverWorse()
        >>> source = 5.0 * torch.eye(10).repeat(64, 1)
        >>> guard.update(source, source), guard.update(source.roll(7, 0), source)
        (False, False)
        >>> chance = torch.Generator().manual_seed(0)
        >>> [guard.update(torch.randn(640, 10, generator=chance), source) for _ in range(2)]
        [True, True]

    Reference: Vinh, Epps, Bailey, Information Theoretic Measures for Clusterings Comparison, JMLR
    2010, for the adjustment for chance.
    """

    def __init__(
        self,
        *,
        kept: float = 0.3,
        runs: float = 0.1,
        memory: int = 1024,
        recent: int = 128,
        block: int = RUN,
    ) -> None:
        in_range(0, 1, kept=kept, runs=runs)
        whole(2, memory=memory, recent=recent, block=block)
        self.kept, self.runs, self.block = kept, runs, block
        self.memory, self.recent = memory, recent
        self.reset()

    def update(self, adapted: Tensor, source: Tensor, /) -> bool:
        """Whether the adapted model is not to be trusted: never before a block of samples was seen.

        Args:
            adapted: logits (n, classes) of the adapted model; one that is NaN is not trusted.
            source: those of the source model, of the same samples.

        Raises:
            InputError: the two are not in floating point of one shape (n, classes), or empty.
        """
        real = adapted.is_floating_point() and source.is_floating_point()
        if adapted.dim() != 2 or not adapted.numel() or adapted.shape != source.shape or not real:
            raise InputError(
                f"adapted logits are {adapted.dtype} {tuple(adapted.shape)} and those of the source "
                f"{source.dtype} {tuple(source.shape)}; expected floating point of the same shape "
                "(n, classes), not empty."
            )
        classes, numbers = source.shape[1], answered(adapted).long()
        *pair, numbers = torch.stack([adapted.argmax(1), source.argmax(1), numbers]).cpu()
        if not numbers.all():
            return True
        pair = torch.stack(pair)
        self._block = torch.cat([self._block, pair], 1)
        if self._block.shape[1] < self.block:
            return self._worse
        block, self._block = self._block, self._block[:, :0]
        most = max(self.memory, block.shape[1])
        self._answers = torch.cat([self._answers, block], 1)[:, -most:]
        number = torch.full((block.shape[1],), self._seen)
        self._blocks = torch.cat([self._blocks, number])[-most:]
        row = torch.tensor([[block.shape[1], *(excess(answers) for answers in block)]])
        rows = torch.cat([self._order, row.double()])
        newest = rows[:, 0].flip(0).cumsum(0).flip(0) - rows[:, 0]  # samples that came later
        self._order = rows[newest < self.memory]
        self._seen += block.shape[1]
        self._worse = self._judge(classes)
        return self._worse

    def _judge(self, classes: int) -> bool:
        ours, theirs = self._answers
        if torch.equal(ours, theirs):
            return False
        shared, _, known = information(ours, theirs, classes)
        random = generator(self._seen, "guard")
        orders = [torch.randperm(len(ours), generator=random) for _ in range(SHUFFLES)]
        chance = sum(information(ours[o], theirs, classes)[0] for o in orders) / SHUFFLES
        if known - chance <= 1e-6 or (shared - chance) / (known - chance) < self.kept:
            return True
        runs = (self._order[:, :1] * self._order[:, 1:]).sum(0) / self._order[:, 0].sum()
        if runs[1] > self.runs:
            return bool(runs[0] < runs[1]) or self._told(ours, classes) < self._told(
                theirs, classes
            )
        return _entropy_of(ours[-self.recent :]) < _entropy_of(theirs[-self.recent :])

    def _told(self, answers: Tensor, classes: int) -> float:
        """What an answer tells of the next in its block, less what it tells in random order."""
        random = generator(self._seen, "guard", "order")
        near = self._blocks[1:] == self._blocks[:-1]
        found = []
        for shuffled in range(SHUFFLES + 1):
            if shuffled:
                order = torch.randperm(len(answers), generator=random)
                answers = answers[order[self._blocks[order].argsort(stable=True)]]
            found.append(information(answers[:-1][near], answers[1:][near], classes)[0])
        return found[0] - sum(found[1:]) / SHUFFLES

    def reset(self) -> None:
        """Forgets the stream."""
        self._block = self._answers = torch.zeros(2, 0, dtype=torch.long)
        self._blocks = torch.zeros(0, dtype=torch.long)
        self._order = torch.zeros(0, 3, dtype=torch.float64)
        self._seen, self._worse = 0, True

    def state_dict(self) -> dict[str, Any]:
        """The answers that are judged together, and the order of those of each block."""
        return {
            "block": self._block, "answers": self._answers, "blocks": self._blocks,
            "order": self._order, "seen": self._seen, "worse": self._worse,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken."""
        self._block, self._answers = state["block"].cpu(), state["answers"].cpu()
        self._blocks, self._order = state["blocks"].cpu(), state["order"].cpu()
        self._seen, self._worse = state["seen"], state["worse"]


def information(a: Tensor, b: Tensor, classes: int) -> tuple[float, float, float]:
    """Mutual information of two sequences of classes and their entropies, in nats, from counts.

    Example:
        >>> a = torch.tensor([0, 1, 0, 1])
        >>> [round(value, 4) for value in information(a, a, 2)]
        [0.6931, 0.6931, 0.6931]
    """
    both, one, other = (_entropy_of(each) for each in (a * classes + b, a, b))
    return one + other - both, one, other


def _entropy_of(values: Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    return math.log(len(values)) - float((counts * counts.log()).sum()) / len(values)


def excess(answers: Tensor) -> float:
    """Share of neighbours that are equal, less what random order makes one expect.

    Example:
        >>> excess(torch.tensor([0, 0, 0, 1, 1, 1])), excess(torch.tensor([0, 1, 0, 1, 0, 1]))
        (0.4, -0.4)
    """
    n = len(answers)
    counts = answers.unique(return_counts=True)[1].double()
    equal = float((answers[1:] == answers[:-1]).double().mean())
    return equal - float((counts * (counts - 1)).sum()) / (n * (n - 1))


def answered(logits: Tensor) -> Tensor:
    """Where there is an answer: the largest logit is a number. Classes left out may be -inf.

    Example:
        >>> answered(torch.tensor([[0.0, -math.inf], [1.0, math.nan], [0.0, math.inf]]))
        tensor([ True, False, False])
    """
    return logits.amax(1).isfinite()
