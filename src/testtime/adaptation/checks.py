"""Bad input is refused before anything changes."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from testtime._core.arrays import as_given
from testtime._core.errors import (
    InputError,
    OptionError,
    ScopeError,
    TesttimeError,
    TesttimeWarning,
)
from testtime.adaptation.monitors import is_aside
from testtime.adaptation.parts.prediction import student
from testtime.adaptation.parts.views import needs_pixels
from testtime.adaptation.recipe import Recipe

RANKS = (
    (nn.Conv1d, 3, "(batch, channels, length)"),
    (nn.Conv2d, 4, "(batch, channels, height, width)"),
    (nn.Conv3d, 5, "(batch, channels, depth, height, width)"),
)
AROUND = (
    "Where the model takes other than one tensor, put a module around it that takes one and gives "
    "the model what it takes."
)


def expected_rank(model: nn.Module) -> tuple[int, str] | None:
    """The rank of a model's input, told by its first convolution; None when it has none.

    A guess: a model of sounds may take (batch, length).
    """
    for module in model.modules():
        for kind, rank, shape in RANKS:
            if isinstance(module, kind):
                return rank, shape
    return None


def check_model(model: Any) -> None:
    """Refuses what is no module, or one through which nothing can be learnt."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise OptionError(
            f"the model is {given}; expected an instance of nn.Module that maps inputs to logits. "
            "The model comes first: tt.adapt(model, 'tent')."
        )
    none = getattr(model.forward, "__func__", None) is nn.Module.forward
    if none and type(model).__call__ is nn.Module.__call__:
        raise ScopeError(
            f"the model is of type {type(model).__name__}, which holds parts and has no forward; "
            "expected a module that maps inputs to logits. Put one around it that says how it runs."
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ScopeError(
                f"{f'the part {name} of ' if name else ''}the model is scripted, and cannot be "
                "lent; build it of the nn.Module that was scripted or traced"
            )
        wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
        if wrapped and torch.distributed.get_world_size(module.process_group) > 1:
            raise ScopeError(
                "a model in DistributedDataParallel meets the other ranks in each forward, and "
                "adapters need not run it equally often. Give what it holds: "
                "tt.adapt(model.module, ...), with process_group= for ranks that adapt together."
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ScopeError(
                f"{name} has no shape yet; run the model on a batch before adapting it"
            )
        if tensor.is_meta:
            raise ScopeError(f"{name} has no values (device meta); load the model's weights first")
        if tensor.is_inference():
            raise ScopeError(
                "the model was built under torch.inference_mode(), so nothing can learn through "
                "it. Build or load it outside."
            )


def check_input(x: Tensor, recipe: Recipe, *, rank: int | None, device: torch.device) -> None:
    """Raises an `InputError` unless x is a batch that the model and the method can take.

    Args:
        x: the batch.
        recipe: the method.
        rank: of the batches that the model was seen to take; None when it was not seen yet.
        device: of the model.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"a batch is a tensor; given {type(x).__name__}. {_way_to_tensor(x)}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"of layout {x.layout}"
        raise InputError(f"the batch is {kind}; expected a dense tensor. Use x.to_dense(), or pad.")
    if not x.is_floating_point():
        raise InputError(
            f"the batch is of type {x.dtype}; expected floating point. For images of integers use "
            "x.float() / 255, and the normalisation that the model was trained with; for numbers of "
            "tokens adapt the part of the model after their embedding."
        )
    if x.dim() < 2 or (rank and x.dim() != rank):
        takes = f"takes batches of {rank} dimensions" if rank else "takes (batch, features, ...)"
        raise InputError(
            f"the batch has shape {tuple(x.shape)}; the model {takes}. For a single sample "
            "use x[None]."
        )
    if x.numel() == 0:
        raise InputError(f"the batch is empty: its shape is {tuple(x.shape)}. Skip such batches.")
    if x.device != device:
        raise InputError(f"the batch is on {x.device} and the model on {device}. Use x.to(...).")
    parts = (recipe.views, recipe.procedure, recipe.objective)
    own = recipe.augment is not None and needs_pixels(recipe.augment)
    pixels = own or any(getattr(part, "pixels", False) for part in parts)
    # one sum is cheaper than a test of each value; only a suspicious sum is looked into
    told = (torch.stack(torch.aminmax(x)) if pixels else x.sum()[None]).tolist()
    if not all(map(math.isfinite, told)) and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise InputError(
            f"{bad} of {len(x)} samples hold NaN or infinite values. Drop or mend them."
        )
    if pixels:
        low, high = told
        if x.dim() != 4:
            raise InputError(
                f"this method makes changed copies of images (batch, channels, height, width); given "
                f"{tuple(x.shape)}. Give augment= a function of your own, where the method has that "
                "option, or take a method without copies: tent, eta, sar, lame."
            )
        if low < -1e-3 or high > 1 + 1e-3:
            raise InputError(
                f"this method makes changed copies of images, so it needs images "
                f"(batch, channels, height, width) in [0, 1]; given {tuple(x.shape)} in "
                f"[{low:.3g}, {high:.3g}]. Put the normalisation inside the model: "
                "nn.Sequential(Normalize(mean, std), model)."
            )


def _way_to_tensor(given: Any) -> str:
    if isinstance(given, tuple | list) and given and isinstance(given[0], Tensor):
        return f"Of what a loader gives, (inputs, labels), pass the inputs alone. {AROUND}"
    if hasattr(given, "__array__"):
        return "Of an array make one: torch.as_tensor(x)."
    if isinstance(given, Iterator | DataLoader):
        return "Give the batches one by one: for x in batches: adapter(x)."
    return AROUND


def check_held(x: Tensor, recipe: Recipe, memory: Any) -> None:
    """Refuses samples that could not be joined with those that a method remembers.

    Args:
        x: the batch.
        recipe: the method, whose procedure gives what it remembers as `held(memory)`.
        memory: state of the memory.
    """
    held = getattr(recipe.procedure, "held", None)
    known: Tensor | None = held(memory) if held and memory else None
    if known is None or not len(known):
        return
    if known.dtype != x.dtype:
        raise InputError(
            f"this method learns from samples that it remembers, of type {known.dtype}; given "
            f"{x.dtype}. Give all in one type, or call reset() before the first of another."
        )
    if known.shape[1:] == x.shape[1:]:
        return
    if x.dim() == 2 or known.shape[1] == x.shape[1]:  # of other channels the model will complain
        raise InputError(
            f"this method learns from samples that it remembers, of shape {tuple(known.shape[1:])}; "
            f"given {tuple(x.shape[1:])}. Resize all to one size, or call reset() before the first "
            "of another."
        )


def check_output(logits: Tensor, recipe: Recipe, *, samples: int) -> None:
    """Raises an `InputError` unless the method can work with such logits.

    Args:
        logits: of the model.
        recipe: the method.
        samples: that the model answered.
    """
    if len(logits) != samples:
        raise InputError(
            f"the model answered {samples} samples with {len(logits)} predictions; expected "
            "one prediction for each sample, along the first dimension."
        )
    corrects = recipe.prediction is not student or recipe.procedure is not None
    if logits.shape[1] < 2 and (recipe.learns or corrects):
        raise InputError(
            "the model returns one number for each sample, whose softmax is always 1. For a "
            "binary classifier z return two logits: torch.cat([torch.zeros_like(z), z], 1)."
        )
    if logits.dim() > 2 and not recipe.dense:
        raise InputError(
            f"the model returns dense logits {tuple(logits.shape)}; this method needs one "
            "prediction for each sample. Use tent, eta, eata, sar, ostta, cotta or bn-adapt."
        )
    sums = logits.detach().double().sum(1)
    if logits.shape[1] > 1 and bool((logits >= 0).all() & ((sums - 1).abs() < 1e-3).all()):
        warnings.warn(
            "the model seems to return probabilities: its numbers are not negative and sum to one. "
            "Methods take them for logits, whose softmax is nearly even then. Leave the last softmax "
            "out, or return its logarithm.",
            TesttimeWarning,
            stacklevel=2,
        )


NO_GRADIENT = (
    "modified by an inplace operation", "being modified inplace", "derivative for",
    "backward or vjp",
)  # fmt: skip
"""What torch says where it has no gradient through a forward."""
ONE_VALUE = "more than 1 value per channel"
"""What it says where batch normalisation is to take statistics of one value."""


def taking(model: nn.Module, x: Tensor, run: Callable[[], Any], *, met: bool = False) -> Any:
    """Runs a model on a batch; what it says of one of a kind that it has not met is an `InputError`.

    Args:
        model: that is run.
        x: the batch.
        run: runs it.
        met: whether it answered a batch of this kind before.

    Raises:
        ScopeError: its forward cannot be differentiated.
        InputError: it does not take the batch.
    """
    try:
        return run()
    except (TesttimeError, TesttimeWarning, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if any(text in str(error) for text in NO_GRADIENT):
            raise ScopeError(
                f"nothing can be learnt through {type(model).__name__}, whose forward is written for "
                f"inference alone: {str(error).partition('. ')[0]}. Let it make new tensors (h = 2 * h "
                "for h *= 2), of functions that have a gradient; or take a "
                "method that learns nothing: bn-adapt, lame, source."
            ) from error
        if ONE_VALUE in str(error):
            raise InputError(
                f"a batch of shape {tuple(x.shape)} left a normalisation layer of "
                f"{type(model).__name__} a single value for each channel, which has no statistics. "
                "Send other or larger batches, or take statistics mixed with the source's: bn-adapt "
                "with prior=16, rotta."
            ) from error
        if met or is_aside(error):
            raise
        said = f"{error}" if isinstance(error, RuntimeError | ValueError) else repr(error)
        expected = expected_rank(model)
        hint = f". {AROUND}" if isinstance(error, TypeError | KeyError) else ""
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if len(kinds) == 1 and x.dtype not in kinds and isinstance(error, RuntimeError):
            hint = (
                f". The weights are of type {kinds.pop()}; give the batch in that type: x.to(...)"
            )
        if expected and expected[0] != x.dim():
            hint = f". Its first convolution takes {expected[1]}; for a single sample use x[None]"
        raise InputError(
            f"the model could not take a batch of shape {tuple(x.shape)} and type {x.dtype}: "
            f"{said}{hint}"
        ) from error


def read_labels(given: Any, *, shape: tuple[int, ...], classes: int, who: str) -> Tensor:
    """The classes that somebody gave, as a tensor, list or array of that shape.

    Raises:
        InputError: they are no whole numbers from 0 to classes - 1, one for each sample, or pixel.
    """
    said = f"{given!r:.200}"
    try:
        labels = as_given(given)
    except Exception:  # whatever else it is
        labels = torch.zeros(0, device="cpu")
    else:
        said = f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
    fits = labels.shape == shape and not (labels.is_floating_point() or labels.is_complex())
    if fits:
        labels = labels.long()
        said += f", from {int(labels.min())} to {int(labels.max())}"
        fits = labels.min() >= 0 and labels.max() < classes
    if not fits:
        what = f"each of {shape[0]} samples" if len(shape) == 1 else f"each pixel of {shape}"
        raise InputError(
            f"{who} gave {said}; expected the class of {what} as a whole number "
            f"from 0 to {classes - 1}, in their order."
        )
    return labels
