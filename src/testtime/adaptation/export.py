"""A plain copy of a model with what was learnt."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.arrays import as_was, at_least_single
from testtime._core.errors import ScopeError
from testtime.adaptation.kernels.moments import moments, plain_moments, wide
from testtime.adaptation.layers import NormLayer, bound, device_of, named_input, norm_layers
from testtime.adaptation.loan import places
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.statistics import (
    AdaptiveMixture,
    BatchStatistics,
    MixedStatistics,
    Moments,
    RunningStatistics,
    Statistics,
)
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.traces import inside, traces_of

MARK = "normalises_with_statistics_of_its_input"
"""Buffer of a copy that a state_dict alone does not make: the plain model refuses it by this name."""


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode; what forwards left behind in the model loses its graph.

    Raises:
        ScopeError: the model cannot be copied, or would share its forward with the copy.
    """
    kept = [value for module in model.modules() for value in vars(module).values()]
    tensors = [each for value in kept for each in inside(value) if isinstance(each, Tensor)]
    memo = {id(each): each.detach().clone() for each in tensors if each.grad_fn is not None}
    way_out = "What was learnt is in adapter.snapshot().tensors, by name."
    try:
        copy = deepcopy(model, memo).eval()
    except Exception as error:
        raise ScopeError(f"{type(model).__name__} cannot be copied: {error}. {way_out}") from error
    lent = set(map(id, model.modules()))
    for name, module in copy.named_modules():
        if _reaches(vars(module).get("forward"), lent):
            raise ScopeError(
                f"the forward of {name or type(model).__name__} was replaced by a function that holds "
                "the module it was of, so that a copy would answer as the model. Compile the module "
                "itself, model = torch.compile(model), or put a module around it in place of the "
                f"function. {way_out}"
            )
    return copy


def _reaches(value: Any, modules: set[int], deep: int = 8) -> bool:
    """Whether a callable has one of these modules in it: bound, as an argument or in a closure."""
    if id(value) in modules or not deep:
        return id(value) in modules
    names = ("__self__", "__func__", "__wrapped__", "func")
    inner = [getattr(value, name, None) for name in names]
    cells = getattr(value, "__closure__", None) or ()
    inner += [*getattr(value, "args", ()), *(c.cell_contents for c in cells)]
    return any(_reaches(each, modules, deep - 1) for each in inner if callable(each))


def exported(model: nn.Module, recipe: Recipe, state: State) -> nn.Module:
    """A copy in eval mode that answers as the student does, or the teacher where it is the one to ask."""
    with torch.no_grad():
        copy = copied(model)
        teaches = recipe.prediction is from_teacher
        tensors = (state.teacher if teaches else state.tensors) or {}
        averages = state.teacher_averages if teaches else state.averages
        own = dict(copy.named_parameters()) | dict(copy.named_buffers())
        for name, value in tensors.items():
            own[name].copy_(as_was(own[name], value))
        held = places(copy)
        of_layer = getattr(recipe.procedure, "statistics_of", lambda *_: recipe.statistics)
        keeping = bound(copy)
        of_input = [
            _give_statistics(
                layer, of_layer(layer, *held, tensors), averages, keeping=layer.module in keeping
            )
            for layer in norm_layers(copy)
        ]
        traces_of(model).forget(copy)
        if any(of_input):
            copy.register_buffer(MARK, torch.ones((), dtype=torch.bool, device=device_of(copy)))
        return copy


def _give_statistics(
    layer: NormLayer, statistics: Statistics, averages: dict[str, Tensor] | None, *, keeping: bool
) -> bool:
    """Makes a layer of the copy normalise with the statistics that it has in the loan.

    Returns:
        Whether these are its input's, in place of stored ones.
    """
    module: Any = layer.module
    own = hasattr(module, "track_running_stats") and not keeping
    if not layer.has_statistics:
        ours = isinstance(statistics, BatchStatistics | RunningStatistics)
        stored = layer.kind == "instance" and getattr(module, "track_running_stats", False)
        if ours and stored:  # an image's own statistics, as in the loan
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        return ours and stored
    if isinstance(statistics, RunningStatistics) and averages:
        module.running_mean.copy_(averages[f"{layer.name}.mean"])
        module.running_var.copy_(averages[f"{layer.name}.var"])
        return False
    if isinstance(statistics, BatchStatistics) and own:
        module.track_running_stats = False
        module.running_mean = module.running_var = None
    elif isinstance(statistics, BatchStatistics | MixedStatistics | AdaptiveMixture):
        module.forward = Restated(module, vars(module).get("forward"), layer.eps, statistics)
    else:
        return False
    return True


@dataclass(frozen=True)
class Restated:
    """A forward for exported layers: scales and shifts what comes in, so that the layer, which
    normalises with the statistics it stored, in effect normalises with the chosen ones.

    It reads the stored ones off the layer, so that they move, change type and are saved with it. A
    hook would not do: a compiler does not see one that its cache is older than.
    """

    module: nn.Module
    forward: Callable[..., Any] | None
    eps: float
    statistics: BatchStatistics | MixedStatistics | AdaptiveMixture

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, name = self.module, named_input(args, kwargs)
        x = args[0] if name is None else kwargs[name]
        stored = Moments(module._buffers["running_mean"], module._buffers["running_var"])  # pyright: ignore[reportArgumentType]
        samples: Any = x.shape[0]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # a graph serves batches of other sizes: none of a tensor's may become a number
            used, values = plain_moments(at_least_single(x)), x.numel() // x.shape[1]
        else:
            used, values = moments(x, Ranks())
        if isinstance(self.statistics, MixedStatistics):
            used = self.statistics.blend(stored, used, samples=samples, values=values)
        elif isinstance(self.statistics, AdaptiveMixture):
            used = self.statistics.blend(x, stored, used, values=values, ranks=Ranks())
        scale = ((stored.var + self.eps) / (used.var + self.eps)).sqrt()
        centred = (x - wide(used.mean, x)) * wide(scale, x)
        restated = (centred + wide(stored.mean, x)).to(x.dtype)
        forward = self.forward or partial(type(module).forward, module)
        if name is None:
            return forward(restated, *args[1:], **kwargs)
        return forward(**{**kwargs, name: restated})
