"""The guard that `True` stands for: does harm show in the answers of two models alone?"""

import math
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError, StateError
from testtime._core.options import in_range, whole
from testtime._core.seeds import generator
from testtime.adaptation.explained import explained, probabilities, tells
from testtime.adaptation.places import alone, left_open, places

RUN = 48
"""Samples in a row that are looked at before others are let go."""
SHUFFLES = 4
"""Random orders that give what two sequences of answers share by chance."""
TOLD, MORE = 0.5, 0.1
"""What inputs explain of the answers of a model that knows what it sees, and how much more or less
than of another's is no chance."""
EVEN, NEARLY = 0.93, 0.87
"""How even its answers are, as a share of even draws, where nothing of the source's is kept; and where
enough is."""
ONE, TENTH = 1 / 3, 0.1
"""How even a source's answers are at most that gives nearly all samples one, and for what share of many
classes they stand: there is nothing to keep."""
HALF = 0.5
"""How even must be at least who begins to be trusted beside such a source: a stream of one class, which
statistics of a batch spread, is less so."""
BIT = math.log(2)
"""More than the source's must an answer tell that leaves more open: to split one answer in two is no
news, and statistics of a batch do that to a single class."""
CLAIMED, FREE = 0.75, 0.2
"""How much more inputs must explain of answers that are more even, by a share beyond `FREE`."""
ROUNDING = 1.001
"""Of two sums of entropies that are equal but for rounding, how much the one may be above the other."""
SURE = 2.0
"""Standard errors below nought from which a difference is no chance, and what was learnt goes."""


