"""A first look at a model while it runs: what runs in which order, and where its features are."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import unknown
from testtime.adaptation.layers import norm_kind
from testtime.adaptation.loan import Loan
from testtime.adaptation.outputs import read_logits
from testtime.adaptation.parts.statistics import SourceStatistics, Statistics
from testtime.adaptation.ranks import Ranks


@dataclass(frozen=True)
class Look:
    """What a forward of the source model showed.

    Attributes:
        output: of the model, for a sample or two.
        order: names of normalisation layers in order of execution.
        feature_layer: the layer whose input are the features; None when there is no linear layer.
    """

    output: Any
    order: list[str]
    feature_layer: nn.Module | None


def look(model: nn.Module, loan: Loan, x: Tensor, *, features: str | None = None) -> Look:
    """Runs the source model once, on a sample or two.

    Args:
        model: the model that is lent.
        loan: of that model.
        x: a batch.
        features: name of the layer whose input are the features; None is the linear layer that
            runs last.

    Raises:
        UnknownName: the model has no layer of that name.
    """
    chosen = named_layer(model, features)
    order: list[str] = []
    last: list[nn.Module] = []
    hooks = []
    for name, module in model.named_modules():
        if norm_kind(module) is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, n=name: order.append(n)))
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(lambda m, _: last.append(m)))
    try:
        output, _ = loan.run(x[:2], {}, SourceStatistics(), ranks=Ranks())
    finally:
        for hook in hooks:
            hook.remove()
    return Look(output, list(dict.fromkeys(order)), chosen or (last[-1] if last else None))


def answers_alone(loan: Loan, x: Tensor, statistics: Statistics) -> bool:
    """Whether the answer for a sample does not hang on the others of its batch, as a look shows.

    Of two samples, the one's logits must have no gradient at all with respect to the other's input,
    and be what they are when it comes alone, but for rounding.

    Args:
        loan: of the model.
        x: a batch.
        statistics: what layers with stored statistics normalise with.
    """
    pair = torch.cat([x[:1], x[-1:]]).detach().requires_grad_()
    with torch.enable_grad():
        together = read_logits(loan.run(pair, {}, statistics, ranks=Ranks())[0])[0]
        if not together.requires_grad:
            return False
        (slope,) = torch.autograd.grad(together.sum(), pair)
    with torch.no_grad():
        alone = read_logits(loan.run(x[:1], {}, statistics, ranks=Ranks())[0])[0]
    apart = (alone - together).abs().max() <= 0.01 * alone.abs().max()
    return bool(apart) and not slope[1].any()


def named_layer(model: nn.Module, name: str | None) -> nn.Module | None:
    """The layer of that name, None for no name.

    Example:
        >>> named_layer(nn.Sequential(nn.Linear(2, 2)), "0")
        Linear(in_features=2, out_features=2, bias=True)
    """
    if name is None:
        return None
    layers = dict(model.named_modules())
    if name not in layers:
        raise unknown("layer of the model", name, layers)
    return layers[name]
