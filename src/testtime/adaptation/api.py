"""The door: `adapt` and `methods`."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from testtime._core.errors import NeedsSource, OptionError
from testtime._core.gates import Gate
from testtime._core.guards import Guard
from testtime._core.registry import Info, find, infos
from testtime.adaptation.adapter import Adapter
from testtime.adaptation.events import Event
from testtime.adaptation.knowledge import SourceKnowledge
from testtime.adaptation.recipe import Recipe


def methods() -> dict[str, Info]:
    """All methods by name: what each does, its paper, its options, what it needs of source data.

    Example:
        >>> methods()["tent"].options["lr"]
        0.001
    """
    return {
        name: replace(info, needs=tuple(need.name for need in find("method", name).build().needs))
        for name, info in infos("method").items()
    }


def adapt(
    model: nn.Module,
    method: str | Recipe,
    *,
    seed: int = 0,
    source: SourceKnowledge | None = None,
    on_event: Callable[[Event], None] | None = None,
    process_group: Any = None,
    features: str | None = None,
    deferred: bool = False,
    every: int | None = None,
    gate: Gate | bool | None = None,
    guard: Guard | bool | None = None,
    budget: float | None = None,
    **options: Any,
) -> Adapter:
    """Puts an adapter around a model: it answers as the model does, and learns while it answers.

    Args:
        model: maps a batch to logits (B, C), (B, C, L) or (B, C, H, W), a tuple that begins with them, or an
            object with `.logits`. It is borrowed, and stays as it is.
        method: name of a method, or a recipe.
        seed: of the method's random parts.
        source: what the method needs to know of the source data, from `fit_source`.
        on_event: called after each step with what became of it. What it raises costs no answer: the
            step stands, and the error is raised by the next call, which then has done nothing, or by
            `Adapter.flush`.
        process_group: ranks that adapt together, each with its own batch, as one process would
            with the joined batch. None: this process adapts alone.
        features: name of the layer whose input are the features, for methods that read them. None:
            the layer that `source` knows the features of, or the one that gives the logits, or
            else the linear layer that runs last.
        deferred: whether an answer leaves before its update, which then runs behind it. The next
            call waits for it, so that all results are the same to the last bit; see
            `Adapter.flush`.
        every: learns from the first of so many batches, and answers the others as `predict` does:
            one forward, or as many as an answer takes where that is made of views or a teacher;
            None: learns from each. RoTTA has an option of this name of its own, and takes it: it
            learns seldom by itself.
        gate: says when to learn. While it sees no shift, the source model answers, at the cost of
            plain inference. True is `SourceLike()`; a monitor of `testtime.guard` will do. Before
            a shift a batch is asked for each time, after it every fourth time.
        guard: compares what was learnt with the source model, and takes it back: while it sees
            harm, an earlier state is restored, nothing is learnt and the source model answers; while
            it does not know, the source model answers, and what is learnt is kept. True is
            `NeverWorse()`; a monitor of two models' answers as `testtime.guard` has them will do.
            It costs a forward of the source model on all of the first 512 samples and while it does
            not know, and on a quarter of those after; while it sees harm an answer of each model is
            all that a batch costs.
        budget: what adapting may cost beyond answering as `predict` does, as a share of that: 0.5 is
            half a forward for each batch where an answer takes one. Layers are left out by counting,
            then samples and updates by the clock, so that runs repeat only as far as their times do;
            `plan().spending` tells what was chosen and measured. SimATTA has an option of this name
            of its own, and takes it.
        options: of the method, when it is named.

    Raises:
        UnknownName: no method has that name.
        OptionError: the method has no such option, or it cannot take the value; or `deferred` with
            a method that answers after its update.
        ScopeError: the model has nothing that the method could adapt.
        NeedsSource: the method, or the gate, needs `source`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        >>> adapter = adapt(model.eval(), "tent", lr=1e-2)
        >>> adapter(torch.randn(16, 4)).shape
        torch.Size([16, 3])
        >>> adapter.counts.updates
        1
    """
    if isinstance(method, Recipe):
        if options:
            raise OptionError(
                f"options ({', '.join(options)}) go with the name of a method; for a recipe use "
                "dataclasses.replace(recipe, ...)"
            )
        recipe = method
    elif not isinstance(method, str):
        hint = f"{method.__name__}()" if inspect.isfunction(method) else "'tent'"
        raise OptionError(
            f"the method is of type {type(method).__name__}; expected a name or a recipe: "
            f"tt.adapt(model, {hint})"
        )
    else:
        entry = find("method", method)
        if every is not None and "every" in entry.options:
            options, every = {**options, "every": every}, None
        if budget is not None and "budget" in entry.options:
            options, budget = {**options, "budget": budget}, None
        recipe = entry.build(**options)
        if not isinstance(recipe, Recipe):
            raise OptionError(
                f"the method {method!r} made a {type(recipe).__name__}; expected a tt.Recipe, which "
                "its function returns"
            )
        if recipe.needs and source is None:
            given = ", ".join(f"{name}={value!r}" for name, value in options.items())
            usual = recipe.needs == entry.build().needs
            mine = repr(method) if usual else f"{entry.factory.__name__}({given})"
            raise NeedsSource(
                f"{method} needs {', '.join(need.name for need in recipe.needs)} of the source data. "
                f"Give source=tt.fit_source(model, loader, methods=[{mine}]), with a loader of "
                "about 2000 source samples."
            )
    return Adapter(
        model,
        recipe,
        seed=seed,
        source=source,
        on_event=on_event,
        process_group=process_group,
        features=features,
        deferred=deferred,
        every=1 if every is None else every,
        gate=gate,
        guard=guard,
        budget=budget,
    )
