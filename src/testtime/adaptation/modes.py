"""Modes of torch, which belong to a thread: those a step sets aside, and those it takes along."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch


@contextmanager
def computing() -> Iterator[None]:
    """No gradient but where the engine asks for one, whatever the caller's modes.

    Autocast's cache is off: within one long region of autocast it would keep a copy, and the graph,
    of every tensor that ever adapted.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    inside = torch.is_inference_mode_enabled()
    try:
        with torch.inference_mode(False) if inside else nullcontext(), torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def autocasting(device: torch.device) -> Callable[[], ExitStack]:
    """The caller's autocast, to be entered in another thread.

    Args:
        device: of the model.
    """
    found = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in {"cpu", device.type}
        if torch.amp.is_autocast_available(kind)
    ]

    def enter() -> ExitStack:
        with ExitStack() as entered:
            for kind, dtype, enabled in found:
                cast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                entered.enter_context(cast)
            return entered.pop_all()

    return enter
