"""Modes of torch, which belong to a thread: those a step sets aside, and those it takes along."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from testtime._core.errors import ScopeError


@contextmanager
def computing() -> Iterator[None]:
    """No gradient but where the engine asks for one, whatever the caller's modes.

    Autocast's cache is off: within one long region of autocast it would keep a copy, and the graph,
    of every tensor that ever adapted.
    """
    cached = torch.is_autocast_cache_enabled()
    inside = torch.is_inference_mode_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        with torch.inference_mode(False) if inside else nullcontext(), torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


@contextmanager
def without_hooks() -> Iterator[None]:
    """While it lasts, what a backward keeps goes through no hooks of the caller's, as `save_on_cpu` has."""
    inside: Any = torch._C
    hooks, taken = inside._autograd, []
    while (top := hooks._top_saved_tensors_default_hooks(True)) is not None:
        taken.append(top)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(taken):
            hooks._push_saved_tensors_default_hooks(pack, unpack)


@contextmanager
def learnable() -> Iterator[None]:
    """While it lasts, torch's complaint of a part of a model that forbids to learn is the library's."""
    try:
        yield
    except RuntimeError as error:
        if "nference tensor" not in str(error):
            raise
        raise ScopeError(
            "a part of the model runs under torch.inference_mode(), and something that learns takes "
            "what it gives, which torch keeps for no backward. Put torch.no_grad() in its place or "
            "clone what it gives outside of it, it answers the same; or take a method that learns "
            "nothing: bn-adapt, lame."
        ) from error


def taken_along(device: torch.device) -> Callable[[], ExitStack]:
    """The caller's autocast and default device, to be entered in another thread.

    Args:
        device: of the model.
    """
    found = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in {"cpu", device.type}
        if torch.amp.is_autocast_available(kind)
    ]
    # none but the caller's: who has no default device should not pay for a mode at each call of torch
    modes = _get_current_function_mode_stack()
    places = [mode.device for mode in modes if isinstance(mode, DeviceContext)][-1:]

    def enter() -> ExitStack:
        with ExitStack() as entered:
            for place in places:
                entered.enter_context(torch.device(place))
            for kind, dtype, enabled in found:
                cast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                entered.enter_context(cast)
            return entered.pop_all()

    return enter
