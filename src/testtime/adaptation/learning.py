"""One step on what a batch shows: select, loss, gradient, optimizer, teacher, restoration."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import ScopeError
from testtime._core.outcomes import Outcome
from testtime._core.seeds import generator
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.parts.optimizer import SharpnessAware
from testtime.adaptation.recipe import reads
from testtime.adaptation.state import State

Learned = tuple[State, Outcome, dict[str, Any]]
"""The state after a step, what became of it, and what it measured by name."""


def learn(evidence: Evidence) -> Learned:
    """One step of a recipe's parts on what the evidence shows."""
    engine, state = evidence.engine, evidence.state
    optimizer = engine.recipe.optimizer
    assert optimizer is not None
    with torch.enable_grad():
        weights, selection = _select(evidence, state.selection)
    kept = replace(state, selection=selection)
    # the loss is of the whole batch where its forward has a graph, else of the few that teach, which
    # then go through once more; the second gradient of a sharpness-aware step is always of the few
    taught = few = (evidence, weights)
    if weights is not None and engine.shortcuts.may_leave_out(evidence.inputs):
        of_samples = weights.view(len(evidence.inputs), -1)  # dense logits: one for each pixel
        # places and no mask: a mask's length is not known, so that each use waits for the device
        chosen = (of_samples != 0).any(1).nonzero().flatten()
        share = len(chosen) / len(of_samples)
        kept = replace(kept, teaching=_moving_share(state.teaching, share))
        if share:
            few = evidence.only(chosen), of_samples[chosen].flatten()
        if not evidence.logits.requires_grad:
            taught = few
    with torch.enable_grad():
        loss, used = _loss(*taught)
    measured: dict[str, Any] = {"used": used, "loss": None if loss is None else loss.detach()}
    if loss is None:
        return kept, Outcome.NOTHING_RELIABLE, measured
    grads = _gradient(loss, taught[0])
    if isinstance(optimizer, SharpnessAware) and finite(loss, grads):
        with torch.no_grad():
            worst = optimizer.worst(list(evidence.learning.values()), grads)
        there = dict(zip(evidence.learning, worst, strict=True))
        beside = {name: there.pop(name) for name in state.beside}
        teaching, weights = few
        evidence = Evidence(
            engine, replace(state, beside=beside), as_leaves(there), teaching.inputs
        )
        with torch.enable_grad():
            again, _ = _select(evidence, state.selection)
            both = again if weights is None else (weights * (again != 0))  # who may here and there
            loss, used = _loss(evidence, both)
        measured = {"used": used, "loss": None if loss is None else loss.detach()}
        if loss is None:
            return kept, Outcome.NOTHING_RELIABLE, measured
        grads = _gradient(loss, evidence)
    moved = _moved(kept, evidence, grads)  # a device has it to do before it is waited for
    value = number(loss, grads)
    if value is None:
        return state, Outcome.NON_FINITE, measured
    return _restored(moved, evidence, value, grads, measured)


def _select(evidence: Evidence, state: Any) -> tuple[Tensor | None, Any]:
    """The weight of each sample, None where all teach alike; and the selections' states."""
    weights: Tensor | None = None
    states: list[Any] = []
    for part, old in zip(evidence.engine.recipe.selections, state, strict=True):
        if hasattr(part, "init"):
            own, new = evidence.ask(part, state=old)
        else:
            own, new = evidence.ask(part), None
        states.append(new)
        weights = own if weights is None else weights * own
    return weights, states


def _loss(evidence: Evidence, weights: Tensor | None) -> tuple[Tensor | None, Any]:
    """The loss, or None when no sample may teach; and how many do."""
    recipe, ranks = evidence.engine.recipe, evidence.ranks
    evidence.weights = weights
    terms: list[Tensor] = []
    used: Any = len(evidence.logits)
    if recipe.objective is not None:
        values = evidence.ask(recipe.objective)
        if weights is None:
            terms.append(ranks.mean(values))
        else:
            teaching = weights != 0
            used = ranks.sum(teaching.sum().to(values.dtype))
            if float(used):
                terms.append(ranks.sum(torch.where(teaching, weights * values, 0.0).sum()) / used)
    terms.extend(evidence.ask(part) for part in recipe.batch_objectives)
    if not terms:
        return None, used
    if recipe.penalty is not None:
        terms.append(evidence.ask(recipe.penalty))
    return sum(terms[1:], start=terms[0]), used


