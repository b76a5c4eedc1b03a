"""A budget: what adapting may cost beyond plain inference, as a share of a forward.

First by counting, so that it is the same every time: of the tensors in normalisation layers those
stay that a backward reaches within the budget, from the last layer back; never fewer than the later
half's, counted in operations. Then by the clock: a batch teaches when what the updates so far took,
and one more would, is within the budget of all batches so far. Times are measured in the first
batches and then held, so that nothing is measured for ever.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median
from typing import Any

from torch import Tensor, nn

from testtime._core.devices import wait_for
from testtime._core.options import in_range
from testtime.adaptation.engine import Engine
from testtime.adaptation.layers import Hook, NormLayer, hooked
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import source_output
from testtime.adaptation.state import State
from testtime.adaptation.steps import Steps, begun, ended

LEAST = 0.5
"""Share of a forward that the backward of what adapts may take, however small the budget."""
TIMES = 5
"""Batches of each kind that are timed; the first of a kind is left out, since it warms up."""
Account = dict[str, Any]
clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Spending:
    """What was chosen for a budget, and what it was measured to cost; shares of a forward.

    Attributes:
        budget: that was given.
        layers: normalisation layers that adapt, of `of` that the method names.
        of: these.
        counted: what a backward through them takes by counting; None before the first batch.
        update: what an update was measured to take; None before there were any.
        learnt: share of the samples that were learnt from.
        total: what all updates took of all forwards, by these measures.
    """

    budget: float
    layers: int
    of: int
    counted: float | None
    update: float | None
    learnt: float
    total: float | None


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
    """The tensors that a backward reaches within the budget, and what it takes by counting.

    Args:
        names: of the tensors that a method adapts, all of normalisation layers.
        norms: the layers in order of execution.
        before: from `executed`; empty while nothing was run: then all stay.
        budget: share of a forward.
    """
    mine = [layer for layer in norms if set(layer.tensors) & set(names) and layer.name in before]
    if not mine:
        return list(names), None
    bound = max(budget, LEAST)
    kept = [layer for layer in mine if 1 - before[layer.name] <= bound + 1e-9] or mine[-1:]
    tensors = {name for layer in kept for name in layer.tensors}
    return [name for name in names if name in tensors], 1 - before[kept[0].name]


def opened() -> Account:
    """The account of a stream that begins."""
    return {"samples": 0, "learnt": 0, "plain": [], "step": []}


def affords(account: Account, samples: int, budget: float) -> bool:
    """Whether a batch may teach. Plain inference is timed first, and then one update.

    Example:
        >>> account = {"samples": 30, "learnt": 10, "plain": [9.0, 1.0], "step": [9.0, 2.0]}
        >>> affords(account, 10, 0.5), affords(account, 10, 0.4)
        (True, False)
    """
    if len(account["plain"]) < 2:
        return False
    if len(account["step"]) < 2:
        return True
    plain, step = _held(account["plain"]), _held(account["step"])
    spent = (account["learnt"] + samples) * (step - plain)
    return spent <= budget * plain * (account["samples"] + samples) * (1 + 1e-9)


def entered(account: Account, kind: str, samples: int, seconds: float | None) -> Account:
    """The account after a batch of that kind, "plain" or "step"."""
    times = account[kind] if seconds is None else [*account[kind], seconds / samples]
    return {
        **account,
        "samples": account["samples"] + samples,
        "learnt": account["learnt"] + samples * (kind == "step"),
        kind: times,
    }


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
        """Counts what runs before each layer, in order of execution; on a batch of the stream."""
        if self.engine.only_norms:
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
        """The method's step where the budget affords it, else an answer alone; either is timed."""
        engine, account = self.engine, state.account or opened()
        due = affords(account, len(x), self.budget)
        if not engine.ranks.alone:  # clocks differ, and all learn, or none
            due = float(engine.ranks.sum(x.new_tensor(float(not due)))) == 0
        kind = "step" if due else "plain"
        timed = len(account[kind]) < TIMES
        start = self._now() if timed else 0.0
        away = 0.0  # whoever has the answer does other things before the rest runs
        if due:
            steps = engine.steps(x, state)
            output, done = begun(steps)
            if done is None:
                left = self._now() if timed else 0.0
                yield output
                away = self._now() - left if timed else 0.0
                done = ended(steps)
        else:
            done = engine.spared(x, state)
        seconds = self._now() - start - away if timed else None
        account = entered(account, kind, len(x), seconds)
        done.measured["budget"] = self.told(account).total
        return done._replace(state=replace(done.state, account=account))

    def told(self, account: Account | None) -> Spending:
        """What a plan tells of an account."""
        account = account or opened()
        update = total = None
        learnt = account["learnt"] / max(account["samples"], 1)
        if len(account["plain"]) > 1 and len(account["step"]) > 1:
            update = max(_held(account["step"]) / _held(account["plain"]) - 1, 0.0)
            total = update * learnt
        return Spending(self.budget, self.layers, self.of, self.counted, update, learnt, total)

    def _now(self) -> float:
        """Seconds on the clock, once the device has done all that it was given."""
        wait_for(self.engine.device)
        return clock()


def _held(times: list[float]) -> float:
    return median(times[1:])
