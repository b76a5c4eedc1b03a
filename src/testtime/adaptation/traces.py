"""What a model writes to itself while it runs, and how it is kept from showing.

A weight under `torch.nn.utils.spectral_norm`, a bias that LeViT derives from a parameter and caches,
the flat weights of a recurrent layer, a buffer that counts: whatever a forward leaves behind is of
the tensors that it ran with. A model on loan is run with others than its own, so each run begins
with what the model held before the loan, without its caches, and leaves that behind.
"""

import copy
import operator
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

TORCHS = frozenset(vars(nn.Module()))
"""Attributes that every module has: registered tensors, hooks, modes."""
ABSENT = object()
"""Stands for what a dictionary did not hold, where None may be held."""
_known: "weakref.WeakKeyDictionary[nn.Module, Traces]" = weakref.WeakKeyDictionary()


def traces_of(model: nn.Module) -> "Traces":
    """What is known of a model's traces; the same for all that borrow it."""
    return _known.setdefault(model, Traces(model))


class Traces:
    """The places of a model that its forward writes to, as a look at it shows.

    Args:
        model: that was not run yet.

    Attributes:
        own: (module, attribute) of tensors, and of lists and dictionaries of tensors.
        caches: those of them that begin empty, since they are filled again.
        buffers: (module, buffer).
        asleep: modules that no look saw run, as an expert that few samples go to; they are watched.
        batch: whether it writes to the batch it is given, and so gets a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        flat = ("_flat_weights", "_flat_weight_refs")  # of what a recurrent layer last ran with
        self.own: set[tuple[str, str]] = {
            (name, key)
            for name, module in model.named_modules()
            if isinstance(module, nn.RNNBase)
            for key in flat
            if key in module.__dict__
        }
        self.caches: set[tuple[str, str]] = set()
        # observers of quantisation write now and then, and without a trace in their versions
        self.buffers: set[tuple[str, str]] = {
            (f"{name}.{below}".strip("."), key)
            for name, module in model.named_modules()
            if not {"observer_enabled", "min_val"}.isdisjoint(module._buffers)
            for below, part in module.named_modules()
            for key in part._buffers
        }
        self.asleep = {name for name, _ in model.named_modules()}
        self.kinds: set[Any] = set()
        self.batch = False
        self._looking = False  # a run of the loan within need not look as well

    @contextmanager
    def watched_once(
        self, modules: dict[str, nn.Module], x: Tensor, lent: Collection[str]
    ) -> Iterator[None]:
        """As `watched`, for the first forward of a kind of batch; then for modules that sleep alone."""
        if _kind(x) in self.kinds:
            modules = {name: modules[name] for name in self.asleep if name in modules}
        with self.watched(modules, x, lent) if modules and not self._looking else nullcontext():
            yield

    @contextmanager
    def watched(
        self, modules: dict[str, nn.Module], x: Tensor, lent: Collection[str] = ()
    ) -> Iterator[None]:
        """Notes what a forward within changes, and takes it back.

        Args:
            modules: of the model, by name.
            x: the batch.
            lent: modules whose buffers are others' now.
        """
        self._looking = True
        attributes = {
            name: {
                key: (value, copy.copy(value) if isinstance(value, dict | list) else value)
                for key, value in module.__dict__.items()
                if key not in TORCHS
            }
            for name, module in modules.items()
        }
        buffers = [
            (name, key, buffer, buffer._version, buffer.detach().clone())
            for name, module in modules.items()
            if name not in lent
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        version = x._version
        try:
            yield
            self.kinds.add(_kind(x))
        finally:
            self._looking = False
            self.batch |= x._version != version
            self._take_back(modules, attributes, buffers)

    def _take_back(
        self,
        modules: dict[str, nn.Module],
        attributes: dict[str, dict[str, tuple[Any, Any]]],
        buffers: list[tuple[str, str, Tensor, int, Tensor]],
    ) -> None:
        for name, module in modules.items():
            for key, value in list(module.__dict__.items()):
                if key in TORCHS:
                    continue
                old, held = attributes[name].get(key, (ABSENT, None))
                now, before = inside(value), inside(held)
                same = len(now) == len(before) and all(map(operator.is_, now, before))
                if value is old and same:
                    continue
                if any(isinstance(each, Tensor) for each in (*now, *before)):
                    self.own.add((name, key))
                    _put_back(module.__dict__, key, old, held)
        for name, key, buffer, version, values in buffers:
            holder = modules[name]._buffers
            if holder.get(key) is not buffer or buffer._version != version:
                self.buffers.add((name, key))
                holder[key] = buffer
                with torch.no_grad():
                    buffer.resize_(values.shape).copy_(values)

    @contextmanager
    def emptied(self, model: nn.Module) -> Iterator[bool]:
        """Takes dictionaries of tensors away while it lasts: those that fill again are caches.

        Gives whether there were any.
        """
        taken = {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
            if key not in TORCHS and isinstance(value, dict) and value
            if all(isinstance(each, Tensor) for each in value.values())
        }
        modules = dict(model.named_modules())
        for (name, key), value in taken.items():
            modules[name].__dict__[key] = type(value)()
        try:
            yield bool(taken)
            for (name, key), value in taken.items():
                now = modules[name].__dict__.get(key)
                if isinstance(now, dict) and now.keys() & value.keys():
                    self.own.add((name, key))
                    self.caches.add((name, key))
        finally:
            for (name, key), value in taken.items():
                modules[name].__dict__[key] = value

    @contextmanager
    def hidden(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Whatever a forward within writes is gone afterwards."""
        kept: list[tuple[dict[str, Any], str, Any]] = []
        for name, key in self.own:
            if name in modules:
                holder: dict[str, Any] = modules[name].__dict__
                value = holder.get(key, ABSENT)
                kept.append((holder, key, value))
                if value is ABSENT:
                    continue
                if (name, key) in self.caches:
                    holder[key] = type(value)()
                elif isinstance(value, dict | list):
                    holder[key] = copy.copy(value)
        for name, key in self.buffers:
            buffer = modules[name]._buffers.get(key) if name in modules else None
            if buffer is not None:
                kept.append((modules[name]._buffers, key, buffer))
                modules[name]._buffers[key] = buffer.clone()
        try:
            yield
        finally:
            for holder, key, value in kept:
                if value is ABSENT:
                    holder.pop(key, None)
                else:
                    holder[key] = value

    def forget(self, copied: nn.Module) -> None:
        """Empties the caches of a copy of the model, whose tensors are others."""
        modules = dict(copied.named_modules())
        for name, key in self.caches:
            modules[name].__dict__[key] = type(modules[name].__dict__[key])()


def _kind(x: Tensor) -> Any:
    return x.shape[1:], x.dtype, torch.is_grad_enabled()


def _put_back(holder: dict[str, Any], key: str, value: Any, held: Any) -> None:
    """An attribute as it was, and what it held if it is a list or dictionary."""
    if value is ABSENT:
        del holder[key]
        return
    holder[key] = value
    if isinstance(value, list):
        value[:] = held
    elif isinstance(value, dict):
        value.clear()
        value.update(held)


def inside(value: Any) -> list[Any]:
    """What a list, tuple or dictionary holds; any other value alone."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]
