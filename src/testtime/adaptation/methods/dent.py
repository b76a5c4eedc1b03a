"""DENT: defensive entropy minimisation, a dynamic defence.

layers with statistics use the source's; w_b, beta_b are scale and shift of sample b alone
for each batch x:
    w_b, beta_b <- those of the source, for each sample b
    six times:  z_b = f(x_b; w_b, beta_b),  L = mean_b H(p_b) - H(mean_b p_b)
                w, beta <- AdaMod step on L
    return f(x; w, beta), and forget them
"""

import math
import weakref
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from testtime._core.errors import ScopeError
from testtime._core.options import whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.layers import Hook, Kind, NormLayer, hooked, named_input, norm_layers
from testtime.adaptation.learning import finite, gradients
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.parts.objective import Diversity, entropy
from testtime.adaptation.parts.optimizer import AdaMod
from testtime.adaptation.parts.scope import batchnorm_affine
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures import entropy as measure

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OwnAffine:
    """A hook on a layer that scales and shifts by nothing: each sample gets its own.

    Channels are the second dimension of batch, instance and group normalisation. Of layer and RMS
    normalisation they are the last, or, where only the second fits, that one.
    """

    kind: Kind
    scale: Tensor | None
    shift: Tensor | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for own, change in ((self.scale, torch.mul), (self.shift, torch.add)):
            if own is not None:
                output = change(output, self._fit(own, output)).to(output.dtype)
        return output

    def _fit(self, own: Tensor, output: Tensor) -> Tensor:
        count, *shape = own.shape
        check_rows(output, count)
        last = self.kind == "layer" and list(output.shape[-len(shape) :]) == shape
        inner = output.dim() - 1 - len(shape)
        return (
            own.view(count, *([1] * inner), *shape)
            if last
            else own.view(count, *shape, *[1] * inner)
        )


@dataclass(frozen=True, kw_only=True)
class OwnForward:
    """A hook on a layer that does more than to scale and shift at last: it runs sample by sample.

    Args:
        own: name of a tensor of the layer -> each sample's (B, channels).
    """

    own: Tensors

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        name = named_input(args, kwargs)
        x = args[0] if name is None else kwargs[name]
        for each in self.own.values():
            check_rows(x, len(each))
        places = {key: _place(module, key) for key in self.own}
        held = {key: holder[last] for key, (holder, last) in places.items()}
        parts: list[Tensor] = []
        try:
            for place, row in enumerate(x.split(1)):
                for key, (holder, last) in places.items():
                    holder[last] = self.own[key][place].to(held[key].dtype)
                own = ((row, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: row})
                parts.append(module.forward(*own[0], **own[1]))
        finally:
            for key, (holder, last) in places.items():
                holder[last] = held[key]
        return torch.cat(parts)


def _place(module: nn.Module, key: str) -> tuple[dict[str, Any], str]:
    """Where a layer, or a parametrisation within it, holds a tensor."""
    inside, _, last = key.rpartition(".")
    holder = module.get_submodule(inside)
    return (holder._parameters if last in holder._parameters else holder._buffers), last


def _keys(layer: NormLayer) -> dict[str, str]:
    """What the layer calls its tensors -> their names in the model."""
    return {name.removeprefix(f"{layer.name}."): name for name in layer.tensors}


def check_rows(given: Tensor, samples: int) -> None:
    """Refuses a layer that has other than one row for each sample."""
    if len(given) != samples:
        raise ScopeError(
            f"a normalisation layer got {len(given)} rows for {samples} samples; dent needs one "
            "for each. Take a method whose samples share scale and shift: tent."
        )


