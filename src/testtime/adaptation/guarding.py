"""Never worse than frozen: a guard compares the adapted model with its source, and takes it back.

answer as the adapted model does while the guard trusts it: so long the source model runs on
every fourth run of samples only
else  roll back to a state that was trusted, learn nothing, and answer as the source model does,
      until a trial on every fourth run of samples is trusted again
after `PATIENCE` samples without trust, go back to the source
"""

import math
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError, OptionError, StateError
from testtime._core.guards import Guard
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.seeds import generator
from testtime.adaptation.engine import Engine, Step, Steps, begun, ended
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.state import State
from testtime.measures.entropy import entropy

RUN = 48
"""Samples in a row that are looked at before others are let go."""
APART = 4
"""One run of so many is looked at, once a stream has begun."""
BEGINNING = 512
"""Samples of a stream that are all looked at."""
MARK = 512
"""Samples between two states to which one can roll back."""
PATIENCE = 1024
"""Samples without trust after which the source is restored."""
SHUFFLES = 4
"""Random orders that give what two sequences of answers share by chance."""
STREAM = ("guard", "gate", "account", "generator", "steps", "samples", "method")
"""What belongs to the stream and not to what was learnt."""
_asking = threading.RLock()
"""One asks at a time: two streams that share a guard must not mix its memories."""


class NeverWorse:
    """A guard that reads answers alone: no labels, no confidence, no threshold of the model's.

        of the last `memory` samples, with the answers a of the adapted and s of the source model:
            kept    = ( I(a; s) - chance ) / ( H(s) - chance )    # chance: I with a in random order
            spread  = H(a) - H(s)                                 # of the last `recent` samples
            runs_x  = share of neighbours in time with equal x, less what the counts of the classes
                      among `block` samples make one expect
        trusted if kept >= `kept`, and  runs_a >= runs_s where runs_s > `runs`, else spread >= 0

    What each says. An adapted model is worth nothing once its answers have nothing to do with the
    source's (`kept`): single samples on batch statistics, garbage, collapse. Where labels come in
    an order, so do a good model's answers, and the better follows it more closely (`runs`). Where
    they do not, a model in a shift it was not made for confuses classes and crowds its answers into
    few, so that more even ones are better (`spread`).

    This is heuristic. It fails where the source model gives one and the same answer for hundreds of
    samples, which it does not trust anybody to mend, and it holds back gains that narrow the answers
    rightly, as on long-tailed streams.

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
        """Whether the adapted model is not to be trusted: never before a block of samples was seen."""
        if not bool(answered(adapted).all()):
            return True
        classes = source.shape[1]
        pair = torch.stack([adapted.argmax(1), source.argmax(1)]).cpu()
        self._block = torch.cat([self._block, pair], 1)
        if self._block.shape[1] < self.block:
            return self._worse
        block, self._block = self._block, self._block[:, :0]
        most = max(self.memory, block.shape[1])
        self._answers = torch.cat([self._answers, block], 1)[:, -most:]
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
            return bool(runs[0] < runs[1])
        return _entropy_of(ours[-self.recent :]) < _entropy_of(theirs[-self.recent :])

    def reset(self) -> None:
        """Forgets the stream."""
        self._block = self._answers = torch.zeros(2, 0, dtype=torch.long)
        self._order = torch.zeros(0, 3, dtype=torch.float64)
        self._seen, self._worse = 0, True

    def state_dict(self) -> dict[str, Any]:
        """The answers that are judged together, and the order of those of each block."""
        return {
            "block": self._block, "answers": self._answers, "order": self._order,
            "seen": self._seen, "worse": self._worse,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken."""
        self._block, self._answers = state["block"].cpu(), state["answers"].cpu()
        self._order, self._seen = state["order"].cpu(), state["seen"]
        self._worse = state["worse"]


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


