"""A first look at a model while it runs: what runs in which order, and where its features are."""

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError, ScopeError, TesttimeError, TesttimeWarning, unknown
from testtime.adaptation.layers import Hook, hooked, norm_kind, on_input
from testtime.adaptation.lent import lending
from testtime.adaptation.loan import Loan
from testtime.adaptation.modes import without_hooks
from testtime.adaptation.outputs import joinable, leaves, map_tensors, read_logits, same_value
from testtime.adaptation.parts.statistics import SourceStatistics, Statistics
from testtime.adaptation.ranks import Ranks

ROUNDING = 0.01
"""Share of the largest value by which answers may differ where batches of other sizes round."""
OTHER_SCALE = 100
"""Times the stored variance; corruptions of images at severity 5 stay below 2."""


@dataclass(frozen=True)
class Look:
    """What a forward of the source model showed.

    Attributes:
        output: of the model, for `loan.some` of the batch.
        order: names of normalisation layers in order of execution.
        feature_layer: the layer whose input are the features; None when there is none such.
        dense: whether each pixel has an answer of its own.
    """

    output: Any
    order: list[str]
    feature_layer: nn.Module | None
    dense: bool


def look(
    model: nn.Module,
    loan: Loan,
    x: Tensor,
    *,
    features: str | None = None,
    read: Callable[[Any], Tensor] = read_logits,
) -> Look:
    """Runs the source model once, on a sample or two; on the whole batch where it takes no two.

    Args:
        model: the model that is lent.
        loan: of that model, which is told of batches of one size.
        x: a batch.
        features: name of the layer whose input are the features; None is the one that gives the
            logits: the last linear layer, or 1 x 1 convolution of a single place, with a value for
            each class. Where none has as many, it is the linear layer that runs last.
        read: finds the logits in what the model returns.

    Raises:
        UnknownName: the model has no layer of that name.
        InputError: the model took the batch for a single sample, or does not give its logits as
            (batch, classes, ...).
    """
    chosen = named_layer(model, features)
    ran: list[str] = []
    heads: list[tuple[nn.Module, torch.Size]] = []
    single: list[bool] = []
    scales: list[float | None] = []

    def scale(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not scales:
            scales.append(spread(module, args[0]))

    def place(name: str) -> Callable[..., None]:
        return lambda *_: ran.append(name)

    def head(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.is_nested:  # that has no shape
            heads.append((module, output.shape))

    def taking(module: Any, args: tuple[Any, ...]) -> None:
        single.append(args[0].dim() == x.dim() == 1 + len(module.kernel_size))

    def hooks() -> Iterator[Hook]:
        for name, module in model.named_modules():
            yield Hook(module, place(name))
            if norm_kind(module) is not None:
                yield on_input(module, scale)
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                yield Hook(module, head, after=True)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                yield on_input(module, taking)

    with hooked(hooks()):
        output = _some_run(model, loan, x)
    loan.traces.asleep.difference_update(ran)
    order = [name for name in dict.fromkeys(ran) if norm_kind(loan.named_modules[name]) is not None]
    if single and single[0]:  # (channels, ...) where (batch, channels, ...) was meant
        raise InputError(
            f"the batch has shape {tuple(x.shape)}, which the model's first convolution took for "
            "a single sample. For a single sample use x[None]."
        )
    if scales and (scales[0] or 0) > OTHER_SCALE:
        warnings.warn(
            f"the first normalisation layer, {order[0]}, gets values whose spread is {scales[0]:.0f} times "
            "the variance that it stored in training, so inputs seem to be on another scale. Images of "
            "0 to 255 go to most models as x / 255, with the normalisation of the training: "
            "nn.Sequential(Normalize(mean, std), model).",
            TesttimeWarning,
            stacklevel=2,
        )
    logits = read(output)
    if logits.dim() == 3:
        _check_places(logits, heads)
    if chosen is None:
        chosen = _head(heads, classes=logits.shape[1])
    return Look(output, order, chosen, dense=logits.dim() > 2)


def spread(layer: nn.Module, x: Tensor) -> float | None:
    """How far a layer's input is from the mean that it stored, squared, over the variance it stored.

    The median over channels; about 1 on data like those of the training. None for a layer that stores
    nothing, or was never trained.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> _ = layer.running_var.fill_(4.0)
        >>> spread(layer, torch.tensor([[2.0, 2.0], [-2.0, 2.0]]))
        1.0
    """
    mean, variance = (layer._buffers.get(name) for name in ("running_mean", "running_var"))
    if mean is None or variance is None or x.dim() < 2 or x.shape[1] != len(mean) or x.is_complex():
        return None
    if not mean.any() and bool((variance == 1).all()):
        return None
    rows = x.detach().float().movedim(1, -1).flatten(0, -2)
    return float(((rows - mean).square().mean(0) / (variance + 1e-5)).median())


def source_output(loan: Loan, x: Tensor) -> Any:
    """What the source model returns for a batch, whatever other ranks do."""
    return loan.run(x, {}, SourceStatistics(), ranks=Ranks(), exact=True)[0]


def _head(ran: list[tuple[nn.Module, torch.Size]], *, classes: int) -> nn.Module | None:
    """The layer that gives the logits, of layers and the shapes of what they gave."""
    linear = [(module, shape) for module, shape in ran if isinstance(module, nn.Linear)]
    fits = [
        module
        for module, shape in ran
        if shape.numel() == shape[0] * classes and len(shape) > 1 and shape[1] == classes
    ]
    return (fits or [module for module, _ in linear] or [None])[-1]


def _check_places(logits: Tensor, ran: list[tuple[nn.Module, torch.Size]]) -> None:
    """Refuses logits (batch, length, classes), as taggers of words give them; they look like any others."""
    channels = [s[-1] if isinstance(module, nn.Linear) else s[1] for module, s in ran if len(s) > 1]
    if logits.shape[1] != next((c for c in reversed(channels) if c in logits.shape[1:]), None):
        raise InputError(
            f"the model returned logits of shape (batch, {logits.shape[1]}, {logits.shape[2]}), and no "
            f"layer was seen to give {logits.shape[1]} classes at last; expected (batch, classes, length). "
            "Where classes come last put a module around the model that returns logits.movedim(-1, 1)."
        )


def _some_run(model: nn.Module, loan: Loan, x: Tensor) -> Any:
    """Runs the source model on two samples, or on all where it only takes batches of one size."""
    try:
        return _first_run(model, loan, loan.some(x))
    except Exception as error:
        if len(x) <= 2 or isinstance(error, TesttimeError | torch.OutOfMemoryError):
            raise
    output = _first_run(model, loan, x)
    loan.size = len(x)
    return output


def _first_run(model: nn.Module, loan: Loan, x: Tensor) -> Any:
    """Runs the source model, and notes what that leaves behind in it."""
    taken, x = False, x.clone()  # the model may write to it
    with loan.lock, loan.traces.watched(loan.named_modules, x):
        try:
            with loan.traces.emptied(model) as taken:
                return source_output(loan, x)
        except Exception:
            if not taken:
                raise
        return source_output(loan, x)  # it cannot do without


def check_backward(loan: Loan, x: Tensor, *, read: Callable[[Any], Tensor] = read_logits) -> None:
    """Refuses a model that runs parts of itself again in a backward, when it is no longer on loan.

    Args:
        loan: of the model.
        x: a batch that it takes.
        read: finds the logits in what it returns.

    Raises:
        ScopeError: its forward checkpoints.
    """
    if not loan.own_functions:
        return
    refused = "no saved tensors hooks"
    try:
        refusing = torch.autograd.graph.disable_saved_tensors_hooks(refused)
        with torch.enable_grad(), without_hooks(), refusing:
            some = loan.some(x).detach().clone().requires_grad_()
            logits = read(source_output(loan, some * 1))  # which may be written to
    except Exception as error:
        if refused in str(error):
            raise no_checkpoints(loan.model) from None
        return  # it may not like such an input; its own are told by whoever runs it
    todo, seen = [logits.grad_fn], set[Any]()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(below for below, _ in node.next_functions)
            if node.name() == "CheckpointFunctionBackward":
                raise no_checkpoints(loan.model)


def no_checkpoints(model: nn.Module) -> ScopeError:
    """The error for a model that runs parts of itself again in a backward."""
    return ScopeError(
        f"{type(model).__name__} checkpoints: parts of it run again in the backward, when what "
        "adapts is no longer in its places. Turn that off, it answers the same: "
        "model.set_grad_checkpointing(False) of timm, model.gradient_checkpointing_disable() of "
        "transformers; or take a method without a backward: bn-adapt, lame."
    )


def check_statistics(loan: Loan, x: Tensor, order: Collection[str], statistics: Statistics) -> None:
    """Refuses a model that reads its layers' stored statistics itself, where others are to be used.

    Layers that did not run when the model did are looked at: it must do without what they store.

    Args:
        loan: of the model.
        x: a batch that it takes.
        order: names of the layers that ran.
        statistics: what layers are to normalise with.

    Raises:
        ScopeError: it cannot do without.
    """
    silent = [layer for layer in loan.norms if layer.name not in order]
    if isinstance(statistics, SourceStatistics) or not silent:
        return
    with loan.lock, torch.no_grad(), lending() as lent:
        try:
            for layer in silent:
                for key in ("running_mean", "running_var"):
                    lent.put(layer.module._buffers, key, None)
            loan.run(_ends(loan, x), {}, SourceStatistics(), ranks=Ranks())
        except Exception as error:
            names = ", ".join(layer.name for layer in silent[:3])
            raise ScopeError(
                f"{type(loan.model).__name__} reads the statistics that {names} stored itself, and "
                "does not call the layer, so that no others can take their place. Call it: "
                "layer(x); or leave statistics alone: tt.adapt(model, dataclasses.replace(recipe, "
                "statistics=SourceStatistics())), lame, source."
            ) from error


def answers_alone(loan: Loan, x: Tensor) -> bool | None:
    """Whether the source model answers a sample as if it came without its batch, as a look shows.

    Of two samples, the logits of each must have no gradient at all with respect to the other's input,
    and stay what they are when the other is changed, as a model may mix samples without a gradient.
    They must also be what they are when the sample comes alone, but for rounding. None where they are
    not finite, which shows nothing. A model that only takes batches of one size is not asked, as
    nothing is run apart.

    Args:
        loan: of the model.
        x: a batch.
    """
    if loan.size is not None:
        return False
    pair = torch.cat([x[:1], x[-1:]]).detach().requires_grad_()
    with torch.enable_grad():
        together = read_logits(source_output(loan, pair))
        if not together.isfinite().all():
            return None
        if not together.requires_grad or len(together) != 2:
            return False
        for mine in (0, 1):
            (slope,) = torch.autograd.grad(
                together[mine].sum(), pair, retain_graph=True, allow_unused=True
            )
            if slope is None or slope[1 - mine].any():
                return False
    pair = pair.detach()
    other = 1 - pair
    changed = pair, torch.stack([pair[0], other[1]]), torch.stack([other[0], pair[1]])
    try:
        with torch.no_grad():
            alone = read_logits(source_output(loan, x[:1]))[0]
            both, first, second = (read_logits(source_output(loan, some)) for some in changed)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it takes two and not one, as those do that squeeze a batch of one away
        return False
    # of one shape: no other rounding, but where content decides what is computed together
    steady = min(64 * torch.finfo(both.dtype).eps, ROUNDING)
    kept = _alike(first[0], both[0], steady) and _alike(second[1], both[1], steady)
    return kept and _alike(alone, both[0])


def answers_in_rows(loan: Loan, x: Tensor) -> bool:
    """Whether what the source model returns for a batch is what it returns for its parts, joined.

    Tensors must have a row for each sample, which is the same in a part but for rounding. All else,
    single numbers included, must be the same for every part. The parts are a sample and the rest.

    Args:
        loan: of a model that `answers_alone`.
        x: a batch.
    """
    x = x if len(x) > 1 else torch.cat([x, x])
    with torch.no_grad():
        first, rest, whole = (source_output(loan, some) for some in (x[:1], x[1:], x))
    if not joinable(first, rest, sizes=(1, len(x) - 1)):
        return False
    joined = leaves(
        map_tensors(lambda *each: torch.cat(each) if each[0].dim() else each[0], first, rest)
    )
    rest, whole = leaves(rest), leaves(whole)
    return joined.keys() == whole.keys() and all(
        _same(part, whole[place])
        and (not isinstance(part, Tensor) or bool(part.dim()) or _same(part, rest[place]))
        for place, part in joined.items()
    )


def _same(one: Any, other: Any) -> bool:
    """Whether leaves are the same, tensors with rows but for rounding."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return same_value(one, other)
    return _alike(one, other) if one.dim() else torch.equal(one, other)


def _alike(one: Tensor, other: Tensor, bound: float = ROUNDING) -> bool:
    """Whether tensors are the same but for rounding, as a share of their largest value."""
    if one.shape != other.shape or not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    return not one.numel() or bool((one - other).abs().max() <= bound * one.abs().max())


def answers_again(loan: Loan, x: Tensor) -> bool | None:
    """Whether the source model answers the same, bit for bit, when asked once more; or `same`'s None.

    Args:
        loan: of the model.
        x: a batch.
    """
    pair = _ends(loan, x)
    with torch.no_grad():
        first, second = (read_logits(source_output(loan, pair)) for _ in range(2))
    return same(first, second)


def _ends(loan: Loan, x: Tensor) -> Tensor:
    """The first and the last sample; all where the model could not take two."""
    return torch.cat([x[:1], x[-1:]]) if loan.size is None else x


def same(one: Tensor, other: Tensor) -> bool | None:
    """Whether two answers are the same to the last bit; None where NaN, which equals nothing, hides it.

    Example:
        >>> same(torch.ones(1), torch.ones(1)), same(torch.tensor([torch.nan]), torch.ones(1))
        (True, None)
    """
    return None if one.isnan().any() or other.isnan().any() else torch.equal(one, other)


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