_last: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()
TORCHS = (_BatchNorm, nn.SyncBatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def affine_last(layer: NormLayer) -> bool:
    """Whether all that a layer does with scale and shift is to scale and shift what it gives.

    It is so in torch's layers. Others may go on, as batch normalisation of timm does with an
    activation, or scale by 1 + w: a copy of theirs is tried.

    Example:
        >>> from testtime.adaptation.layers import norm_layers
        >>> affine_last(norm_layers(nn.Sequential(nn.LayerNorm(2)))[0])
        True
    """
    module = layer.module
    own = type(module).forward in [kind.forward for kind in TORCHS]
    if own and "forward" not in vars(module) and not is_parametrized(module):
        return True
    if module not in _last:
        _last[module] = _try(layer)
    return _last[module]


def _try(layer: NormLayer) -> bool:
    keys = set(_keys(layer))
    try:
        tried: Any = deepcopy(layer.module)
    except Exception:
        return False
    if not keys or not keys <= {"weight", "bias"}:
        return False
    places = {key: _place(tried, key) for key in keys}
    channels = next(holder[last] for holder, last in places.values()).detach()
    ramp = torch.arange(len(channels), device=channels.device).to(channels)
    own = {key: (ramp + place).cos() for place, key in enumerate(sorted(keys))}
    rest = {"weight": torch.ones_like(ramp), "bias": torch.zeros_like(ramp)}
    many = len(ramp)
    for shape in ((2, many, 3, 3), (2, 3, 3, many), (2, 3, many), (2, many)):
        x = torch.arange(math.prod(shape), device=ramp.device).view(shape).sin().to(ramp)
        told: list[Tensor] = []
        try:
            with torch.no_grad():
                for given in (rest, own):
                    for key, (holder, last) in places.items():
                        holder[last] = given[key]
                    told.append(tried.forward(x.clone()))
                pair = {key: value.expand(2, -1) for key, value in own.items()}
                hook = OwnAffine(kind=layer.kind, scale=pair.get("weight"), shift=pair.get("bias"))
                return torch.allclose(hook(tried, (x,), told[0]), told[1], rtol=1e-2, atol=1e-2)
        except Exception:  # of other dimensions
            continue
    return False


@dataclass(frozen=True, kw_only=True)
class EachItsOwn:
    """Scales and shifts of every sample's own, learnt for one batch, and forgotten.

    Args:
        steps: before the answer.
    """

    steps: int
    dense: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    minimises: ClassVar[tuple[str, ...]] = ("objective", "batch_objective")

    @property
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes of a step for each sample."""
        return self.steps + 1.0, float(self.steps)

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """Answers with what the batch taught."""
        own, outcome, told = self.adapt(engine, x, state)
        output = self.answer(engine, x, own)
        logits = rows(read_logits(output))
        told |= {"entropy": measure.entropy(logits).mean(), "used": len(x)}
        return Step(output, logits, state, outcome, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The same: a step keeps nothing."""
        output = self.answer(engine, x, self.adapt(engine, x, state)[0])
        return output, rows(read_logits(output))

    def adapt(
        self, engine: Engine, x: Tensor, state: State, *, unroll: bool = False
    ) -> tuple[Tensors, Outcome, dict[str, Any]]:
        """Scales and shifts (B, channels) by name, what became of the steps, and the last loss.

        With `unroll` they keep their graph down to `x`, for attacks that see the adaptation.
        """
        recipe = engine.recipe
        assert recipe.optimizer is not None
        own = {n: t.detach().expand(len(x), *t.shape).clone() for n, t in state.tensors.items()}
        moments = recipe.optimizer.init(list(own.values()))
        told: dict[str, Any] = {"loss": None}
        for _ in range(self.steps):
            if not unroll:
                own = {name: t.detach() for name, t in own.items()}
            own = {name: t if t.requires_grad else t.requires_grad_() for name, t in own.items()}
            evidence = Evidence(engine, state, own, x)
            with torch.enable_grad():
                evidence.output = self.answer(engine, x, own)
                terms: list[Tensor] = [evidence.ask(p) for p in recipe.batch_objectives]
                if recipe.objective is not None:
                    terms.insert(0, evidence.ask(recipe.objective).mean())
                loss = torch.stack(terms).sum()
            told["loss"] = loss.detach()
            engine.backwards += len(x)
            grads = gradients(loss, own, unroll=unroll)
            if not finite(loss, grads):
                return own, Outcome.NON_FINITE, told
            with torch.set_grad_enabled(unroll):
                moved, moments = recipe.optimizer.step(moments, list(own.values()), grads)
            own = dict(zip(own, moved, strict=True))
        return own, Outcome.ADAPTED, told

    def answer(self, engine: Engine, x: Tensor, own: Tensors) -> Any:
        """The model's output with these scales and shifts; gradients flow to them and to `x`."""
        neutral = {
            name: (torch.zeros_like if name.endswith("bias") else torch.ones_like)(t[0].detach())
            for name, t in own.items()
        }
        with engine.loan.in_full():  # attention's short cuts join samples of other lengths
            output, _ = engine.run(x, neutral, tap=lambda: hooked(_given(engine, own)))
        return output


def _given(engine: Engine, own: Tensors) -> Iterator[Hook]:
    """Hooks by which layers scale and shift each sample by its own."""
    for layer in norm_layers(engine.loan.model):
        held = {key: engine.loan.canonical[name] for key, name in _keys(layer).items()}
        mine = {key: own[name] for key, name in held.items() if name in own}
        if mine and affine_last(layer):
            hook = OwnAffine(kind=layer.kind, scale=mine.get("weight"), shift=mine.get("bias"))
            yield Hook(layer.module, hook, after=True)
        elif mine:
            each = OwnForward(own=mine)
            yield Hook(layer.module, each, after=True, named=True)


@register("method", paper="dent")
def dent(*, lr: float = 6e-3, steps: int = 6) -> Recipe:
    """Gives each sample scales and shifts of its own, made sure and diverse before the answer.

    A dynamic defence: adversarial examples meet a network that moves away from them. `predict`
    adapts too, since nothing is kept. Each process adapts to its own batch.

    Use when: inputs may be attacked by somebody who does not see the adaptation, and batches are
    large (128 in the paper).

    Not when: attackers know of the defence. A gradient attack through the answer alone does not see
    the six steps, so robustness measured so is too high; an attack on the static network, handed
    over, loses a few points only, and attacks can unroll the steps. With a batch of one the two
    terms of the loss cancel, and what a sample is answered depends on the others of its batch.

    Args:
        lr: step size of AdaMod, whose betas are 0.99, 0.999 and 0.6; 6e-3 (code).
        steps: before the answer; 6 (code).

    Departures from the code: logarithms are exact (there of p + 1e-5); the steps never reach the
    gradient of the input (there they add to it). Where there is no BatchNorm, all normalisation
    layers adapt. In a process group each process adapts to its own batch. A layer that does more than
    to scale and shift at last, as one that holds its activation, runs sample by sample.

    Example:
        >>> dent(steps=3).passes
        (4.0, 3.0)

    Reference: Wang, Ju, Shelhamer, Wagner, Darrell, Fighting Gradients with Gradients: Dynamic
        Defenses against Adversarial Attacks, 2021.
    """
    whole(1, steps=steps)
    return Recipe(
        scope=batchnorm_affine,
        objective=entropy,
        batch_objective=Diversity(weight=1.0),
        procedure=EachItsOwn(steps=steps),
        optimizer=AdaMod(lr=lr, betas=(0.99, 0.999), beta3=0.6),
    )