def check_guard(guard: Any) -> Guard | None:
    """The guard that is meant: `True` is `NeverWorse()`."""
    if guard is None or guard is False:
        return None
    if guard is True:
        return NeverWorse()
    if isinstance(guard, type):
        raise OptionError(f"guard is the class {guard.__name__}; expected an instance of it.")
    for name in ("update", "reset", "state_dict", "load_state_dict"):
        if not callable(getattr(guard, name, None)):
            raise OptionError(
                f"guard is of type {type(guard).__name__}, which has no {name}; expected True, or a "
                "guard: update(adapted, source) -> alarm, reset, state_dict and load_state_dict."
            )
    return guard


def check_memory(guard: Guard, state: State, what: str) -> None:
    """Refuses a state whose guard was of another kind.

    Args:
        guard: that would go on.
        state: to go on from.
        what: the state, in words.
    """
    memory = state.guard and state.guard["memory"]
    try:
        if memory is not None:
            with _asking:
                guard.load_state_dict(memory)
    except Exception as error:
        raise StateError(
            f"{what} was made with another guard: {type(guard).__name__} does not take its memory "
            f"({type(error).__name__}: {error}). Give tt.adapt the guard that made it."
        ) from error


def distrusted(state: State) -> bool:
    """Whether the source model answers now."""
    return bool(state.guard and state.guard["worse"])


def guarded(
    guard: Guard, engine: Engine, x: Tensor, state: State, inner: Callable[[Tensor, State], Steps]
) -> Steps:
    """A step under a guard.

    Args:
        guard: compares the two models.
        engine: runs them.
        x: the batch.
        state: the stream's.
        inner: the step that a batch gets without a guard.
    """
    seen = state.guard or {
        "memory": None, "worse": False, "run": 0, "batches": 0, "left": 0, "since": 0, "marks": [],
        "looked": False,
    }  # fmt: skip
    size, before = _sizes(engine, x, state)
    passes = seen["left"] > 0
    if passes:
        seen = {**seen, "left": seen["left"] - 1}
        if seen["worse"]:
            output, logits = engine.frozen(x)
            seen = {**seen, "since": seen["since"] + size}
            return _given_back(engine, x, state, seen, (output, logits), Outcome.GUARDED)
    # the answer that is on trial, and the source's; nothing is learnt while there is no trust
    steps = None if seen["worse"] else inner(x, state)
    output, done = (engine.predict(x, state)[0], None) if steps is None else begun(steps)
    adapted = read_logits(output)
    if steps is not None and passes and _numbers(engine, adapted):
        if done is None:
            yield output
            done = ended(steps)
        return _watched(seen, done, size)
    theirs = engine.frozen(x)
    worse, memory = _asked(guard, engine, seen, adapted, theirs[1], state)
    # what was learnt before there was a guard is on trial, since this is the first it sees of it
    first = worse and not seen["worse"] and bool(state.guard)
    seen = _looked({**seen, "memory": memory, "worse": worse}, before + size, size)
    if worse:
        if steps is not None:
            steps.close()
        if first:
            state, seen = _rolled_back(engine, state, seen), {**seen, "marks": [], "since": 0}
        elif seen["since"] >= PATIENCE:
            state, seen = _taken(engine.fresh(), state), {**seen, "since": 0}
        seen = {**seen, "since": seen["since"] + size}
        outcome = Outcome.ROLLED_BACK if first else Outcome.GUARDED
        return _given_back(engine, x, state, seen, theirs, outcome)
    if steps is None:
        measured: dict[str, Any] = {"entropy": entropy(rows(adapted)).mean(), "used": 0}
        step = Step(output, rows(adapted), state, Outcome.TRUSTED, measured)
        return _watched(seen, engine.settled(step, x, state), size)
    if done is None:
        yield output
        done = ended(steps)
    return _watched(seen, done, size)


def _sizes(engine: Engine, x: Tensor, state: State) -> tuple[float, float]:
    """Samples in the batch and before it; on ranks their means, so that all look when one does."""
    if engine.ranks.alone:
        return len(x), state.samples
    own = torch.tensor([1.0, len(x), state.samples], dtype=torch.float64).to(engine.device)
    ranks, size, before = engine.ranks.sum(own).tolist()
    return size / ranks, before / ranks


