"""What can be read off a deployed model without labels: one number for each sample and signal.

    entropy, confidence     of the prediction
    features                norm of the input of the last linear layer
    statistics/LAYER        distance of a sample's channel means from those stored in training, in
                            variances, for each batch normalisation; for layers that store none, the
                            logarithm of the variance (or mean square) that they divide by, unless
                            it is the batch's

They are what `Exchangeability` watches; `entropy` over ln C and `1 - confidence` suit `Risk`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError
from testtime.adaptation.layers import Hook, NormLayer, hooked, norm_layers, on_input
from testtime.adaptation.look import named_layer
from testtime.adaptation.outputs import read_logits
from testtime.guard.borrow import borrowed
from testtime.measures.confidence import confidence
from testtime.measures.entropy import entropy


def read_signals(model: nn.Module, x: Tensor, *, features: str | None = None) -> dict[str, Tensor]:
    """One forward of the model in eval mode, and its signals, each (n,).

    The model's modes, flags, hooks and the random state are the same afterwards. Signals of a sample
    that holds NaN are NaN, and no other sample's; detectors refuse them, so leave it out and count it.

    Args:
        model: maps a batch to logits (n, classes), or to an output that holds them.
        x: a batch.
        features: name of the layer whose input are the features; None: the linear layer that runs
            last, and no such signal where there is none.

    Raises:
        InputError: the logits are not (n, classes).
        UnknownName: the model has no layer of that name.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
        >>> signals = read_signals(model, torch.randn(16, 4))
        >>> list(signals)
        ['entropy', 'confidence', 'features', 'statistics/1']
        >>> torch.stack(list(signals.values()), 1).shape
        torch.Size([16, 4])
    """
    chosen = named_layer(model, features)
    statistics: dict[str, Tensor] = {}
    entered: list[Tensor] = []

    def see(found: NormLayer, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics[f"statistics/{found.name}"] = _distance(found, args[0].detach())

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        entered.append(args[0].detach())

    def hooks() -> Iterator[Hook]:
        for layer in norm_layers(model):
            if layer.has_statistics or layer.kind != "batch":
                yield on_input(layer.module, partial(see, layer))
        for module in [chosen] if chosen else model.modules():
            if chosen or isinstance(module, nn.Linear):
                yield on_input(module, enter)

    with hooked(hooks()), borrowed(model):
        logits = read_logits(model(x))
    if logits.dim() != 2 or len(logits) != len(x):
        raise InputError(
            f"the logits have the shape {tuple(logits.shape)}; expected ({len(x)}, classes)."
        )
    found = {"entropy": entropy(logits), "confidence": confidence(logits)}
    if entered and len(entered[-1]) == len(x):
        found["features"] = entered[-1].flatten(1).float().norm(dim=1)
    return found | {name: value for name, value in statistics.items() if len(value) == len(x)}


def _distance(layer: NormLayer, x: Tensor) -> Tensor:
    """How far each sample of a layer's input lies from what the layer expects: (n,)."""
    if x.is_nested:
        return torch.cat([_distance(layer, sample[None]) for sample in x.unbind()])
    x = x.float()
    if layer.has_statistics:
        stored = {name: value.float() for name, value in layer.module.named_buffers()}
        means = x.flatten(2).mean(2) if x.dim() > 2 else x
        variance = stored["running_var"] + layer.eps
        return ((means - stored["running_mean"]).square() / variance).mean(1)
    # of a layer that divides a sample by one number there is nothing to average
    return (_divisor(layer, x) + 1e-12).log()[..., None].flatten(1).mean(1)


def _divisor(layer: NormLayer, x: Tensor) -> Tensor:
    """The variances, or mean squares, that a layer without stored statistics divides by: (n, ...)."""
    if layer.kind == "group":
        over = x.reshape(len(x), int(getattr(layer.module, "num_groups", 1)), -1)
    elif layer.kind == "layer":
        own = next(layer.module.parameters(recurse=False), None)
        shape = tuple(getattr(layer.module, "normalized_shape", ()) if own is None else own.shape)
        as_torch = type(layer.module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        if not as_torch and x.dim() == 4 and shape == x.shape[1:2]:  # of images, over channels
            x = x.movedim(1, -1)
        over = x.flatten(-len(shape)) if shape else x
        if not isinstance(layer.module, nn.LayerNorm) and len(layer.tensors) < 2:
            return over.square().mean(-1)
    else:
        over = x.flatten(2)
    return over.var(-1, correction=0)