def _gradient(loss: Tensor, evidence: Evidence) -> list[Tensor]:
    engine = evidence.engine
    return engine.gradient(loss, evidence.learning, samples=evidence.differentiated)


def _moved(state: State, evidence: Evidence, grads: list[Tensor]) -> State:
    """The state after a step along the gradient, its teacher following."""
    engine, recipe = evidence.engine, evidence.engine.recipe
    assert recipe.optimizer is not None
    with torch.no_grad():
        now = [*state.tensors.values(), *state.beside.values()]
        stepped, optimizer = recipe.optimizer.step(state.optimizer, now, grads)
        moved, beside = stepped[: len(state.tensors)], stepped[len(state.tensors) :]
        teacher = state.teacher
        if teacher is not None:
            fixed = engine.source_tensors(list(teacher)[len(moved) :])
            followed = recipe.teacher.follow(list(teacher.values()), [*moved, *fixed.values()])
            teacher = dict(zip(teacher, followed, strict=True))
    return replace(
        state,
        tensors=dict(zip(state.tensors, moved, strict=True)),
        beside=dict(zip(state.beside, beside, strict=True)),
        optimizer=optimizer,
        teacher=teacher,
        averages=evidence.averages,
        teacher_averages=evidence.teacher_averages,
    )


def _restored(
    state: State, evidence: Evidence, loss: float, grads: list[Tensor], measured: dict[str, Any]
) -> Learned:
    """The moved state after restoration and recovery, where there are such."""
    engine, recipe = evidence.engine, evidence.engine.recipe
    if recipe.restoration is not None:
        teacher = state.teacher
        offered = {
            "tensors": list(state.tensors.values()),
            "source": [engine.loan.source(name) for name in state.tensors],
            "grads": grads[: len(state.tensors)],
            "teacher": [] if teacher is None else list(teacher.values()),
            "generator": _common_generator(evidence),
        }
        asked = reads(recipe.restoration)
        with torch.no_grad():
            restored = recipe.restoration(**{name: offered[name] for name in asked})
        moved, followed = restored if "teacher" in asked else (restored, offered["teacher"])
        state = replace(
            state,
            tensors=dict(zip(state.tensors, moved, strict=True)),
            teacher=None if teacher is None else dict(zip(teacher, followed, strict=True)),
        )
    if recipe.recovery is not None:
        average, recovered = recipe.recovery(state.loss_average, loss)
        if recovered:
            return engine.fresh(), Outcome.RECOVERED, measured
        state = replace(state, loss_average=average)
    return state, Outcome.ADAPTED, measured


def _common_generator(evidence: Evidence) -> torch.Generator:
    """Chance that all ranks share: their own has moved on by the size of their batch."""
    if evidence.ranks.alone:
        return evidence.generator
    engine = evidence.engine
    return generator(engine.seed, "ranks", evidence.state.steps, device=engine.device)


def _moving_share(average: float | None, share: float) -> float:
    """The moving average of the share of samples that teach."""
    return share if average is None else 0.75 * average + 0.25 * share


def as_leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values as leaves of a new graph."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def gradients(loss: Tensor, tensors: dict[str, Tensor], *, unroll: bool = False) -> list[Tensor]:
    """Gradients of a loss; zero for tensors that it never meets. With `unroll` they have a graph.

    Raises:
        ScopeError: when it meets none because the model carries no gradient.
    """
    of = list(tensors.values())
    grads: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, of, create_graph=unroll, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ScopeError(
            "nothing can be learnt: the model's output carries no gradient of what adapts. Its "
            "forward runs under torch.no_grad(), detaches its output, is quantised after it, or uses "
            f"none of {', '.join(list(tensors)[:3])}. Mend the model, or take a method that learns "
            "nothing: bn-adapt, lame, source."
        )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, grads, strict=True)]


def finite(loss: Tensor, grads: list[Tensor]) -> bool:
    """Whether a loss and its gradients are numbers."""
    return number(loss, grads) is not None


def number(loss: Tensor, grads: list[Tensor]) -> float | None:
    """The loss; None where it or a gradient is no number. All is read in one wait for the device."""
    told = torch.stack([loss.detach(), *torch._foreach_norm(grads)]).tolist()
    return told[0] if all(map(math.isfinite, told)) else None