def _numbers(engine: Engine, logits: Tensor) -> bool:
    """Whether there is an answer to all samples, of all ranks; else one looks at the source's."""
    missing = (~answered(logits)).any().float()
    return float(missing if engine.ranks.alone else engine.ranks.sum(missing)) == 0


def _asked(
    guard: Guard,
    engine: Engine,
    seen: dict[str, Any],
    adapted: Tensor,
    source: Tensor,
    state: State,
) -> tuple[bool, Any]:
    """The guard's word, the same on all ranks, where one that distrusts is enough; and its memory.

    It is asked of samples that both models answer. A model that gives no number where its source
    does is not trusted, whatever the guard.
    """
    worse, memory = bool((answered(source) & ~answered(adapted)).any()), seen["memory"]
    pair = _answers(adapted, state), _answers(source, state)
    both = answered(pair[0]) & answered(pair[1])
    complaint: Exception | None = None
    if not worse and bool(both.any()):
        pair = pair if bool(both.all()) else (pair[0][both], pair[1][both])
        try:
            with _asking:
                if memory is None:
                    guard.reset()
                else:
                    guard.load_state_dict(memory)
                worse, memory = bool(guard.update(*pair)), guard.state_dict()
        except Exception as error:
            complaint = error
    elif not worse:
        worse = seen["worse"]
    if not engine.ranks.agree(complaint, engine.device):
        raise complaint or InputError("the guard of another rank raised an error")
    if not engine.ranks.alone:
        worse = float(engine.ranks.sum(torch.tensor(float(worse), device=engine.device))) > 0
    return worse, memory


def _looked(seen: dict[str, Any], samples: float, size: float) -> dict[str, Any]:
    """Counts a run of samples that was looked at; after it, as many batches go by `APART` - 1 times."""
    run, batches = seen["run"] + size, seen["batches"] + 1
    seen = {**seen, "looked": True}
    if run < RUN:
        return {**seen, "run": run, "batches": batches}
    left = 0 if samples < BEGINNING else (APART - 1) * batches
    return {**seen, "run": 0, "batches": 0, "left": left}


def _watched(seen: dict[str, Any], done: Step, size: float) -> Step:
    """The step of a model that is trusted; now and then its state is marked.

    Between two marks there is a look, so that the older of them has been found to be trusted.
    """
    since = seen["since"] + size
    if not seen["marks"] or (since >= MARK and seen["looked"]):
        kept = {f.name: getattr(done.state, f.name) for f in fields(State) if f.name not in STREAM}
        seen, since = {**seen, "marks": [*seen["marks"][-1:], kept], "looked": False}, 0
    return done._replace(state=replace(done.state, guard={**seen, "since": since}))


def _given_back(
    engine: Engine,
    x: Tensor,
    state: State,
    seen: dict[str, Any],
    answer: tuple[Any, Tensor],
    outcome: Outcome,
) -> Step:
    """The source model's answer, with nothing learnt."""
    output, logits = answer
    measured: dict[str, Any] = {"entropy": entropy(rows(logits)).mean(), "used": 0}
    if state.generator is not None:
        engine.generator.set_state(state.generator)
    state = replace(state, guard=seen)
    return engine.settled(Step(output, rows(logits), state, outcome, measured), x, state)


def _rolled_back(engine: Engine, state: State, seen: dict[str, Any]) -> State:
    """The state of at least `MARK` samples ago where one was trusted, else the source's."""
    marks = seen["marks"]
    old = replace(engine.fresh(), **marks[0]) if len(marks) > 1 else engine.fresh()
    return _taken(old, state)


def _taken(old: State, state: State) -> State:
    """What was learnt of the one, with the stream of the other."""
    return replace(old, **{name: getattr(state, name) for name in STREAM})


def _answers(logits: Tensor, state: State) -> Tensor:
    """One answer for each sample (n, C): of dense logits, at a place that changes with the batch."""
    if logits.dim() == 2:
        return logits.detach()
    dense = logits.detach().flatten(2)
    return dense[..., state.steps * 7919 % dense.shape[2]]
