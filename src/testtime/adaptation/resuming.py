"""Going on from a state: a snapshot, or what was read from a file."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from testtime._core.errors import StateError
from testtime._core.gates import Gate
from testtime._core.guards import Guard
from testtime._core.seeds import generator
from testtime.adaptation.budget import opened
from testtime.adaptation.engine import Engine
from testtime.adaptation.knowledge import fingerprint
from testtime.adaptation.monitors import check_memory
from testtime.adaptation.recipe import Recipe, describe
from testtime.adaptation.state import State, check_state


def owner(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Whose a state is: model and method, as a file tells them."""
    return {"model": fingerprint(model), "method": describe(recipe)}


def check_names(state: State, names: Collection[str], what: str) -> None:
    """Refuses a state that adapts other tensors than these, which are known once the model ran."""
    if state.steps and set(state.tensors) != set(names):
        raise StateError(
            f"{what} belongs to another model: it adapts other tensors. Give tt.adapt the budget "
            "that it was made with, or call reset()."
        )


def resumed(
    state: State,
    engine: Engine,
    what: str,
    *,
    seen: bool,
    gate: Gate | None,
    guard: Guard | None,
) -> State:
    """A state, checked to be one to go on from, and made to fit who goes on.

    Args:
        state: of this adapter, of another, or of a file.
        engine: that goes on.
        what: the state, in words.
        seen: whether the engine knows in which order the layers run.
        gate: that goes on.
        guard: that goes on.

    Raises:
        StateError: it is of another method, model, gate or guard, or not finite.
    """
    loan = engine.loan
    check_state(
        state, describe(engine.recipe),
        lambda name: loan.source(name) if name in loan.canonical else None, what,
    )  # fmt: skip
    chance = generator(engine.seed, "adapter", state.steps, device=engine.device).get_state()
    if state.generator is not None and state.generator.shape != chance.shape:
        state = replace(state, generator=chance)  # of another kind of device, which keeps other
    if not state.steps:  # the order of execution may not have been known to who made it
        return replace(engine.fresh(), generator=state.generator)
    if seen:
        check_names(state, engine.names, what)
    if state.account is not None and state.account.keys() != opened().keys():
        raise StateError(
            f"{what} was made by another version of testtime: its budget was kept in another way. Load it "
            "there, or begin anew."
        )
    if gate is not None and state.gate is not None:
        check_memory("gate", gate, state.gate["memory"], what)
    if state.guard is None:
        return state
    if guard is None:  # nobody is left to distrust it
        return replace(state, guard=None)
    check_memory("guard", guard, state.guard["memory"], what)
    if any(mark.keys() - vars(state).keys() for mark in state.guard.get("marks", ())):
        raise StateError(
            f"{what} was made by another version of testtime: it would roll back to what this one does "
            "not know. Load it there, or begin anew."
        )
    return state
