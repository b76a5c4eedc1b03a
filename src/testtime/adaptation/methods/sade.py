"""SADE: self-supervised aggregation of diverse experts.

v_1 ... v_E = logits of the experts, frozen;  w = 1/3, ..., 1/3
for each batch x:
    a = softmax(w);  x', x'' = two changed copies of x
    y' = softmax( sum_e a_e v_e(x') ),  y'' = softmax( sum_e a_e v_e(x'') )
    w <- w + lr * d/dw mean cos(y', y'')        until some a_e, rounded to two digits, is below 0.05
    return sum_e softmax(w)_e v_e(x)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import ScopeError
from testtime._core.options import in_range
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.learning import finite
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.views import Augment, moco_view, needs_pixels
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures.entropy import entropy

BEGIN = 1 / 3
"""What every weight begins with, before the softmax; in the code for three experts."""


def read_experts(output: Any) -> Float[Tensor, "batch experts classes"]:
    """The experts' logits in what a model returns.

    Raises:
        ScopeError: it returns neither two or more tensors (B, C) nor one (B, E, C).

    Example:
        >>> read_experts((torch.zeros(4, 10), torch.ones(4, 10))).shape
        torch.Size([4, 2, 10])
    """
    if isinstance(output, tuple | list):
        alike = {_say(each) for each in output}
        tensors = [each for each in output if isinstance(each, Tensor) and each.dim() == 2]
        if len(tensors) == len(output) > 1 and len(alike) == 1:
            output = torch.stack(tensors, 1)
    if (
        isinstance(output, Tensor)
        and output.is_floating_point()
        and output.dim() == 3
        and output.shape[1] > 1
    ):
        return output
    raise ScopeError(
        f"the model returned {_say(output)}; expected logits of two or more experts, which sade "
        "weighs: a tuple or list of floating point tensors (batch, classes), or one (batch, "
        "experts, classes). testtime.losses.diverse_experts trains such a model. For one with a "
        "single answer take tent, eata or lame."
    )


def _say(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)} of {output.dtype}"
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(map(_say, output)) or 'nothing'}"
    if isinstance(output, dict):
        return f"a dictionary of {', '.join(map(str, output)) or 'nothing'}"
    return f"an object of type {type(output).__name__}"


def aggregate(
    experts: Float[Tensor, "batch experts classes"], weights: Float[Tensor, " experts"]
) -> Float[Tensor, "batch classes"]:
    """sum_e softmax(w)_e v_e.

    Example:
        >>> aggregate(torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), torch.zeros(2))
        tensor([[1., 2.]])
    """
    return torch.einsum("bec,e->bc", experts, weights.softmax(0).to(experts.dtype))


def agreement(
    first: Float[Tensor, "batch experts classes"],
    second: Float[Tensor, "batch experts classes"],
    weights: Float[Tensor, " experts"],
) -> Float[Tensor, " batch"]:
    """cos(y', y'') of the aggregated probabilities of two copies."""
    probs = [aggregate(each, weights).softmax(-1) for each in (first, second)]
    return F.cosine_similarity(*probs, dim=-1, eps=1e-6)


@dataclass(frozen=True, kw_only=True)
class WeighExperts:
    """Learns how to weigh frozen experts, from the agreement of two changed copies.

    Args:
        augment: makes the copies.
        floor: share of an expert, rounded to two digits, below which learning stops.
        optimizer: takes the steps.
    """

    augment: Augment
    floor: float
    optimizer: SGD
    dense: ClassVar[bool] = False
    minimises: ClassVar[tuple[str, ...]] = ()
    passes: ClassVar[tuple[float, float]] = (3.0, 0.0)

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    def read(self, output: Any) -> Tensor:
        """Logits of the class that the experts answer with at first, in equal parts."""
        return at_least_single(read_experts(output)).mean(1)

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """A step on the weights, then the answer."""
        experts, kind = self._look(engine, x, state)
        weights, optimizer, stopped = _unpack(state, experts)
        outcome, told = Outcome.ANSWERED, dict[str, Any](used=0)
        if not stopped:
            copies = [
                self._look(engine, self.augment(x, engine.generator), state)[0] for _ in range(2)
            ]
            loss, grad = _gradient(engine, copies, weights)
            told |= {"used": len(x), "loss": loss}
            outcome = Outcome.NON_FINITE
            if finite(loss, [grad]):
                (weights,), optimizer = self.optimizer.step(optimizer, [weights], [grad])
                least = round(float(weights.softmax(0).min()), 2)
                stopped, outcome = least < self.floor, Outcome.ADAPTED
        logits = aggregate(experts, weights)
        shares = weights.softmax(0).tolist()
        told |= {f"expert {number}": share for number, share in enumerate(shares, 1)}
        told["entropy"] = entropy(logits).mean()
        memory = {"weights": weights, "optimizer": optimizer, "stopped": stopped}
        return Step(logits.to(kind), logits, replace(state, memory=memory), outcome, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The answer with the weights as they are."""
        experts, kind = self._look(engine, x, state)
        logits = aggregate(experts, _unpack(state, experts)[0])
        return logits.to(kind), logits

    def _look(self, engine: Engine, x: Tensor, state: State) -> tuple[Tensor, torch.dtype]:
        """The experts' logits, in float32 where they are in half precision, and their own type."""
        with torch.no_grad():
            output, _ = engine.run(x, state.tensors)
        experts = read_experts(output)
        return at_least_single(experts), experts.dtype


def _unpack(state: State, experts: Tensor) -> tuple[Tensor, dict[str, Any], bool]:
    """Weights, state of the optimizer, and whether learning has stopped."""
    if state.memory is None:
        return experts.new_full(experts.shape[1:2], BEGIN), {"direction": None}, False
    return state.memory["weights"], state.memory["optimizer"], state.memory["stopped"]


def _gradient(engine: Engine, copies: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the mean agreement over the joined batch of all ranks, and its gradient."""
    leaf = weights.detach().requires_grad_()
    with torch.enable_grad():
        total = -agreement(copies[0], copies[1], leaf).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    count = engine.ranks.sum(total.new_tensor(float(len(copies[0]))))
    return engine.ranks.sum(total.detach()) / count, engine.ranks.sum(grad) / count


@register("method", paper="sade")
def sade(
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    floor: float = 0.05,
    augment: Augment = moco_view,
) -> Recipe:
    """Learns how to weigh the experts of a model for whatever class distribution is met.

    The model returns the logits of two or more experts: a tuple or list of tensors (B, C), or one
    tensor (B, E, C). The answer is one tensor (B, C). The experts stay as they are; what each counts
    is told in the events, as `measured["expert 1"]` and so on. With the default `augment`, inputs
    are images in [0, 1], and normalisation belongs in the model. To learn from a whole test set as
    in the paper, send it several times (5 in the code), then `predict`.

    Use when: a model was trained on a long-tailed set with diverse experts
    (`testtime.losses.diverse_experts`), and how frequent classes are where it is used is unknown.

    Not when: images are corrupted rather than otherwise distributed, or the copies change them so
    much that only the most confident expert looks stable: it then gets all the weight.

    Args:
        lr: step size of SGD with Nesterov momentum; 0.1 for CIFAR-100-LT (code; ImageNet-LT 0.025,
            iNaturalist 0.2, Places-LT 0.01).
        momentum: 0.9 (code).
        weight_decay: of the weights w; 5e-4 (code; iNaturalist 2e-4).
        floor: learning stops when a share, rounded to two digits, falls below; 0.05 (code). The
            code asks after each epoch, a stream has none: it is asked after each step.
        augment: makes the copies.

    Example:
        >>> sade().procedure.floor
        0.05

    Reference: Zhang, Hooi, Hong, Feng, Self-Supervised Aggregation of Diverse Experts for
    Test-Agnostic Long-Tailed Recognition, NeurIPS 2022.
    """
    in_range(0, 1, floor=floor)
    optimizer = SGD(lr=lr, momentum=momentum, nesterov=True, weight_decay=weight_decay)
    return Recipe(
        procedure=WeighExperts(augment=augment, floor=floor, optimizer=optimizer),
        answer_after=True,
    )
