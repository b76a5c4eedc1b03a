"""Building an engine for a model, a method and what is known of the source, which must fit each other."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import NeedsSource, OptionError, ScopeError, StateError
from testtime._core.gates import Gate
from testtime.adaptation.budget import Ration
from testtime.adaptation.checks import check_output
from testtime.adaptation.engine import Engine
from testtime.adaptation.knowledge import SourceKnowledge, fingerprint
from testtime.adaptation.layers import NormLayer, device_of, norm_layers
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import Look, check_backward, check_statistics, look, named_layer
from testtime.adaptation.outputs import read_logits
from testtime.adaptation.parts.prediction import student
from testtime.adaptation.parts.statistics import SourceStatistics
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.source_like import Signals, SourceLike


def check_source(source: Any, recipe: Recipe, model: nn.Module) -> None:
    """Refuses source knowledge that is none, is missing, or is of another model."""
    if source is not None and not isinstance(source, SourceKnowledge):
        raise OptionError(
            f"source is of type {type(source).__name__}; expected what tt.fit_source(model, "
            "loader) gives, or tt.SourceKnowledge.load(path) reads."
        )
    if recipe.needs and source is None:
        raise NeedsSource(
            f"this method needs {', '.join(n.name for n in recipe.needs)} of the source data. Give "
            "source=tt.fit_source(model, loader), with a loader of about 2000 source samples."
        )
    if source is not None and source.model != fingerprint(model):
        raise StateError(
            "source= was computed for another model. Call tt.fit_source(model, loader) with "
            "this one."
        )


def feature_layer_name(
    model: nn.Module, features: str | None, source: SourceKnowledge | None, recipe: Recipe
) -> str | None:
    """Name of the layer whose input are the features: that of the source knowledge, where there is.

    Raises:
        UnknownName: the model has no layer of that name.
        StateError: the source knowledge is of another layer's features.
    """
    chosen = named_layer(model, features)
    reads = any(getattr(need, "of_features", False) for need in recipe.needs)
    known = None if source is None or not reads else source.features
    if chosen is not None and known is not None and named_layer(model, known) is not chosen:
        raise StateError(
            f"source= is of the features of layer {known!r}, and features={features!r} names another. "
            f"Leave it out, or call tt.fit_source(model, loader, features={features!r})."
        )
    return features if known is None else known


def build(
    model: nn.Module,
    recipe: Recipe,
    order: Sequence[str],
    *,
    source: SourceKnowledge | None,
    gate: Gate | None,
    ration: Ration | None,
    seed: int,
    ranks: Ranks,
    feature_layer: nn.Module | None,
) -> Engine:
    """The engine of an adapter; its gate and its budget take up their work with it.

    Args:
        model: that is borrowed.
        recipe: the method.
        order: names of the normalisation layers as they run; empty while no batch was seen.
        source: what is known of the source data.
        gate: that will ask of batches.
        ration: the budget.
        seed: of all that is drawn.
        ranks: that adapt together.
        feature_layer: whose input are the features; None while no batch was seen.

    Raises:
        ScopeError: the model has no layer that the method could change.
        NeedsSource: the source knowledge says too little.
    """
    norms, device = norm_layers(model, order), device_of(model)
    known = _known_of(source, recipe, device)
    if isinstance(gate, SourceLike):
        signals = None if source is None else source.entries.get(Signals.name)
        gate.begin(norms, signals and {k: v.to(device) for k, v in signals.items()})
    engine = Engine(
        model, recipe, norms, known=known, seed=seed, ranks=ranks, feature_layer=feature_layer
    )
    _check_layers(recipe, engine.loan, norms)
    if ration is not None:
        ration.engage(engine, norms)
    _check_covered(known, recipe, engine.names)
    return engine


def first_look(engine: Engine, x: Tensor, *, features: str | None) -> Look:
    """Runs the source model once, on some samples: what runs in which order.

    Args:
        engine: that was built before.
        x: a batch.
        features: name of the layer whose input are the features.

    Raises:
        InputError: the method cannot work with what the model answers.
        ScopeError: nothing can be learnt through the model.
    """
    recipe, loan = engine.recipe, engine.loan
    read = getattr(recipe.procedure, "read", read_logits)
    found = look(loan.model, loan, x, features=features, read=read)
    check_output(read(found.output), recipe, samples=len(loan.some(x)))
    if recipe.optimizer is not None:
        check_backward(loan, x, read=read)
    check_statistics(loan, x, found.order, recipe.statistics)
    return found


def _known_of(
    source: SourceKnowledge | None, recipe: Recipe, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """What the method needs of the source knowledge, on the model's device: need -> tensors by name.

    Raises:
        NeedsSource: it holds something else.
    """
    known: dict[str, dict[str, Tensor]] = {}
    for need in recipe.needs:
        assert source is not None
        if need.name not in source:
            raise NeedsSource(
                f"source= holds no {need.name}, only {', '.join(source.entries) or 'nothing'}. "
                "Call tt.fit_source with the methods that you use."
            )
        known[need.name] = {name: value.to(device) for name, value in source[need.name].items()}
    return known


def _check_covered(known: dict[str, dict[str, Tensor]], recipe: Recipe, names: list[str]) -> None:
    """Refuses source knowledge that says nothing of a tensor that adapts."""
    for need in recipe.needs:
        if getattr(need, "of_tensors", False):
            held = known[need.name]  # by name, or by a word and the name, which may have spaces
            missing = set(names) - held.keys() - {key.partition(" ")[2] for key in held}
            if missing:
                raise NeedsSource(
                    f"source= holds no {need.name} of {min(missing)}. Call tt.fit_source with "
                    "the methods that you use."
                )


def _check_layers(recipe: Recipe, loan: Loan, norms: list[NormLayer]) -> None:
    """Refuses a method that only changes stored statistics for a model that stores none."""
    acts = recipe.learns or recipe.procedure is not None or recipe.prediction is not student
    if acts or isinstance(recipe.statistics, SourceStatistics) or loan.norms or loan.tracked:
        return
    kinds = ", ".join(sorted({layer.kind for layer in norms})) or "none"
    raise ScopeError(
        "this method only changes the statistics that normalisation layers stored in training, "
        f"and {type(loan.model).__name__} stores none (its normalisation layers: {kinds}). It "
        "would answer as the source model. Take tent or sar, which adapt scales and shifts of "
        "any normalisation layer, or lame, which changes no model."
    )