class NeverWorse:
    """A guard that reads answers alone: no labels, no confidence, no threshold of the model's.

        of the last `memory` samples, with the answers a of the adapted and s of the source model:
            kept    = ( I(a; s) - chance ) / ( H(s) - chance )    # chance: I with a in random order
                      or 1 - H( place of s in the list of the adapted model ) / H(s), if that is more
            spread  = H(a) - H(s)                                 # of the last `recent` samples
            runs_x  = share of neighbours in time with equal x, less chance
            told_x  = I( x; its neighbour in time ) - chance      # x in random order in each block
            u_x     = I( x; input ) / H(x)   # of the probabilities of the last 2 `recent` samples
            even_x  = H(x) / H of as many even draws                        # of these samples
            as sure: the input leaves no more open, H( a | input ) <= H( s | input )
            few: the source answers with few classes, even_s < 1/3 or exp H(s) < C / 10
            lead    = spread, or min( runs_a - runs_s, told_a - told_s ) where runs_s > `runs`,
                      each in units of its standard error
        knows   if u_a >= 0.5, u_a - u_s >= 0.1 and spread >= 1, once `recent` samples are there, and it
                is as sure as the source or tells a bit more: I( a; input ) - I( s; input ) >= log 2
        trusted if it knows, even_a >= 0.93, and kept >= `kept` or few
        else dropped if kept < `kept` or lead < -2
        else, where labels come in an order,
                trusted if lead >= 1, and >= -1 of the last 2 `recent` samples alone
        else dropped if u_a - u_s < -0.1
             trusted if lead >= 1 and u_a - u_s > 0.75 ( 0.8 - even_s / even_a ), or if lead >= 1 and
                it is as sure as the source, where not few or even_a >= 0.5; or if it knows and
                even_a >= 0.87; then while lead >= 0
        else nobody knows yet: the source answers, the adapter goes on learning
        nor where the last block alone says otherwise, by u_a - u_s of 0.1 or more, and for the
                adapted model by u_a >= 0.5 as well

    What each says. Theil's uncertainty coefficient `u` is what the inputs explain of what a model's
    answers leave open on the whole. Statistics of a batch of few classes spread its answers over all,
    and leave each open; a model that knows what it sees is even and sure, and more so than a source
    that gives nearly all samples one answer. Of two classes, one of which comes, such a source may well
    be right, and the split is sure as well: hence the bit. Such a source is stuck, or one class comes:
    who mends the one spreads its answers over more than half of evenness, who splits the other over
    less, and nobody knows. An adapted model is worth nothing once its
    answers have nothing to do with the source's (`kept`): single samples on batch statistics, garbage,
    collapse; a source that gives nearly all samples one answer leaves nothing to keep.
    Where labels come in an order, so do a good model's answers, and the better follows it more
    closely: its neighbours are equal more often (`runs`), and each tells more of the next (`told`).
    Better answers show both, and each can be had without them: equal neighbours by crowding into few
    classes, what neighbours tell by errors that come in an order. Where labels do not, a model in a
    shift it was not made for confuses classes and crowds its answers into few, so that more even ones
    are better (`spread`), if the inputs leave the less of them open. As long as the two models answer
    alike there is nothing to judge by, and the source may as well answer.

    This is heuristic. It holds back gains that narrow the answers rightly, as on long-tailed streams;
    and it trusts answers that follow an order of labels more closely than the source's do, or are
    more even and surer, and are less right, as where a few classes alone come through noise.

    Args:
        kept: share of what the source's answers tell that the adapted ones must tell as well.
        runs: excess of equal neighbours from which labels count as ordered.
        memory: samples that are judged together.
        recent: samples whose spread is judged, which changes with the conditions, and half of those
            within which an order must still be followed, and whose probabilities are judged.
        block: samples in a row within which neighbours are counted.

    Raises:
        OptionError: an option is out of its range.

    Example:
        >>> guard, labels = NeverWorse(), torch.arange(256) * 7 % 11 % 10
        >>> even, crowded = (5 * torch.eye(10)[answers] for answers in (labels, labels.clamp(max=5)))
        >>> guard.update(even, even)  # nobody knows
        >>> guard.update(even, crowded), guard.update(crowded, even)
        (False, True)

    References: Vinh, Epps, Bailey, Information Theoretic Measures for Clusterings Comparison, JMLR
    2010, for the adjustment for chance; Theil, On the Estimation of Relationships Involving
    Qualitative Variables, American Journal of Sociology 1970, for the uncertainty coefficient.
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

    def update(self, adapted: Tensor, source: Tensor, /) -> bool | None:
        """Whether to drop what was learnt; None: not known yet, as before a block was seen.

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
        size, classes = source.shape
        theirs = source.argmax(1)
        answers = torch.stack(
            [adapted.argmax(1), theirs, places(adapted, theirs), answered(adapted).long()]
        )
        sums = torch.stack([probabilities(adapted), probabilities(source)])
        told = torch.cat([answers.to(sums.dtype).flatten(), sums.flatten()]).cpu()  # one wait
        *pair, numbers = told[: 4 * size].long().view(4, size)
        if not numbers.all():
            return True
        self._block = torch.cat([self._block, torch.stack(pair)], 1)
        part = told[4 * size :].view(2, -1).double()
        self._part = part if self._part is None else self._part + part
        if self._block.shape[1] < self.block:
            return self._worse
        block, self._block = self._block, self._block[:, :0]
        self._parts, self._part = [*self._parts, self._part], None
        while len(self._parts) > 1 and _samples(self._parts[1:]) >= 2 * self.recent:
            del self._parts[0]
        most = max(self.memory, block.shape[1])
        self._answers = torch.cat([self._answers, block], 1)[:, -most:]
        number = torch.full((block.shape[1],), self._seen, device="cpu")
        self._blocks = torch.cat([self._blocks, number])[-most:]
        self._seen += block.shape[1]
        self._worse = self._judge(classes)
        return self._worse

    def _judge(self, classes: int) -> bool | None:
        ours, theirs, _ = self._answers
        if torch.equal(ours, theirs):
            return None
        sums = torch.stack(self._parts).sum(0)
        told, more = explained(sums)
        told_late, more_late = explained(self._parts[-1])
        # the last block alone can suspend either verdict
        good = False if more_late >= -MORE else None
        bad = None if told_late >= TOLD and more_late >= MORE else True

        even = _of_even_draws(2 * self.recent, len(ours), classes, self._seen)
        h_a, h_s = (_entropy_of(x) for x in self._answers[:2, -2 * self.recent :])
        even_a, even_s = h_a / even, h_s / even
        late = ours[-self.recent :], theirs[-self.recent :]
        gained = surprise(late[0]) - surprise(late[1])
        # among more classes than answers, what tells are the few that come again, each with another
        each = gained if classes <= self.recent else alone(late[0]) - alone(late[1])
        spread = errors(gained.mean(), each)
        as_sure = bool(sums[0, 0] < ROUNDING * sums[1, 0])
        knows = spread >= 1 and len(ours) >= self.recent and told >= TOLD and more >= MORE
        knows = knows and (as_sure or tells(sums[0]) - tells(sums[1]) >= BIT)
        few = even_s < ONE or math.exp(h_s) < TENTH * classes
        little = self._kept(classes) < self.kept
        if knows and even_a >= EVEN and (few or not little):
            return good
        if little:
            return bad
        if self._runs(theirs) > self.runs:
            return self._follows(classes)
        if spread < -SURE or more < -MORE:
            return bad
        wider = 1 - even_s / max(even_a, 1e-9)
        begins = spread >= 1 and (as_sure or more > CLAIMED * (wider - FREE))
        begins = begins and (even_a >= HALF or not few)
        lasts = spread >= 0 and self._worse is False
        return good if begins or lasts or (knows and even_a >= NEARLY) else None

    def _follows(self, classes: int) -> bool | None:
        """What is said where labels come in an order: who follows it more closely?"""
        lead = self._lead(classes, self.memory)
        good = lead >= 1 and self._lead(classes, 2 * self.recent) >= -1
        return False if good else True if lead < -SURE else None

    def _kept(self, classes: int) -> float:
        """Share of what the source's answers tell that the adapted model tells too, less chance.

        By its answers, which takes many samples of a class, or by its lists, which does not.
        """
        ours, theirs, found = self._answers
        shared, _, known = information(ours, theirs, classes)
        random = generator(self._seen, "guard")
        orders = [
            torch.randperm(len(ours), generator=random, device="cpu") for _ in range(SHUFFLES)
        ]
        chance = sum(information(ours[o], theirs, classes)[0] for o in orders) / SHUFFLES
        by_answers = (shared - chance) / (known - chance) if known - chance > 1e-6 else -math.inf
        by_lists = 1 - left_open(found, classes) / known if known > 1e-6 else -math.inf
        return max(by_answers, by_lists)

    def _runs(self, answers: Tensor) -> float:
        """How much more often neighbours are equal than by chance, on the mean of the blocks."""
        sizes = self._blocks.unique_consecutive(return_counts=True)[1].tolist()
        return sum(len(x) * excess(x) for x in answers.split(sizes)) / len(answers)

    def _lead(self, classes: int, last: int) -> float:
        """By how many standard errors the adapted answers follow an order more closely."""
        blocks = self._blocks[-last:]
        near = blocks[1:] == blocks[:-1]
        found: list[Tensor] = []  # of each model: whether neighbours are equal, what each tells
        chance: list[Tensor] = []
        for answers in self._answers[:2, -last:]:
            random = generator(self._seen, "guard", "order")
            orders = [
                torch.randperm(len(answers), generator=random, device="cpu")
                for _ in range(SHUFFLES)
            ]
            orders = [order[blocks[order].argsort(stable=True)] for order in orders]
            found.append(_neighbours(answers, near, classes))
            shuffled = [_neighbours(answers[order], near, classes).mean(1) for order in orders]
            chance.append(torch.stack(shuffled).mean(0))
        each = found[0] - found[1]
        gained = each.mean(1) - (chance[0] - chance[1])
        return min(map(errors, gained, each))

    def reset(self) -> None:
        """Forgets the stream."""
        self._block = self._answers = torch.zeros(3, 0, dtype=torch.long, device="cpu")
        self._blocks = torch.zeros(0, dtype=torch.long, device="cpu")
        self._part: Tensor | None = None
        self._parts: list[Tensor] = []
        self._seen, self._worse = 0, None

    def state_dict(self) -> dict[str, Any]:
        """The answers that are judged together, and what was said of them."""
        return {
            "block": self._block, "answers": self._answers, "blocks": self._blocks,
            "part": self._part, "parts": list(self._parts), "seen": self._seen,
            "worse": self._worse,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            StateError: another version kept other things of an answer.
        """
        for name in ("block", "answers"):
            if state[name].shape[:-1] != self._answers.shape[:-1]:
                raise StateError(
                    f"{name} has shape {tuple(state[name].shape)}; expected {len(self._answers)} rows. "
                    "It was kept by another version of testtime. Begin anew: reset()."
                )
        self._block, self._answers = state["block"].cpu(), state["answers"].cpu()
        self._blocks, self._seen, self._worse = state["blocks"].cpu(), state["seen"], state["worse"]
        self._part = None if state["part"] is None else state["part"].cpu()
        self._parts = [part.cpu() for part in state["parts"]]


def information(a: Tensor, b: Tensor, classes: int) -> tuple[float, float, float]:
    """Mutual information of two sequences of classes and their entropies, in nats, from counts.

    Example:
        >>> a = torch.tensor([0, 1, 0, 1])
        >>> [round(value, 4) for value in information(a, a, 2)]
        [0.6931, 0.6931, 0.6931]
    """
    both, one, other = (_entropy_of(each) for each in (a * classes + b, a, b))
    return one + other - both, one, other


def _samples(parts: list[Tensor]) -> float:
    """Samples that went into sums of probabilities; rounded, since probabilities are."""
    return round(float(sum(part[0, 1:].sum() for part in parts)))


def surprise(values: Tensor) -> Tensor:
    """Minus the logarithm of each value's share; the mean is the entropy, in nats.

    Example:
        >>> surprise(torch.tensor([3, 3, 0, 3])).exp()
        tensor([1.3333, 1.3333, 4.0000, 1.3333], dtype=torch.float64)
    """
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return math.log(len(values)) - counts.double().log()[place]


def errors(difference: Tensor, each: Tensor) -> float:
    """A difference in units of the standard error of the mean of `each`.

    Example:
        >>> errors(torch.tensor(0.5), torch.tensor([0.0, 1.0, 0.0, 1.0]))
        1.7320...
    """
    return float(difference) / max(float(each.std()) / math.sqrt(len(each)), 1e-9)


def _neighbours(answers: Tensor, near: Tensor, classes: int) -> Tensor:
    """Of each pair of neighbours: whether they are equal, and what one tells of the other (2, n)."""
    one, other = answers[:-1][near], answers[1:][near]
    told = surprise(one) + surprise(other) - surprise(one * classes + other)
    return torch.stack([(one == other).double(), told])


def _entropy_of(values: Tensor) -> float:
    counts = values.unique(return_counts=True)[1].double()
    return math.log(len(values)) - float((counts * counts.log()).sum()) / len(values)


def _of_even_draws(most: int, count: int, classes: int, seed: int) -> float:
    """Entropy of `count` answers drawn evenly, or of `most` of them."""
    random = generator(seed, "guard", "even")
    size = SHUFFLES, min(most, count)
    even = torch.randint(classes, size, generator=random, device="cpu")
    return max(sum(map(_entropy_of, even)) / SHUFFLES, 1e-9)


def excess(answers: Tensor) -> float:
    """Share of neighbours that are equal, less what random order makes one expect.

    Example:
        >>> excess(torch.tensor([0, 0, 0, 1, 1, 1])), excess(torch.tensor([0, 1, 0, 1, 0, 1]))
        (0.4, -0.4)
    """
    n = len(answers)
    if n < 2:
        return 0.0
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
