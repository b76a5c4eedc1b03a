"""What methods need to know of the source data, computed once where the data is."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError, OptionError
from testtime._core.registry import find
from testtime.adaptation.checks import check_input, check_model, check_output, read_labels, taking
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.knowledge import SourceKnowledge, fingerprint
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.learning import gradients
from testtime.adaptation.look import check_backward, look
from testtime.adaptation.modes import computing
from testtime.adaptation.outputs import read_logits
from testtime.adaptation.parts.knowledge import Need
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe, describe
from testtime.adaptation.source_like import Signals


class SourceBatch:
    """A batch of source data as needs see it; what is costly is made when asked for, once.

    Args:
        inputs: the batch.
        labels: (B,), or (B, H, W) for dense logits, as the loader gives them, or None.
        seen: what the source model answers.
        engine: of the method that needs it.
    """

    def __init__(self, inputs: Tensor, labels: Any, seen: Evidence, engine: Engine) -> None:
        self.inputs, self._labels, self._seen, self.engine = inputs, labels, seen, engine

    @property
    def labels(self) -> Tensor:
        """Class of each sample (B,).

        Raises:
            InputError: the loader gives none, or what is no class for each sample.
        """
        if self._labels is None:
            raise InputError(
                "the method needs labels of the source data; give a loader of (inputs, labels)."
            )
        return self._read_labels()

    @cached_property
    def labels_or_predictions(self) -> Tensor:
        """Class of each sample (B,), or pixel: its label where there is one, else the prediction.

        Raises:
            InputError: the labels are no whole numbers from 0 to C - 1, or not one for each.
        """
        return self.logits.argmax(-1) if self._labels is None else self._read_labels()

    def _read_labels(self) -> Tensor:
        logits = read_logits(self._seen.output)
        shape, classes = tuple(logits[:, 0].shape), logits.shape[1]
        labels = read_labels(self._labels, shape=shape, classes=classes, who="the loader")
        return labels.flatten().to(logits.device)

    @property
    def logits(self) -> Tensor:
        """The source model's logits (B, C), without a gradient."""
        return self._seen.logits

    @property
    def features(self) -> Tensor:
        """The source model's features (B, d): input of the layer that gives logits, or as named."""
        return self._seen.features

    @property
    def own_features(self) -> Tensor:
        """The same under the method's statistics, for a method that reads features."""
        with torch.enable_grad():  # the same forward serves gradients
            return self._evidence.features.detach()

    @cached_property
    def _evidence(self) -> Evidence:
        state = self.engine.fresh()
        return Evidence(self.engine, state, self.engine.leaves(state), self.inputs)

    def gradients(self, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Gradients of a loss of the logits, under the method's statistics, of what it adapts."""
        with torch.enable_grad():
            evidence = self._evidence
            grads = gradients(loss(evidence.logits), evidence.tensors)
        return dict(zip(evidence.tensors, grads, strict=True))


@dataclass
class Sought:
    """A need while source data is read, met as one of the recipes that have it runs the model.

    Attributes:
        need: what is to be known.
        engine: of the recipe.
        sums: over the batches so far.
    """

    need: Need
    engine: Engine
    sums: dict[str, Tensor] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """How often it sees the data."""
        return getattr(self.need, "passes", 1)

    def add(self, x: Tensor, labels: Any, seen: Evidence, number: int) -> None:
        """Takes in a batch of the pass of that number."""
        if number < self.passes:
            self.sums = self.need.add(self.sums, SourceBatch(x, labels, seen, self.engine))

    def turn(self, number: int) -> None:
        """Takes note that the pass of that number is over."""
        turn = getattr(self.need, "turn", None)
        if turn is not None and number < self.passes:
            self.sums = turn(self.sums)


def fit_source(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    methods: str | Recipe | Sequence[str | Recipe] | Mapping[str, Recipe] = ("eata",),
    features: str | None = None,
    gate: bool = False,
) -> SourceKnowledge:
    """Computes in one pass over source data all that the named methods need to know of it.

    Print the result to see what each method needs and how large it is. Few methods (they say so)
    need more than one pass, or labels.

    Args:
        model: the source model; left as it is.
        loader: batches of inputs, or of (inputs, labels, ...); about 2000 samples serve most.
        methods: names of the methods that will use it, or recipes.
        features: name of the layer whose input are the features; None is the layer that gives the
            logits, or else the linear layer that runs last. Adapters with what is found read the
            same.
        gate: whether also what `tt.adapt(..., gate=True)` compares with. Give samples that the model was not
            trained on: it is surer of those that it was, so that other data never look like them.

    Raises:
        InputError: when the loader gives no batch, one that is not fit for the model, or no labels
            where they are needed.
        ScopeError: when the model cannot be lent: it is scripted, has no weights yet.
        OptionError: when two methods need the same thing with other options, or one is none.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> known = fit_source(model, [torch.randn(8, 4)], methods=["eata"])
        >>> print(known)
        of 8 source samples, 24 bytes:
          eata: fisher (1.weight 3, 1.bias 3; 24 bytes)
    """
    check_model(model)
    recipes = _recipes(methods)
    if not hasattr(loader, "__iter__"):
        raise InputError(
            f"loader is of type {type(loader).__name__}; expected batches, as a list or a DataLoader."
        )
    needs, norms = _needs(recipes, gate=gate), norm_layers(model)
    source = Engine(model, Recipe(), norms, ranks=Ranks())
    sought = [Sought(need, Engine(model, own, norms, ranks=Ranks())) for need, own in needs]
    rank: int | None = None  # of the batches, once the model has met one
    kind: tuple[torch.Size, torch.dtype] | None = None  # of the batch before
    samples = batches = 0
    for number in range(max((each.passes for each in sought), default=1)):
        samples = batches = 0
        for item in loader:
            with computing():
                x, labels = _unpack(item, source.device)
                check_input(x, source.recipe, rank=rank, device=source.device)
                if rank is None:
                    learns = any(recipe.optimizer is not None for recipe in recipes.values())
                    _meet(x, source, sought, features=features, learns=learns)
                    rank = x.dim()
                samples, batches = samples + len(x), batches + 1
                tapped = source.feature_layer is not None
                seen = Evidence(source, source.fresh(), {}, x, tapped=tapped)
                kind, was = (x.shape[1:], x.dtype), kind
                for each in sought:
                    add = partial(each.add, x, labels, seen, number)
                    taking(model, x, add, met=kind == was)
        with computing():
            for each in sought:
                each.turn(number)
        if not batches:
            raise InputError(
                "the loader gave no batch; expected about 2000 source samples"
                + (", as often as it is read: give a DataLoader or a list." if number else ".")
            )
    entries: dict[str, dict[str, Tensor]] = {}
    with computing():
        for each in sought:
            found = each.need.finish(each.sums, samples=samples, batches=batches)
            entries.setdefault(each.need.name, {}).update(found)
    by_method = {name: tuple(n.name for n in recipe.needs) for name, recipe in recipes.items()}
    names = {module: name for name, module in model.named_modules()}
    layer = None if source.feature_layer is None else names.get(source.feature_layer)
    return SourceKnowledge(fingerprint(model), samples, entries, by_method, layer)


def _needs(recipes: Mapping[str, Recipe], *, gate: bool) -> list[tuple[Need, Recipe]]:
    """Each need with every recipe that has it under a scope and statistics of its own."""
    needs: dict[str, tuple[Need, dict[Any, Recipe]]] = {}
    for recipe in recipes.values():
        for need in recipe.needs:
            known, scopes = needs.setdefault(need.name, (need, {}))
            if known != need:
                raise OptionError(
                    f"two methods need {need.name} with other options: {describe(known)} and "
                    f"{describe(need)}. Call fit_source for each."
                )
            scopes[recipe.scope, recipe.statistics] = recipe
    if gate:
        needs[Signals.name] = (Signals(), {None: Recipe()})
    return [(need, recipe) for need, scopes in needs.values() for recipe in scopes.values()]


def _meet(
    x: Tensor, source: Engine, sought: Sequence[Sought], *, features: str | None, learns: bool
) -> None:
    """Looks at the model as it runs on the first batch, and tells all engines its feature layer."""
    model = source.loan.model
    found = taking(model, x, partial(look, model, source.loan, x, features=features))
    if learns:
        check_backward(source.loan, x)
    logits = read_logits(found.output)
    for engine in (source, *(each.engine for each in sought)):
        check_output(logits, engine.recipe, samples=len(source.loan.some(x)))
        engine.feature_layer, engine.loan.size = found.feature_layer, source.loan.size


def _recipes(methods: Any) -> dict[str, Recipe]:
    named = methods if isinstance(methods, Mapping) else {}
    if isinstance(methods, str | Recipe):
        methods = (methods,)
    given: list[Any] = list(named.values() or methods) if isinstance(methods, Iterable) else [None]
    if not all(isinstance(method, Recipe if named else str | Recipe) for method in given):
        raise OptionError(f"methods is {methods!r:.200}; expected names of methods, or recipes.")
    found: dict[str, Recipe] = dict(named)
    for method in () if named else given:
        if isinstance(method, Recipe):
            found[f"recipe {len(found) + 1}"] = method
        else:
            found[method] = find("method", method).build()
    return found


def _unpack(item: Any, device: torch.device) -> tuple[Any, Any]:
    parts: list[Any] = list(item) if isinstance(item, tuple | list) else [item]
    x, labels, *_ = [
        each.clone() if isinstance(each, Tensor) and each.is_inference() else each
        for each in [*parts[:2], None, None]
    ]
    return x.to(device) if isinstance(x, Tensor) else x, labels
