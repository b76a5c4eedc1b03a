"""Streams of work for the second device of `elsewhere`, which tell of what real ones would get wrong.

Nothing runs late here: who reads or writes what another stream may not have done yet is told by what
each stream has waited for, and so is memory that is used anew while another stream may still read it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import elsewhere
from elsewhere import DEVICE, There


class Stream:
    """Work in order; `seen` is what of other streams' work is done before what comes next here."""

    def __init__(self, device: Any = DEVICE) -> None:
        self.device, self.stream_id = DEVICE, id(self)
        self.done, self.seen = 0, dict[Stream, int]()
        self.freed: list[dict[Stream, int]] = []  # uses of memory that may be used anew

    def record_event(self) -> dict["Stream", int]:
        return {**self.seen, self: self.done}

    def wait_event(self, event: dict["Stream", int]) -> None:
        for stream, done in event.items():
            self.seen[stream] = max(self.seen.get(stream, 0), done)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def late(self, uses: dict["Stream", int]) -> bool:
        """Whether one of these uses in other streams may not be over."""
        return any(s is not self and self.seen.get(s, 0) < done for s, done in uses.items())


class Memory:
    """Who made, read and wrote what lies in one place."""

    def __init__(self, made: Stream) -> None:
        self.made, self.marked = made, {made}
        self.reads: dict[Stream, int] = {}
        self.writes: dict[Stream, int] = {}

    def used(self, stream: Stream, *, writes: bool) -> bool:
        """Notes a use, and says whether it comes too early."""
        early = stream.late({**self.reads, **self.writes} if writes else self.writes)
        (self.writes if writes else self.reads)[stream] = stream.done
        return early

    def __del__(self) -> None:
        uses = {**self.reads, **self.writes}
        self.made.freed.append({s: done for s, done in uses.items() if s not in self.marked})


class Lanes:
    """The module of streams, and the faults that were found."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._default, self._here = Stream(), threading.local()
        self._host: dict[Stream, int] = {}
        self._held: WeakValueDictionary[int, Memory] = WeakValueDictionary()
        self.module = SimpleNamespace(
            Stream=Stream, stream=self.stream, current_stream=self.current, default_generators=()
        )

    def current(self, device: Any = None) -> Stream:
        return getattr(self._here, "stream", self._default)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._here.stream = self.current(), stream
        played = threading.current_thread() is threading.main_thread()
        with nullcontext() if played else elsewhere._Mode():  # modes of torch belong to a thread
            yield
        self._here.stream = before

    def memory(self, tensor: There) -> Memory:
        place = tensor.held.untyped_storage()._cdata
        stream = self.current()
        found = self._held.get(place)
        if found is None:
            if any(map(stream.late, stream.freed)):
                self.faults.append("memory is used anew that another stream may still use")
            stream.freed.clear()
            found = self._held[place] = Memory(stream)
        tensor.memory = found  # lives as long as a tensor that lies there
        return found

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        stream = self.current()
        stream.wait_event(self._host)
        stream.done += 1
        out = self._run(func, args, kwargs)
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        for argument in func._schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for value in tree_leaves(named.get(argument.name)):
                mine = isinstance(value, There) and not views
                if mine and self.memory(value).used(stream, writes=writes):
                    self.faults.append(f"{func} comes before what it needs is there")
        for value in tree_leaves(out):
            if isinstance(value, There) and not self.memory(value).writes:
                value.memory.used(stream, writes=True)
        given, taken = ([isinstance(v, There) for v in tree_leaves(t)] for t in (named, out))
        if any(given) and not any(taken) and out is not None:  # the host has waited for it
            self._host = stream.record_event()
        return out


@contextmanager
def lanes(monkeypatch: Any) -> Iterator[Lanes]:
    """While it lasts, the second device has streams. Faults are told by what it gives."""
    with monkeypatch.context() as patch:
        told = Lanes()
        told._run = elsewhere._run
        patch.setattr(elsewhere, "_run", told.run)
        patch.setattr(torch, DEVICE.type, told.module, raising=False)
        patch.setattr(There, "record_stream", _mark)
        yield told


def _mark(tensor: Tensor, stream: Stream) -> None:
    tensor.memory.marked.add(stream)
