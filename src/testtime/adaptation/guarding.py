"""Never worse than frozen: a guard compares the adapted model with its source, and takes it back.

answer as the adapted model does while the guard trusts it: so long the source model runs on
every fourth run of samples only
while the guard does not know  learn all the same, and answer as the source model does
when it distrusts  roll back to a state that was trusted, learn nothing, and answer as the source
      model does, until a trial, on every batch, is not lost any more
after `PATIENCE` samples without trust, go back to the source
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime._core.guards import Guard
from testtime._core.outcomes import Outcome
from testtime.adaptation.engine import Engine
from testtime.adaptation.monitors import asked, check_monitor
from testtime.adaptation.never_worse import RUN, NeverWorse, answered
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.state import STREAM, State, rejoined
from testtime.adaptation.steps import Step, Steps, begun, ended
from testtime.measures.entropy import entropy

APART = 4
"""One run of so many is looked at, once a stream has begun and as long as there is trust."""
BEGINNING = 512
"""Samples of a stream that are all looked at."""
MARK = 512
"""Samples between two states to which one can roll back."""
PATIENCE = 1024
"""Samples without trust after which the source is restored."""
FIRST: dict[str, Any] = {
    "memory": None, "worse": False, "run": 0, "batches": 0, "left": 0, "usual": math.inf, "since": 0,
    "marks": [], "looked": False, "trusted": 0.0,
}  # fmt: skip
"""What is remembered before the first batch."""


def check_guard(guard: Any) -> Guard | None:
    """The guard that is meant: `True` is `NeverWorse()`."""
    if guard is None or guard is False:
        return None
    if guard is True:
        return NeverWorse()
    check_monitor("guard", guard, "update(adapted, source) -> alarm")
    return guard


def distrusted(state: State) -> bool:
    """Whether the source model answers now: also while the guard does not know."""
    return bool(state.guard) and state.guard["worse"] is not False


def vouched(state: State) -> bool:
    """Whether a guard has looked at what was learnt, and trusts it."""
    return bool(state.guard) and not distrusted(state)


def foretold(engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
    """What is answered under a guard that is not asked."""
    if not vouched(state):
        return engine.frozen(x)
    output, logits = engine.predict(x, state)
    missing = ~answered(read_logits(output))
    if missing.any():
        theirs = engine.frozen(x)
        if (missing & answered(theirs[1])).any():
            return theirs
    return output, logits


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
    seen = {**FIRST, **(state.guard or {})}
    size, before = _sizes(engine, x, state)
    passes = seen["left"] > 0 and seen["worse"] is False
    many = max(int(size / seen["usual"]), 1)
    seen = {**seen, "left": max(seen["left"] - many, 0) if passes else 0}
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
    first = bool(worse) and not seen["worse"] and bool(state.guard)
    trusted = seen["trusted"] + size if worse is False else 0.0
    seen = {**seen, "memory": memory, "worse": worse, "trusted": trusted}
    seen = _looked(seen, before + size, size)
    if worse:
        if steps is not None:
            steps.close()
        if first:
            state, seen = _rolled_back(engine, state, seen), {**seen, "marks": [], "since": 0}
        elif seen["since"] >= PATIENCE:
            state, seen = _taken(engine, engine.fresh(), state), {**seen, "since": 0}
        seen = {**seen, "since": seen["since"] + size}
        outcome = Outcome.ROLLED_BACK if first else Outcome.GUARDED
        return _given_back(engine, x, state, seen, theirs, outcome)
    if steps is None:
        return _tried(engine, x, state, seen, (output, rows(adapted)), theirs, size)
    if done is None:
        yield theirs[0] if worse is None else output
        done = ended(steps)
    return (
        _unsure(engine, seen, done, theirs, size) if worse is None else _watched(seen, done, size)
    )


def _sizes(engine: Engine, x: Tensor, state: State) -> tuple[float, float]:
    """Samples in the batch and before it; on ranks their means, so that all look when one does."""
    if engine.ranks.alone:
        return len(x), state.samples
    own = torch.tensor([1.0, len(x), state.samples], dtype=torch.float64, device="cpu").to(
        engine.device
    )
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
) -> tuple[bool | None, Any]:
    """The guard's word, the same on all ranks, where one that distrusts is enough; and its memory.

    It is asked of samples that both models answer. A model that gives no number where its source
    does is not trusted, whatever the guard.
    """
    to_scale = getattr(engine.recipe.prediction, "to_scale", None)
    adapted = to_scale(adapted) if to_scale else adapted
    pair, memory = (_answers(adapted, state), _answers(source, state)), seen["memory"]
    both = answered(pair[1])  # where nothing is missing, the adapted model answers there too
    missing = (answered(source) & ~answered(adapted)).any()
    worse, some, all_ = torch.stack([missing, both.any(), both.all()]).tolist()
    complaint: Exception | None = None
    if not worse and some:
        pair = pair if all_ else (pair[0][both], pair[1][both])
        try:
            worse, memory = asked("guard", guard, memory, *pair)
        except Exception as error:
            complaint = error
    elif not worse:
        worse = seen["worse"]
    if not engine.ranks.agree(complaint, engine.device):
        raise complaint or InputError("the guard of another rank raised an error")
    if not engine.ranks.alone:
        words = [float(worse is True), float(worse is None)]
        bad, unsure = engine.ranks.sum(torch.tensor(words, device=engine.device)).tolist()
        worse = True if bad else None if unsure else False
    return worse, memory


def _looked(seen: dict[str, Any], samples: float, size: float) -> dict[str, Any]:
    """Counts a run of samples that was looked at; after it, as many batches go by `APART` - 1 times.

    One that is much larger than those counts as many of them.
    """
    run, batches = seen["run"] + size, seen["batches"] + 1
    seen = {**seen, "looked": True}
    if run < RUN:
        return {**seen, "run": run, "batches": batches}
    young = samples < BEGINNING or 0 < seen["trusted"] < BEGINNING
    left = 0 if young or seen["worse"] is not False else (APART - 1) * batches
    return {**seen, "run": 0, "batches": 0, "left": left, "usual": run / batches}


def _watched(seen: dict[str, Any], done: Step, size: float) -> Step:
    """The step of a model that is trusted; now and then its state is marked.

    Between two marks there is a look, so that the older of them has been found to be trusted.
    """
    since = seen["since"] + size
    if not seen["marks"] or (since >= MARK and seen["looked"]):
        kept = {f.name: getattr(done.state, f.name) for f in fields(State) if f.name not in STREAM}
        seen, since = {**seen, "marks": [*seen["marks"][-1:], kept], "looked": False}, 0
    return done._replace(state=replace(done.state, guard={**seen, "since": since}))


def _tried(
    engine: Engine,
    x: Tensor,
    state: State,
    seen: dict[str, Any],
    ours: tuple[Any, Tensor],
    theirs: tuple[Any, Tensor],
    size: float,
) -> Step:
    """A trial that was not lost; where it was not won either, one learns again, unheard."""
    if seen["worse"] is None:
        return _given_back(engine, x, state, seen, theirs, Outcome.GUARDED)
    measured: dict[str, Any] = {"entropy": entropy(ours[1]).mean(), "used": 0}
    step = Step(*ours, state, Outcome.TRUSTED, measured)
    return _watched(seen, engine.settled(step, x, state), size)


def _unsure(
    engine: Engine, seen: dict[str, Any], done: Step, theirs: tuple[Any, Tensor], size: float
) -> Step:
    """The step was taken, and the source answers. Its state is none to roll back to."""
    output, logits = theirs[0], rows(theirs[1])
    outcome = Outcome.UNSURE if done.outcome is Outcome.ADAPTED else done.outcome
    state = replace(done.state, guard={**seen, "since": seen["since"] + size})
    measured = {**done.measured, "entropy": entropy(logits).mean()}
    if engine.recipe.outlier is not None:
        measured["outlier"] = engine.recipe.outlier(logits)
    return Step(output, logits, state, outcome, measured)


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
    return _taken(engine, old, state)


def _taken(engine: Engine, old: State, state: State) -> State:
    """What was learnt of the one, with the stream of the other."""
    return _bought(engine, rejoined(old, state), state)


def _bought(engine: Engine, old: State, state: State) -> State:
    """The old state, with what a batch cost in the other and is true all the same, such as labels."""
    bought = getattr(engine.recipe.procedure, "bought", None)
    if bought is None or not state.memory:
        return old
    return replace(old, memory=bought(old.memory, state.memory))


def _answers(logits: Tensor, state: State) -> Tensor:
    """One answer for each sample (n, C): of dense logits, at a place that changes with the batch."""
    if logits.dim() == 2:
        return logits.detach()
    dense = logits.detach().flatten(2)
    return dense[..., state.steps * 7919 % dense.shape[2]]
