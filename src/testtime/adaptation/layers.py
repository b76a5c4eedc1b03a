"""What a model is made of, found by structure and order of execution, never by name."""

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

Kind = Literal["batch", "instance", "group", "layer"]
NORMS: tuple[tuple[type, Kind], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "layer"),
)


@dataclass(frozen=True)
class NormLayer:
    """A normalisation layer: where it is, what it normalises over, and its scale and shift."""

    name: str
    module: nn.Module
    kind: Kind
    tensors: tuple[str, ...]

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return _eps(self.module) or 0.0

    @property
    def has_statistics(self) -> bool:
        """Whether it normalises with statistics stored in training."""
        return self.kind == "batch" and self.module._buffers.get("running_mean") is not None


def _eps(module: nn.Module) -> float | None:
    for name in ("eps", "epsilon", "variance_epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _owned(module: nn.Module) -> dict[str, nn.Parameter]:
    """A layer's own parameters; of one that a parametrisation makes, those that it is made of."""
    owned = dict(module.named_parameters(recurse=False))
    for key, made in _made(module).items():
        originals = made.named_parameters(recurse=False)
        owned |= {f"parametrizations.{key}.{name}": value for name, value in originals}
    return owned


def _made(module: nn.Module) -> dict[str, nn.Module]:
    """What torch's parametrisations make of other tensors, by name."""
    found = module.parametrizations if is_parametrized(module) else None
    return dict(found.items()) if isinstance(found, nn.ModuleDict) else {}


def called(name: str) -> str:
    """What a layer calls a tensor, or what a parametrisation makes of it.

    Example:
        >>> called("0.bias"), called("0.parametrizations.weight.original1")
        ('bias', 'weight')
    """
    *_, above, key, last = ("", "", *name.split("."))
    return key if above == "parametrizations" and last.startswith("original") else last


def _affine(module: nn.Module) -> list[str]:
    """Names of a layer's own scale and shift; a frozen layer keeps them among its buffers."""
    held = [key for key, value in module.named_buffers(recurse=False) if key in ("weight", "bias")]
    for key, made in _made(module).items():
        originals = made.named_buffers(recurse=False)
        held += [f"parametrizations.{key}.{name}" for name, _ in originals]
    return [*_owned(module), *held]


def norm_kind(module: nn.Module) -> Kind | None:
    """The kind of a normalisation layer, or None when the module is something else.

    Layers of torch and their subclasses are known by type. A layer of anybody else's is known by
    structure: it adds an epsilon, and all that it owns are scales and shifts of one dimension, one
    for each channel (and, for batch normalisation, running statistics). What is at rest when these
    are zero, as global response normalisation in ConvNeXt V2, adds to its input and is none.

    Example:
        >>> norm_kind(nn.SyncBatchNorm(3)), norm_kind(nn.Linear(2, 2))
        ('batch', None)
    """
    for known, kind in NORMS:
        if isinstance(module, known):
            return kind
    owned = _owned(module)
    buffers = dict(module.named_buffers(recurse=False))
    if _eps(module) is None or not _affine(module):
        return None
    if any(value.dim() != 1 or len(value) < 2 for value in owned.values()):  # one: an exponent
        return None
    below = {name for name, _ in module.named_parameters()} - owned.keys()
    if any(not name.startswith("parametrizations.") for name in below):
        return None
    if owned and rests_at_zero(module):
        return None
    return "batch" if {"running_mean", "running_var"} <= buffers.keys() else "layer"


_at_rest: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


def rests_at_zero(module: nn.Module) -> bool:
    """Whether a layer whose parameters are zero gives what it is given; a copy of it is tried, once.

    Example:
        >>> rests_at_zero(nn.LayerNorm(2)), rests_at_zero(nn.PReLU(2))
        (False, False)
    """
    if module not in _at_rest:
        _at_rest[module] = _try_at_rest(module)
    return _at_rest[module]


def _try_at_rest(module: nn.Module) -> bool:
    try:
        tried = copy.deepcopy(module)
    except Exception:
        return False
    with torch.no_grad():
        for parameter in tried.parameters():
            parameter.zero_()
        channels = next(tried.parameters())
        for shape in ((2, 3, 3, len(channels)), (2, len(channels), 3, 3), (2, 3, len(channels))):
            x = torch.arange(math.prod(shape), device="cpu").view(shape).sin().to(channels)
            try:
                y = tried.forward(x.clone())
            except Exception:  # of other dimensions
                continue
            if isinstance(y, Tensor) and torch.equal(y, x):
                return True
    return False


def norm_layers(model: nn.Module, order: Sequence[str] = ()) -> list[NormLayer]:
    """All normalisation layers, in order of execution when `order` gives it, else as registered."""
    found = [
        NormLayer(name, module, kind, tuple(f"{name}.{key}".lstrip(".") for key in _affine(module)))
        for name, module in model.named_modules()
        if (kind := norm_kind(module)) is not None
    ]
    place = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda layer: place.get(layer.name, len(place)))


