"""What a model writes to itself while it runs, and how it is kept from showing.

A weight under `torch.nn.utils.spectral_norm`, a bias that LeViT derives from a parameter and caches,
the flat weights of a recurrent layer, a buffer that counts: whatever a forward leaves behind is of
the tensors that it ran with. A model on loan is run with others than its own, so each run begins
with what the model held before the loan, without its caches, and leaves that behind.
"""

import copy
import operator
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from testtime.adaptation.lent import ABSENT, Lent, lending

TORCHS = frozenset(vars(nn.Module()))
"""Attributes that every module has: registered tensors, hooks, modes."""
MUTABLE = list, dict, set, deque
_known: "weakref.WeakKeyDictionary[nn.Module, Traces]" = weakref.WeakKeyDictionary()


def traces_of(model: nn.Module) -> "Traces":
    """What is known of a model's traces; the same for all that borrow it."""
    return _known.setdefault(model, Traces(model))


class Traces:
    """The places of a model that its forward writes to, as a look at it shows.

    Args:
        model: that was not run yet.

    Attributes:
        own: (module, attribute) of tensors, of what holds tensors, as lists of tuples, and of whatever
            else their module changes with them.
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
                key: (value, held_by(value))
                for key, value in module.__dict__.items()
                if key not in TORCHS
            }
            for name, module in modules.items()
        }
        buffers = {
            name: {
                key: None if buffer is None else (buffer, buffer._version, buffer.detach().clone())
                for key, buffer in module._buffers.items()
            }
            for name, module in modules.items()
            if name not in lent
        }
        version = x._version
        try:
            yield
        finally:
            self._looking = False
            self.batch |= x._version != version
            try:
                self._take_back(modules, attributes, buffers)
            except BaseException:  # an interrupt that falls in there waits until all is taken back
                self._take_back(modules, attributes, buffers)
                raise
        self.kinds.add(_kind(x))

    def _take_back(
        self,
        modules: dict[str, nn.Module],
        attributes: dict[str, dict[str, tuple[Any, Any]]],
        buffers: dict[str, dict[str, tuple[Tensor, int, Tensor] | None]],
    ) -> None:
        for name, module in modules.items():
            kept, holder = buffers.get(name, {}), module._buffers
            names = kept.keys() | holder.keys() if name in buffers else ()
            written = [key for key in names if _written(holder, key, kept.get(key, ABSENT))]
            self.buffers.update((name, key) for key in written)
            changed = list(_changed(module.__dict__, attributes[name]))
            # with a tensor goes what says that it is there: a flag, or the size that it is for
            if written or any(tensors for *_, tensors in changed):
                for key, old, held, tensors in changed:
                    if tensors or not callable(module.__dict__[key]):  # such are dear to make again
                        self.own.add((name, key))
                        _put_back(module.__dict__, key, old, held)

    @contextmanager
    def emptied(self, model: nn.Module) -> Iterator[bool]:
        """Takes dictionaries of tensors away while it lasts: those that fill again are caches.

        Gives whether there were any.
        """
        modules = dict(model.named_modules())
        taken = {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
            if key not in TORCHS and isinstance(value, dict) and value
            if all(isinstance(each, Tensor) for each in value.values())
        }
        with lending() as lent:
            for (name, key), value in taken.items():
                lent.put(modules[name].__dict__, key, type(value)())
            yield bool(taken)
            for (name, key), value in taken.items():
                now = modules[name].__dict__.get(key)
                if isinstance(now, dict) and now.keys() & value.keys():
                    self.own.add((name, key))
                    self.caches.add((name, key))

    def hide(self, modules: dict[str, nn.Module], lent: Lent) -> None:
        """Whatever a forward writes from now on is gone once all is given back."""
        for name, key in self.own:
            if name in modules:
                holder: dict[str, Any] = modules[name].__dict__
                value = lent.keep(holder, key)
                if value is ABSENT:
                    continue
                if (name, key) in self.caches:
                    holder[key] = type(value)()
                elif not isinstance(value, Tensor):
                    holder[key] = copy.deepcopy(value, {id(each): each for each in inside(value)})
        for name, key in self.buffers:
            if name in modules:
                holder = modules[name]._buffers
                buffer = lent.keep(holder, key)
                if isinstance(buffer, Tensor):
                    holder[key] = buffer.clone()

    def forget(self, copied: nn.Module) -> None:
        """Empties the caches of a copy of the model, whose tensors are others."""
        modules = dict(copied.named_modules())
        for name, key in self.caches:
            modules[name].__dict__[key] = type(modules[name].__dict__[key])()


def _kind(x: Tensor) -> Any:
    return x.shape[1:], x.dtype, torch.is_grad_enabled()


def _changed(
    now: dict[str, Any], before: dict[str, tuple[Any, Any]]
) -> Iterator[tuple[str, Any, Any, bool]]:
    """Attributes that changed: name, what it was, what that held; and whether tensors come or go."""
    for key in [each for each in now if each not in TORCHS]:
        value, (old, held) = now[key], before.get(key, (ABSENT, []))
        if value is not old or not all(_alike(each, kept) for each, kept in held):
            gone = [each for _, kept in held for each in inside(kept)]
            yield (
                key,
                old,
                held,
                any(isinstance(each, Tensor) for each in (*inside(value), *inside(old), *gone)),
            )


def _put_back(holder: dict[str, Any], key: str, value: Any, held: list[tuple[Any, Any]]) -> None:
    """An attribute as it was, and whatever it holds."""
    _give_back(holder, key, value)
    for each, before in held:
        each.clear()
        each.update(before) if isinstance(each, dict | set) else each.extend(before)


def _written(holder: dict[str, Any], key: str, kept: Any) -> bool:
    """Whether a buffer is no longer what it was; then it is that again."""
    now = holder.get(key, ABSENT)
    if not isinstance(kept, tuple):
        if now is not kept:
            _give_back(holder, key, kept)
        return now is not kept
    buffer, version, values = kept
    if now is buffer and buffer._version == version:
        return False
    holder[key] = buffer
    with torch.no_grad():
        buffer.resize_(values.shape).copy_(values)
    return True


def _give_back(holder: dict[str, Any], key: str, value: Any) -> None:
    if value is ABSENT:
        holder.pop(key, None)
    else:
        holder[key] = value


def _alike(one: Any, other: Any) -> bool:
    """Whether two lists, or two dictionaries, hold the very same."""
    now, before = (list(each.values() if isinstance(each, dict) else each) for each in (one, other))
    return len(now) == len(before) and all(map(operator.is_, now, before))


def held_by(value: Any) -> list[tuple[Any, Any]]:
    """Lists, dictionaries, sets and queues within a value, itself included, each with a copy.

    Example:
        >>> held_by(([1, {"a": 2}], 3))
        [([1, {'a': 2}], [1, {'a': 2}]), ({'a': 2}, {'a': 2})]
    """
    return [(each, copy.copy(each)) for each in _walk(value) if isinstance(each, MUTABLE)]


def inside(value: Any) -> list[Any]:
    """What a value holds that holds nothing itself, however deep; of any other value itself.

    Example:
        >>> inside([1, (2, {"a": 3})])
        [1, 2, 3]
    """
    return [each for each in _walk(value) if not isinstance(each, (*MUTABLE, tuple))]


def _walk(value: Any) -> Iterator[Any]:
    todo, seen = [value], set[int]()
    while todo:
        each = todo.pop()
        if isinstance(each, (*MUTABLE, tuple)):
            if id(each) in seen:
                continue
            seen.add(id(each))
            todo.extend(reversed(list(each.values() if isinstance(each, dict) else each)))
        yield each
