"""A plain copy of a model with what was learnt."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from testtime.adaptation.layers import NormLayer, norm_layers
from testtime.adaptation.loan import Restated
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.parts.statistics import (
    AdaptiveMixture,
    BatchStatistics,
    MixedStatistics,
    RunningStatistics,
    Statistics,
)
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.traces import traces_of


def exported(model: nn.Module, recipe: Recipe, state: State) -> nn.Module:
    """A copy in eval mode that answers as the student does, or the teacher where it is the one to ask."""
    with torch.no_grad():
        copy = deepcopy(model).eval()
        teaches = recipe.prediction is from_teacher
        tensors = (state.teacher if teaches else state.tensors) or {}
        averages = state.teacher_averages if teaches else state.averages
        own = dict(copy.named_parameters()) | dict(copy.named_buffers())
        for name, value in tensors.items():
            own[name].copy_(value)
        for layer in norm_layers(copy):
            _settle(layer, recipe.statistics, averages)
        traces_of(model).forget(copy)
        return copy


def _settle(layer: NormLayer, statistics: Statistics, averages: dict[str, Tensor] | None) -> None:
    module: Any = layer.module
    if not layer.has_statistics:
        ours = isinstance(statistics, BatchStatistics | RunningStatistics)
        if ours and layer.kind == "instance":  # an image's own statistics, as in the loan
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    elif isinstance(statistics, RunningStatistics) and averages:
        module.running_mean.copy_(averages[f"{layer.name}.mean"])
        module.running_var.copy_(averages[f"{layer.name}.var"])
    elif isinstance(statistics, BatchStatistics) and hasattr(module, "track_running_stats"):
        module.track_running_stats = False
        module.running_mean = module.running_var = None
    elif isinstance(statistics, BatchStatistics | MixedStatistics | AdaptiveMixture):
        module.register_forward_pre_hook(Restated(layer.eps, statistics))