class Hook:
    """A hook of a layer, known before it is registered, so that an interrupt cannot leave it there.

    Args:
        module: the layer.
        see: the hook, as torch takes it.
        after: whether it sees the output.
        named: whether it takes arguments by name.
        prepend: before the hooks that are there.

    Example:
        >>> layer = nn.ReLU()
        >>> hook = Hook(layer, lambda *_: None)
        >>> hook.register()
        >>> len(layer._forward_pre_hooks)
        1
        >>> hook.remove()
        >>> len(layer._forward_pre_hooks)
        0
    """

    def __init__(
        self,
        module: nn.Module,
        see: Callable[..., Any],
        *,
        after: bool = False,
        named: bool = False,
        prepend: bool = False,
    ) -> None:
        self.module, self.see = module, see
        self.after, self.named, self.prepend = after, named, prepend

    def register(self) -> None:
        """From now on the layer calls it."""
        name = "register_forward_hook" if self.after else "register_forward_pre_hook"
        getattr(self.module, name)(self.see, with_kwargs=self.named, prepend=self.prepend)

    def remove(self) -> None:
        """The layer calls it no more, if it did."""
        kind = "_forward_hooks" if self.after else "_forward_pre_hooks"
        hooks = getattr(self.module, kind)
        for number in [number for number, hook in hooks.items() if hook is self.see]:
            getattr(self.module, f"{kind}_with_kwargs").pop(number, None)
            hooks.pop(number, None)


def on_input(
    module: nn.Module, see: Callable[[nn.Module, tuple[Any, ...]], Any], *, prepend: bool = False
) -> Hook:
    """A hook that sees what enters a layer, whether it is called layer(x) or layer(input=x).

    Args:
        module: the layer.
        see: called with it and (input, ...) before each forward; a tuple that it gives goes in.
        prepend: before the hooks that are there.

    Example:
        >>> layer, seen = nn.ReLU(), []
        >>> on_input(layer, lambda _, args: seen.append(args[0])).register()
        >>> _ = layer(torch.ones(1)), layer(input=torch.zeros(1))
        >>> seen
        [tensor([1.]), tensor([0.])]
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = named_input(args, kwargs)
        said = see(module, args if name is None else (kwargs[name],))
        if said is None:
            return None
        return (said, kwargs) if name is None else (args, {**kwargs, name: said[0]})

    return Hook(module, hook, named=True, prepend=prepend)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: the device of its first parameter, or buffer; the CPU where it has none.

    Example:
        >>> device_of(nn.Linear(2, 2)), device_of(nn.ReLU())
        (device(type='cpu'), device(type='cpu'))
    """
    held = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if held is None else held.device


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """While it lasts, the hooks are registered; then they are gone, also after an error.

    Args:
        hooks: that nobody has registered.

    Example:
        >>> layer = nn.ReLU()
        >>> with hooked(on_input(each, lambda _, args: None) for each in [layer]):
        ...     len(layer._forward_pre_hooks)
        1
        >>> len(layer._forward_pre_hooks)
        0
    """
    held = list(hooks)
    try:
        for hook in held:
            hook.register()
        yield
    finally:
        try:
            for hook in held:
                hook.remove()
        except BaseException:  # an interrupt that falls in there waits until all are gone
            for hook in held:
                hook.remove()
            raise


def named_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The name by which a call gives its input; None where it comes first and without one.

    Example:
        >>> named_input((1,), {}), named_input((), {"scale": 2, "hidden": torch.ones(1)})
        (None, 'hidden')
    """
    if args:
        return None
    return next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)


def bound(model: nn.Module) -> set[nn.Module]:
    """Layers that cannot do without the statistics they stored.

    The module above them reads these, as torch's fusions for quantisation do, or a forward of their
    own; or they add nothing to the variance, which torch refuses without stored statistics.
    """
    fused = [module for module in model.modules() if hasattr(module, "freeze_bn")]
    above = {child for module in fused for child in module.children()}
    stored = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    return above | {module for module in stored if not (module.eps and _does_without(module))}


_tried: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


def _does_without(module: _BatchNorm) -> bool:
    """Whether a layer that stores no statistics takes its batch's; a forward of others' is tried."""
    replaced = "forward" in vars(module)
    kind: Any = module if replaced else type(module)
    if not replaced and kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return True
    if kind not in _tried:
        _tried[kind] = _try(module)
    return _tried[kind]


def _try(module: _BatchNorm) -> bool:
    places = {nn.BatchNorm1d: (), nn.BatchNorm2d: (2, 2), nn.BatchNorm3d: (2, 2, 2)}
    sides = next((places[kind] for kind in places if isinstance(module, kind)), None)
    mean, buffers, training = module.running_mean, module._buffers, module.training
    if sides is None or mean is None:
        return False
    kept = dict(buffers)

    def give_back() -> None:
        module.training = training
        buffers.update(kept)

    try:
        module.training = False
        buffers["running_mean"] = buffers["running_var"] = None
        with torch.no_grad():
            module.forward(mean.new_zeros(2, len(mean), *sides))
    except Exception:
        return False
    finally:
        try:
            give_back()
        except BaseException:  # an interrupt that falls in there waits until all is given back
            give_back()
            raise
    return True


def top_of(names: Sequence[str]) -> set[str]:
    """The layers of a network's top: the last quarter of its blocks, and all that runs after them.

    Blocks are the children of the first module that has at least four children with two or more
    normalisation layers each: the four stages of a ResNet (top: the last stage), the twelve blocks
    of a ViT-B (top: the last three, and the final normalisation). A network with fewer than four
    blocks has no top.

    Example:
        >>> names = ["bn1", *[f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]]
        >>> sorted(top_of(names))
        ['layer4.0', 'layer4.1']
    """
    prefix, inside = "", list(names)
    while True:
        groups: dict[str, list[str]] = {}
        for name in inside:
            groups.setdefault(name.removeprefix(prefix).partition(".")[0], []).append(name)
        blocks = [child for child, members in groups.items() if len(members) > 1]
        if len(blocks) >= 4:
            first = groups[blocks[-(len(blocks) // 4)]][0]
            return set(names[list(names).index(first) :])
        if len(blocks) != 1:
            return set()
        prefix += f"{blocks[0]}."
        inside = groups[blocks[0]]
