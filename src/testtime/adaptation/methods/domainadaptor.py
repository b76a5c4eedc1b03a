"""DomainAdaptor: mixed statistics, folded into scale and shift, and generalised entropy.

for each batch x, beginning at the source:
    in every layer with source statistics m_s, v_s and batch statistics m_t, v_t (v_t unbiased):
        lam = weight of the source, from how near the images are to source and batch
        gamma' = gamma sqrt(v_t + eps) / sqrt(lam v_s + (1 - lam) v_t + eps)
        beta' = beta + lam (m_t - m_s) / sqrt(v_t + eps) gamma'
        answer gamma' (h - m_t) / sqrt(v_t + eps) + beta'
    gamma', beta' <- one step of SGD on mean_i T_i^2 H(softmax(z_i / T_i)),  T_i = 2 std(z_i)
    return f(x) with these gamma', beta' and m_t, v_t
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from testtime._core.errors import OptionError
from testtime._core.options import whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.kernels.moments import moments
from testtime.adaptation.layers import Hook, NormLayer, hooked, on_input
from testtime.adaptation.loan import Places
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.parts.objective import (
    augmented_distillation,
    generalised_entropy,
    self_distillation,
)
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.scope import batchnorm_affine
from testtime.adaptation.parts.statistics import (
    AdaptiveMixture,
    MixedStatistics,
    Moments,
    Statistics,
    unbiased,
)
from testtime.adaptation.parts.views import Augment, crop_and_flip, needs_pixels
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures.entropy import entropy

Tensors = dict[str, Tensor]
OF_THE_BATCH = MixedStatistics(alpha=1.0, unbiased=True)
"""What layers normalise with once the mixture is folded, and those that it cannot be folded into."""


def folded(
    scale: Tensor, source: Moments, batch: Moments, *, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """gamma', and beta' - beta: with them, batch statistics answer as the mixture does.

    Example:
        >>> one = torch.ones(1)
        >>> folded(one, Moments(0 * one, one), Moments(one, one), weight=0.5 * one, eps=0.0)
        (tensor([1.]), tensor([0.5000]))
    """
    own = (batch.var + eps).sqrt()
    scale = scale * own / (weight * source.var + (1 - weight) * batch.var + eps).sqrt()
    return scale, weight * (batch.mean - source.mean) / own * scale


def own_affine(
    layer: NormLayer, places: Places, canonical: dict[str, str], adapting: Collection[str]
) -> tuple[str, str] | None:
    """Names of a layer's scale and shift, where both adapt and serve no other layer."""
    own = {name.rpartition(".")[2]: canonical[name] for name in layer.tensors}
    scale, shift = own.get("weight"), own.get("bias")
    if scale is None or shift is None or not {scale, shift} <= set(adapting):
        return None
    return (scale, shift) if len(places[scale]) == len(places[shift]) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A pre-hook: at a layer's first batch, moves its scale and shift by the fold.

    What is moved keeps its gradient; the fold itself has none.
    """

    scale: str
    shift: str
    eps: float
    source: Moments
    tensors: Tensors
    folds: Tensors
    places: Places
    ranks: Ranks

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.scale in self.folds:
            return
        x = args[0].detach()
        with torch.no_grad():
            batch, values = moments(x, self.ranks)
            weight = AdaptiveMixture().weight(
                x, self.source, batch, values=values, ranks=self.ranks
            )
            scale = self.tensors[self.scale]
            new, self.folds[self.shift] = folded(
                scale, self.source, unbiased(batch, values), weight=weight, eps=self.eps
            )
            self.folds[self.scale] = new - scale
        for name in (self.scale, self.shift):
            for holder, key in self.places[name]:
                holder[key] = (self.tensors[name] + self.folds[name]).to(holder[key].dtype)


def folding(engine: Engine, tensors: Tensors, folds: Tensors) -> Iterator[Hook]:
    """Hooks by which layers fold the mixture into their scales and shifts, and note it."""
    loan = engine.loan
    for layer in loan.norms:
        own = own_affine(layer, loan.places, loan.canonical, tensors)
        if own is not None:
            fold = Fold(
                scale=own[0], shift=own[1], eps=layer.eps, source=loan.source_moments(layer),
                tensors=tensors, folds=folds, places=loan.places, ranks=engine.ranks,
            )  # fmt: skip
            yield on_input(layer.module, fold, prepend=True)


@dataclass(frozen=True, kw_only=True)
class FoldThenStep:
    """For each batch alone: fold the statistics, take a step, answer. Nothing is kept.

    Args:
        count: changed copies whose mean logits teach, and from which the fold is taken; 0 for none.
        augment: makes a copy.
    """

    count: int
    augment: Augment

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return bool(self.count) and needs_pixels(self.augment)

    @property
    def dense(self) -> bool:
        """Whether pixels can be samples: not with copies, whose pixels are others."""
        return not self.count

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes of a step for each sample."""
        return 2.0 + self.count, 1.0

    def statistics_of(
        self, layer: NormLayer, places: Places, canonical: dict[str, str], adapting: Collection[str]
    ) -> Statistics:
        """What a layer of a plain copy normalises with, which folds nothing."""
        folds = own_affine(layer, places, canonical, adapting) is not None
        return AdaptiveMixture() if folds else OF_THE_BATCH

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """Answers with what the batch taught."""
        output, outcome, told = self._adapt(engine, x, state)
        logits = rows(read_logits(output))
        told["entropy"] = entropy(logits).mean()
        return Step(output, logits, state, outcome, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The same: a step keeps nothing."""
        output, _, _ = self._adapt(engine, x, state)
        return output, rows(read_logits(output))

    def _adapt(
        self, engine: Engine, x: Tensor, state: State
    ) -> tuple[Any, Outcome, dict[str, Any]]:
        evidence = Evidence(engine, state, engine.leaves(state), x)
        leaves, folds = evidence.tensors, dict[str, Tensor]()

        def fold() -> Any:
            return hooked(folding(engine, leaves, folds))

        if self.count:
            with torch.no_grad():
                copies = torch.cat([self.augment(x, engine.generator) for _ in range(self.count)])
                taught = rows(read_logits(_run(engine, copies, leaves, tap=fold)))
            evidence.augmented = taught.unflatten(0, (self.count, -1)).mean(0)
        with torch.enable_grad():
            if self.count:
                evidence.output = _run(engine, x, _add(leaves, folds))
            else:
                evidence.output = _run(engine, x, leaves, tap=fold)
        adapted, outcome, told = engine.learn(evidence)
        with torch.no_grad():
            return _run(engine, x, _add(adapted.tensors, folds)), outcome, told


def _run(
    engine: Engine, x: Tensor, tensors: Tensors, *, tap: Callable[[], Any] | None = None
) -> Any:
    """The model's output, under this batch's statistics."""
    engine.forwards += len(x)
    output, _ = engine.loan.run(x, tensors, OF_THE_BATCH, ranks=engine.ranks, tap=tap)
    return output


def _add(tensors: Tensors, folds: Tensors) -> Tensors:
    return {name: t + folds[name] if name in folds else t for name, t in tensors.items()}


LOSSES = {
    "gem-t": generalised_entropy,
    "gem-skd": self_distillation,
    "gem-aug": augmented_distillation,
}


@register("method", paper="domainadaptor")
def domainadaptor(
    *,
    lr: float = 1e-3,
    loss: Literal["gem-t", "gem-skd", "gem-aug"] = "gem-t",
    views: int = 3,
    augment: Augment = crop_and_flip,
) -> Recipe:
    """Mixes source and batch statistics as the images ask, and takes one step, for each batch alone.

    Its parts serve other recipes: `statistics.AdaptiveMixture`, and `objective.generalised_entropy`,
    `self_distillation` and `augmented_distillation`. `predict` adapts too, since nothing is kept.

    Use when: each batch may come from another domain that differs mildly from the source, such as
    drawings from photographs.

    Not when: the shift is strong, where the batch's own statistics (`bn-adapt`) do better; or it
    lasts, since nothing is learnt from the stream. Networks without BatchNorm have nothing to mix.

    Args:
        lr: step size of SGD; 1e-3 (code).
        loss: gem-t, or gem-skd, or gem-aug, where changed copies teach; gem-t (code).
        views: copies for gem-aug; 3 (code).
        augment: makes a copy for gem-aug; here a crop and a mirror image. The code's are made for
            photographs.

    Departure from the code: there the product of entropies (B) and squared temperatures (B, 1)
    spreads to (B, B), so that the loss is mean_i H_i times mean_i T_i^2; here, as the algorithm says, each
    entropy is scaled by its own temperature.

    A layer without a scale and shift of its own has nothing to fold the mixture into, and uses the
    batch's statistics; so does one that shares them with another layer, or whose scale or shift a
    parametrisation makes. One that runs several times in a forward is folded by what it first meets,
    which `export` does not repeat.

    Example:
        >>> domainadaptor(loss="gem-skd").passes
        (2.0, 1.0)

    Reference: Zhang, Qi, Shi, Gao, DomainAdaptor: A Novel Approach to Test-time Adaptation,
        ICCV 2023.
    """
    whole(1, views=views)
    if loss not in tuple(LOSSES):
        raise OptionError(f"loss is {loss!r}; expected {', '.join(LOSSES)}")
    copies = views if loss == "gem-aug" else 0
    return Recipe(
        scope=batchnorm_affine,
        statistics=AdaptiveMixture(),
        objective=LOSSES[loss],
        augment=augment if copies else None,
        procedure=FoldThenStep(count=copies, augment=augment),
        optimizer=SGD(lr=lr),
    )
