"""What a method needs of the source data and of the model's layers, checked before it begins."""

from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import NeedsSource, OptionError, ScopeError, StateError
from testtime.adaptation.knowledge import SourceKnowledge, fingerprint
from testtime.adaptation.layers import NormLayer
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import named_layer
from testtime.adaptation.parts.prediction import student
from testtime.adaptation.parts.statistics import SourceStatistics
from testtime.adaptation.recipe import Recipe


def check_kind(source: Any) -> None:
    """Refuses what is no source knowledge."""
    if source is not None and not isinstance(source, SourceKnowledge):
        raise OptionError(
            f"source is of type {type(source).__name__}; expected what tt.fit_source(model, "
            "loader) gives, or tt.SourceKnowledge.load(path) reads."
        )


def check_source(source: SourceKnowledge | None, recipe: Recipe, model: nn.Module) -> None:
    """Refuses source knowledge that is missing, or of another model."""
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


def feature_layer(
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


def known_of(
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


def check_covered(known: dict[str, dict[str, Tensor]], recipe: Recipe, names: list[str]) -> None:
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


def check_layers(recipe: Recipe, loan: Loan, norms: list[NormLayer]) -> None:
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
