"""A budget: what adapting may cost beyond plain inference, as a share of a forward.

Where samples are answered each by itself, a part of each batch teaches, as much as the clock shows to be
within the budget: then most batches teach, as they do without one. Elsewhere whole batches teach, one when
what the updates so far took, and one more would, is within the budget of all batches so far. There the
earlier normalisation layers are left out, by counting, if with them not even one batch of `SELDOM` could
teach; never more than the earlier half. Times are measured in the first batches and then held, so that
nothing is measured for ever.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.devices import wait_for
from testtime._core.options import in_range
from testtime._core.outcomes import Outcome
from testtime.adaptation.engine import Engine
from testtime.adaptation.layers import Hook, NormLayer, hooked
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import source_output
from testtime.adaptation.outputs import detached, joinable, map_tensors, read_logits, rows
from testtime.adaptation.state import State
from testtime.adaptation.steps import Steps, begun, ended
from testtime.measures.entropy import entropy

LEAST = 0.5
"""Share of a forward that the backward of what adapts may take, however small the budget."""
SELDOM = 4
"""Batches of which one at least should teach before layers are left out: the earlier ones adapt best."""
TIMES = 5
"""Batches of each kind that are timed; the first of a kind is left out, since it warms up."""
PART = 8
"""Samples of a batch that teach at least, where not all do."""
CHEAPER = 0.6
"""What the update of a part may take of a whole batch's: parts are worth it by how much oftener they
teach. They are not where calls outweigh what they compute, as with few samples on a GPU."""
Account = dict[str, Any]
"""What was spent: `batches` and `samples` answered; `updates`, of which in `parts` of batches; samples
`learnt` from. `seconds`: measured for a sample that is only answered ("plain") and, beyond that, for one
that teaches with its "whole" batch; and for a batch that is run in parts ("part"), beyond both."""
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Spending:
    """What was chosen for a budget, and what it was measured to cost; shares of a forward.

    Attributes:
        budget: that was given.
        layers: normalisation layers that adapt, of `of` that the method names.
        of: these.
        counted: what a backward through them takes by counting; None before the first batch.
        update: what a whole batch's update was measured to take; None before there were any.
        updates: share of the batches that were learnt from, whole or in part.
        learnt: share of the samples that were learnt from.
        total: what all updates took of all forwards, by these measures.
    """

    budget: float
    layers: int
    of: int
    counted: float | None
    update: float | None
    updates: float
    learnt: float
    total: float | None

    def __str__(self) -> str:
        took = "nothing was measured yet"
        if self.total is not None:
            took = (
                f"{self.updates:.0%} of the batches and {self.learnt:.0%} of the samples taught, which "
                f"took {self.total:.2f}, where all would take {self.update:.2f}"
            )
        return f"budget {self.budget}: {self.layers} of {self.of} layers adapt; {took}"


def executed(loan: Loan, x: Tensor, norms: Sequence[NormLayer]) -> dict[str, float]:
    """For each normalisation layer, the share of the model's operations that come before it.

    Operations are those of weights of two and more dimensions: convolutions and linear layers.

    Args:
        loan: of the model.
        x: a batch, of which two samples are run.
        norms: its layers, in any order.
    """
    before: dict[str, float] = {}
    total = 0.0

    def see(name: str) -> Callable[..., None]:
        return lambda *_: before.update({name: before.get(name, total)})

    def count(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal total
        output = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(output, Tensor):
            for weight in module._parameters.values():
                if weight is not None and weight.dim() > 1:
                    channels = output.shape[1 if weight.dim() > 2 and output.dim() > 1 else -1]
                    total += output.numel() / max(channels, 1) * weight.numel()

    first = (Hook(layer.module, see(layer.name)) for layer in norms)
    hooks = chain(first, (Hook(module, count, after=True) for module in loan.modules))
    with hooked(hooks), loan.in_full():  # as a backward will find it
        source_output(loan, loan.some(x))
    return {name: done / max(total, 1.0) for name, done in before.items()}


def later(
    names: Sequence[str], norms: Sequence[NormLayer], before: dict[str, float], budget: float
) -> tuple[list[str], float | None]:
    """The tensors that a backward of one batch of `SELDOM` reaches within the budget, and what it takes.

    Args:
        names: of the tensors that a method adapts, all of normalisation layers.
        norms: the layers in order of execution.
        before: from `executed`; empty while nothing was run: then all stay.
        budget: share of a forward.
    """
    mine = [layer for layer in norms if set(layer.tensors) & set(names) and layer.name in before]
    if not mine:
        return list(names), None
    bound = max(SELDOM * budget, LEAST)
    kept = [layer for layer in mine if 1 - before[layer.name] <= bound + 1e-9] or mine[-1:]
    tensors = {name for layer in kept for name in layer.tensors}
    return [name for name in names if name in tensors], 1 - before[kept[0].name]


def opened() -> Account:
    """The account of a stream that begins."""
    counts = dict.fromkeys(("batches", "samples", "updates", "parts", "learnt"), 0)
    return {**counts, "seconds": {"plain": [], "whole": [], "part": []}}


def teaching(account: Account, samples: int, budget: float, *, apart: bool) -> int:
    """How many samples of a batch may teach. Plain inference is timed first, then two whole batches.

    Args:
        account: until now.
        samples: of the batch.
        budget: share of a forward.
        apart: whether a part of it may teach, at least `PART` samples: half of it, a third, ...

    Example:
        >>> seconds = {"plain": [9.0, 1.0], "whole": [9.0, 1.0], "part": []}
        >>> account = opened() | {"samples": 128, "learnt": 64, "seconds": seconds}
        >>> [teaching(account, 64, budget, apart=True) for budget in (0.3, 0.4, 0.6, 0.7)]
        [0, 12, 32, 64]
    """
    seconds = account["seconds"]
    if len(seconds["plain"]) < 2:
        return 0
    if len(seconds["whole"]) < 2:
        return samples
    left = budget * _held(seconds["plain"]) * (account["samples"] + samples) * (1 + 1e-9)
    left -= _spent(account)
    whole = samples * _held(seconds["whole"])
    if whole <= left:
        return samples
    if not apart:
        return 0
    most = min(left, CHEAPER * whole) - _held(seconds["part"])
    sizes = (samples // parts for parts in range(2, samples // PART + 1))
    return next((size for size in sizes if whole * size <= most * samples), 0)


def entered(account: Account, samples: int, learnt: int, seconds: float | None) -> Account:
    """The account after a batch.

    Args:
        account: before it.
        samples: of the batch.
        learnt: how many of them taught.
        seconds: that it took; None where it was not timed.
    """
    kind, times = _kind(samples, learnt), account["seconds"]
    if seconds is not None:
        beyond = seconds - samples * _held(times["plain"])
        more = {
            "plain": seconds / samples,
            "whole": beyond / samples,
            "part": beyond - learnt * _held(times["whole"]),
        }
        times = {**times, kind: [*times[kind], more[kind]]}
    return {
        "batches": account["batches"] + 1,
        "samples": account["samples"] + samples,
        "updates": account["updates"] + (kind != "plain"),
        "parts": account["parts"] + (kind == "part"),
        "learnt": account["learnt"] + learnt,
        "seconds": times,
    }


def _kind(samples: int, learnt: int) -> str:
    return "plain" if not learnt else "whole" if learnt == samples else "part"


def _spent(account: Account) -> float:
    """Seconds that all updates took."""
    each, apart = (_held(account["seconds"][kind]) for kind in ("whole", "part"))
    return account["learnt"] * each + account["parts"] * apart


def _held(times: list[float]) -> float:
    """What is taken for true of measured times; nothing before there are two."""
    return max(median(times[1:]), 0.0) if len(times) > 1 else 0.0


class Ration:
    """Keeps the steps of an engine within a budget.

    Args:
        budget: share of a forward.
    """

    def __init__(self, budget: float) -> None:
        in_range(0, budget=budget)
        self.budget = budget
        self.before: dict[str, float] = {}

    def count(self, x: Tensor, norms: Sequence[NormLayer]) -> None:
        """Counts what runs before each layer, in order of execution, where layers may be left out.

        Args:
            x: a batch of the stream.
            norms: the layers.
        """
        if self.engine.only_norms and self.engine.shortcuts.answers_apart(x) is False:
            self.before = executed(self.engine.loan, x, norms)

    def engage(self, engine: Engine, norms: Sequence[NormLayer]) -> None:
        """Takes the engine, and leaves out tensors that its budget does not reach."""
        self.engine, names = engine, engine.names
        self.counted: float | None = None
        if engine.only_norms:
            engine.names, self.counted = later(names, norms, self.before, self.budget)
        self.layers, self.of = (
            sum(bool(set(layer.tensors) & set(own)) for layer in norms)
            for own in (engine.names, names)
        )

    def steps(self, x: Tensor, state: State) -> Steps:
        """The method's step for as many samples as the budget affords; for the others, answers."""
        engine, account = self.engine, state.account or opened()
        apart = bool(engine.shortcuts.answers_apart(x))
        learnt = teaching(account, len(x), self.budget, apart=apart)
        if not engine.ranks.alone:  # clocks differ, and all learn, or none
            idle = float(engine.ranks.sum(x.new_tensor(float(not learnt)))) > 0
            learnt = 0 if idle else len(x)
        timed = len(account["seconds"][_kind(len(x), learnt)]) < TIMES
        start = self._now() if timed else 0.0
        away = 0.0  # whoever has the answer does other things before the rest runs
        if learnt:
            whole = learnt == len(x)
            steps = engine.steps(x, state) if whole else self._in_part(x, learnt, state, account)
            output, done = begun(steps)
            if done is None:
                left = self._now() if timed else 0.0
                yield output
                away = self._now() - left if timed else 0.0
                done = ended(steps)
            if done.outcome is Outcome.NOT_DUE:
                learnt, timed = 0, False
        else:
            done = engine.spared(x, state)
        seconds = self._now() - start - away if timed else None
        account = entered(account, len(x), learnt, seconds)
        done.measured["budget"] = self.told(account).total
        return done._replace(state=replace(done.state, account=account))

    def _in_part(self, x: Tensor, learnt: int, state: State, account: Account) -> Steps:
        """The method's step for some samples, spread evenly over the batch, and answers for all.

        Where what the model returns for them cannot be joined after all, it is asked for the whole
        batch, which teaches nothing, and no later one is run in parts.
        """
        engine, size = self.engine, len(x)
        places = torch.arange(learnt, device=x.device) * size // learnt
        waits = torch.ones(size, dtype=torch.long, device=x.device)
        # other places each time, or of interleaved streams some would never teach
        waits[(places + account["parts"]) % size] = 0
        turns = waits.argsort(stable=True)  # no mask, whose length a device would be waited for
        some, others = turns.split([learnt, size - learnt])
        order = turns.argsort()

        def joined(mine: Tensor, other: Tensor) -> Tensor:
            return torch.cat([mine.detach(), other])[order] if mine.dim() else mine.detach()

        def whole(output: Any) -> Any:
            return map_tensors(joined, output, answered)

        answered = detached(engine.predict(x[others], state)[0])  # which the model may go on to use
        steps = engine.steps(x[some], state)
        output, done = begun(steps)
        if not joinable(output, answered, sizes=(learnt, size - learnt)):
            steps.close()
            engine.shortcuts.stay_whole()
            return engine.spared(x, state)
        if done is None:
            yield whole(output)
            done = ended(steps)
        output = whole(done.output)
        logits = rows(read_logits(output))
        done.measured["entropy"] = entropy(logits).mean()
        return engine.settled(done._replace(output=output, logits=logits), x, state)

    def told(self, account: Account | None) -> Spending:
        """What a plan tells of an account."""
        account = account or opened()
        update = total = None
        plain, whole = (account["seconds"][kind] for kind in ("plain", "whole"))
        samples = max(account["samples"], 1)
        if _held(plain) and len(whole) > 1:  # a clock may stand still
            update = _held(whole) / _held(plain)
            total = _spent(account) / _held(plain) / samples
        return Spending(
            self.budget, self.layers, self.of, self.counted, update,
            account["updates"] / max(account["batches"], 1), account["learnt"] / samples, total,
        )  # fmt: skip

    def _now(self) -> float:
        """Seconds on the clock, once the device has done all that it was given."""
        wait_for(self.engine.device)
        return clock()
