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
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from testtime.adaptation.lent import ABSENT, Lent, lending, refilled

TORCHS = frozenset(vars(nn.Module()))
"""Attributes that every module has: registered tensors, hooks, modes."""
HOOKS = tuple(sorted(key for key in TORCHS if "_hooks" in key))
"""Those of them that hold hooks."""
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
            else their module changes with them; and of hooks that a forward registers, and of all
            that it changes with these.
        inked: those of them whose tensors it writes to in place, as a count; a run gets copies.
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
        self.inked: set[tuple[str, str]] = set()
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
                key: _Was(value, held_by(value), _written_down(value))
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
        hooks = {
            (name, key): dict(vars(module)[key])
            for name, module in modules.items()
            for key in HOOKS
            if key in vars(module)
        }
        version = x._version
        try:
            yield
        finally:
            self._looking = False
            self.batch |= x._version != version
            hooked = False
            try:
                hooked = self._unhook(modules, hooks)
                self._take_back(modules, attributes, buffers, hooked)
            except BaseException:  # an interrupt that falls in there waits until all is taken back
                hooked |= self._unhook(modules, hooks)
                self._take_back(modules, attributes, buffers, hooked)
                raise
        self.kinds.add(_kind(x))

    def _unhook(
        self, modules: dict[str, nn.Module], hooks: dict[tuple[str, str], dict[Any, Any]]
    ) -> bool:
        """Takes back hooks that came or went; gives whether there were any."""
        hooked = False
        for (name, key), before in hooks.items():
            if refilled(vars(modules[name])[key], before):
                self.own.add((name, key))
                hooked = True
        return hooked

    def _take_back(
        self,
        modules: dict[str, nn.Module],
        attributes: dict[str, dict[str, "_Was"]],
        buffers: dict[str, dict[str, tuple[Tensor, int, Tensor] | None]],
        hooked: bool,
    ) -> None:
        changed: list[tuple[str, str, _Was, bool]] = []
        for name, module in modules.items():
            kept, holder = buffers.get(name, {}), module._buffers
            names = kept.keys() | holder.keys() if name in buffers else ()
            known = {key for key in names if (name, key) in self.buffers}
            written = [
                key
                for key in names
                if _written(holder, key, kept.get(key, ABSENT), copied=key in known)
            ]
            self.buffers.update((name, key) for key in written)
            hooked |= bool(written)
            changed += [(name, *each) for each in _changed(module.__dict__, attributes[name])]
        # with a tensor, or a hook, goes what says that it is there: a flag, or the size that it is for,
        # and it may be of the module above
        if hooked or any(tensors for *_, tensors in changed):
            for name, key, was, tensors in changed:
                holder = modules[name].__dict__
                if tensors or not callable(holder[key]):  # such are dear to make again
                    self.own.add((name, key))
                    was.put_back(holder, key)
                    if was.inked and (name, key) not in self.inked:
                        _rewrite(was.inked)
                        self.inked.add((name, key))

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
                if key in HOOKS:  # no copy, which who removes a hook would not know
                    lent.keep_all(holder[key])
                    continue
                value = lent.keep(holder, key)
                if value is ABSENT:
                    continue
                if (name, key) in self.caches:
                    holder[key] = type(value)()
                    continue
                kept_ones = {id(each): each for each in inside(value)}
                if (name, key) in self.inked:
                    kept_ones |= {id(each): each.clone() for each in _tensors(value)}
                holder[key] = copy.deepcopy(value, kept_ones)
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


class _Was(NamedTuple):
    """An attribute as it was, what its lists and dictionaries held, and what its tensors."""

    value: Any
    held: Sequence[tuple[Any, Any]] = ()
    tensors: Sequence[tuple[Tensor, int, Tensor]] = ()

    def put_back(self, holder: dict[str, Any], key: str) -> None:
        """Makes it, and what it held, that again."""
        _give_back(holder, key, self.value)
        for each, before in self.held:
            each.clear()
            each.update(before) if isinstance(each, dict | set) else each.extend(before)

    @property
    def inked(self) -> list[tuple[Tensor, Tensor]]:
        """Its tensors that were written to since, and what they held."""
        return [
            (each, values) for each, version, values in self.tensors if each._version != version
        ]


def _tensors(value: Any) -> list[Tensor]:
    """What a value holds of tensors that somebody may write to, but for parameters."""
    found = [each for each in inside(value) if isinstance(each, Tensor)]
    return [each for each in found if not (isinstance(each, nn.Parameter) or each.is_inference())]


def _written_down(value: Any) -> list[tuple[Tensor, int, Tensor]]:
    return [(each, each._version, each.detach().clone()) for each in _tensors(value)]


def _changed(now: dict[str, Any], before: dict[str, _Was]) -> Iterator[tuple[str, _Was, bool]]:
    """Attributes that changed: name, what it was; and whether tensors come, go or change."""
    for key in [each for each in now if each not in TORCHS]:
        value, was = now[key], before.get(key, _Was(ABSENT))
        same = value is was.value and all(_alike(each, kept) for each, kept in was.held)
        if not same or was.inked:
            gone = [each for _, kept in was.held for each in inside(kept)]
            met = (*inside(value), *inside(was.value), *gone)
            yield key, was, any(isinstance(each, Tensor) for each in met)


def _written(holder: dict[str, Any], key: str, kept: Any, *, copied: bool) -> bool:
    """Whether a buffer is no longer what it was; then it is that again.

    One that was copied for the run keeps its values: a graph may need them, and the copy goes.
    """
    now = holder.get(key, ABSENT)
    if not isinstance(kept, tuple):
        if now is not kept:
            _give_back(holder, key, kept)
        return now is not kept
    buffer, version, values = kept
    if now is buffer and buffer._version == version:
        return False
    holder[key] = buffer
    if not copied:
        _rewrite([(buffer, values)])
    return True


def _rewrite(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives tensors these values."""
    with torch.no_grad():
        for each, values in tensors:
            each.resize_(values.shape).copy_(values)


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
