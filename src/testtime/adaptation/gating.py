"""Adapt when it helps: no update while the data look like the source's, whose model then answers."""

from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from testtime._core.gates import Gate
from testtime._core.outcomes import Outcome
from testtime.adaptation.engine import Engine
from testtime.adaptation.monitors import asked, check_monitor
from testtime.adaptation.outputs import rows
from testtime.adaptation.source_like import SourceLike, most_entropy
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures.entropy import entropy

AGAIN = 4
"""While an adapter learns, the gate is asked again before every so many batches."""


def check_gate(gate: Any) -> Gate | None:
    """The gate that is meant: `True` is `SourceLike()`."""
    if gate is None or gate is False:
        return None
    if gate is True:
        return SourceLike()
    if isinstance(gate, SourceLike):  # it takes up what it knows of one model
        return copy(gate)
    check_monitor("gate", gate, "update(values) -> alarm")
    return gate


def judge(gate: Gate, engine: Engine, x: Tensor, state: State) -> tuple[State, Step | None]:
    """Asks a gate of a batch: the state to go on with, and the source model's answer where it is
    the one to give.

    While the adapter learns, only every `AGAIN`-th batch is asked for, since asking takes a forward.
    Answers that are no numbers are not the source's; the gate is shown the others.
    """
    seen = state.gate or {"left": 0, "memory": None}
    if seen["left"]:
        return replace(state, gate={**seen, "left": seen["left"] - 1}), None
    watching = getattr(gate, "watching", None)
    with torch.no_grad():
        output, logits = engine.frozen(x, tap=watching or nullcontext)
        logits = rows(logits)
        entropies = entropy(logits)
        values, memory, alarm = entropies / most_entropy(logits), seen["memory"], False
        if watching is None:  # one that looks at layers sees it there, in one wait for the device
            values = values[values.isfinite()]
            alarm = len(values) < len(entropies)
        if len(values):
            said, memory = asked("gate", gate, memory, values)
            alarm = alarm or bool(said)
        if not engine.ranks.alone:  # all learn, or none
            alarm = float(engine.ranks.sum(x.new_tensor(float(alarm)))) > 0
    state = replace(state, gate={"left": alarm * (AGAIN - 1), "memory": memory})
    if alarm:
        return state, None
    measured: dict[str, Any] = {"entropy": entropies.mean(), "used": 0}
    if state.generator is not None:
        engine.generator.set_state(state.generator)
    return state, Step(output, logits, state, Outcome.LIKE_SOURCE, measured)
