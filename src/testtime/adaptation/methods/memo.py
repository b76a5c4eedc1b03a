"""MEMO: test-time robustness via adaptation and augmentation.

for each image x, beginning at the source:
    x_1 ... x_V = augmented copies of x
    theta <- theta - lr * d/dtheta H( mean_v softmax(f_theta(x_v)) )
    return f_theta(x)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.outputs import join, read_logits, rows
from testtime.adaptation.parts.objective import marginal_entropy
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.scope import all_parameters
from testtime.adaptation.parts.statistics import MixedStatistics
from testtime.adaptation.parts.views import (
    Augment,
    augmix_view,
    cotta_view,
    needs_pixels,
    roid_view,
)
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures.entropy import entropy

ONE_DRAW = (cotta_view, roid_view)
"""Views that draw once for a whole batch."""


def copies_of(image: Tensor, count: int, augment: Augment, generator: torch.Generator) -> Tensor:
    """Changed copies of one image (1, ...), made together.

    The views of `ONE_DRAW` are called for each copy: together, all would be the same.

    Example:
        >>> made = copies_of(torch.rand(1, 3, 8, 8), 4, roid_view, torch.Generator())
        >>> made.shape
        torch.Size([4, 3, 8, 8])
    """
    if augment in ONE_DRAW:
        return torch.cat([augment(image, generator) for _ in range(count)])
    return augment(image.expand(count, *image.shape[1:]), generator)


@dataclass(frozen=True, kw_only=True)
class EachImage:
    """Each image alone: a step on its copies, then its answer, and nothing is kept.

    Args:
        count: copies of an image.
        augment: makes them.
    """

    count: int
    augment: Augment
    dense: ClassVar[bool] = False
    alone: ClassVar[bool] = True

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes for each image: its copies, and its answer."""
        return self.count + 1.0, float(self.count)

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """Adapts to, and answers, one image after the other."""
        outputs: list[Any] = []
        losses: list[Tensor] = []
        worst = Outcome.ADAPTED
        for image in x.split(1):
            copies = copies_of(image, self.count, self.augment, engine.generator)
            evidence = Evidence(engine, state, engine.leaves(state), copies)
            adapted, outcome, measured = engine.learn(evidence)
            worst = outcome if outcome is not Outcome.ADAPTED else worst
            losses.append(measured["loss"])
            outputs.append(self._look(engine, image, adapted))
        output = join(outputs)
        logits = rows(read_logits(output))
        told = {
            "loss": torch.stack(losses).mean(),
            "entropy": entropy(logits).mean(),
            "used": len(x),
        }
        return Step(output, logits, state, worst, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The answers without a step."""
        output = join([self._look(engine, image, state) for image in x.split(1)])
        return output, rows(read_logits(output))

    def _look(self, engine: Engine, image: Tensor, state: State) -> Any:
        with torch.no_grad():
            output, _ = engine.run(image, state.tensors)
        return output


@register("method", paper="memo")
def memo(
    *,
    lr: float = 2.5e-4,
    views: int = 64,
    prior: float = 16,
    augment: Augment = augmix_view,
) -> Recipe:
    """One step on all weights for each image, towards agreement of its augmented copies.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs. Nothing is kept between images, so their order does not matter but for the
    random draws, and processes have nothing to agree on.

    Use when: images come one at a time, each shifted in its own way, and time does not matter.

    Not when: answers must be quick: every image is run, forward and backward, in 64 copies.
    Nothing is learnt from the stream.

    Args:
        lr: step size of SGD; 2.5e-4 for a ResNet-50 (code; CIFAR-10: 0.005).
        views: V; 64 (code; CIFAR-10: 32).
        prior: N; layers with statistics use 1 / (N + 1) of the batch's; 16 (code).
        augment: makes the copies; for small images, as the code for CIFAR-10,
            `small_augmix_view` of `adaptation.parts.views`. One of your own is given the image V
            times, and has to draw for each.

    Example:
        >>> memo(views=8).procedure.count
        8

    Reference: Zhang, Levine, Finn, MEMO, NeurIPS 2022.
    """
    whole(1, views=views)
    in_range(0, prior=prior)
    return Recipe(
        scope=all_parameters,
        statistics=MixedStatistics(alpha=1 / (prior + 1)),
        batch_objective=marginal_entropy,
        procedure=EachImage(count=views, augment=augment),
        optimizer=SGD(lr=lr),
    )
