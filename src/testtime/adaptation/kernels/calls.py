"""Looks at calls of torch's functions: one mode of torch for all who look.

With a mode for each, what one asks of a tensor would go through the others as a call of its own, and on
a GPU it is calls that take time.
"""

import threading
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import (
    BaseTorchFunctionMode,
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
)
from torch.utils._device import DeviceContext

Call = Callable[..., Any]


class Watching:
    """While it lasts, calls of `functions` in this thread go through `see`.

    Of several that last, the one entered last sees a call first; `go_on` brings it to the next. What is
    called inside of `see` is not seen.

    Attributes:
        functions: that are looked at.

    Example:
        >>> import torch
        >>> class Doubling(Watching):
        ...     functions = (torch.relu,)
        ...     def see(self, func, go_on, args, kwargs):
        ...         return 2 * go_on(*args, **kwargs)
        >>> with Doubling(), Doubling():
        ...     torch.relu(torch.tensor(3.0))
        tensor(12.)
    """

    functions: Collection[Any] = ()

    def see(self, func: Call, go_on: Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call of one of the functions gives; `go_on` of the same arguments is the call itself."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        mode = _here.mode
        if mode is None:
            mode = _Mode()
            mode.__enter__()
            _here.mode = mode
        mode.begin(self)
        return self

    def __exit__(self, *error: Any) -> None:
        mode = _here.mode
        assert mode is not None
        mode.end(self)
        if not mode.watchers:
            _here.mode = None
            mode.__exit__(*error)


class _Here(threading.local):
    mode: "_Mode | None" = None


_here = _Here()


def watching() -> "tuple[_Mode | None, list[Watching]]":
    """Who watches in this thread."""
    mode = _here.mode
    return mode, [] if mode is None else mode.watchers.copy()


def watching_again(before: "tuple[_Mode | None, list[Watching]]") -> None:
    """Nobody watches but who did: an interrupt may have fallen at the doors of those who began since.

    Example:
        >>> before = watching()
        >>> _ = Watching().__enter__()
        >>> watching_again(before)
        >>> watching() == before
        True
    """
    mode, watchers = before
    stack = _get_current_function_mode_stack()
    while stack and type(stack[-1]) is _Mode and stack[-1] is not mode:
        _pop_mode()
        stack = _get_current_function_mode_stack()
    _here.mode = mode
    if mode is not None:
        mode.watchers, mode.functions = watchers.copy(), _functions_of(watchers)


class _Mode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.watchers: list[Watching] = []
        self.functions: frozenset[Any] = frozenset()

    def begin(self, watcher: Watching) -> None:
        self.watchers.append(watcher)
        self.functions = self.functions.union(watcher.functions)

    def end(self, watcher: Watching) -> None:
        self.watchers.remove(watcher)
        self.functions = _functions_of(self.watchers)

    def __torch_function__(self, func: Call, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # a function of others, who would trace what stands below
            return func(*args, **kwargs or {})
        _here.mode = None  # torch has put this mode aside meanwhile: others need their own
        try:
            if func not in self.functions:
                return func(*args, **kwargs or {})
            return self._through(len(self.watchers), func, *args, **kwargs or {})
        finally:
            _here.mode = self

    def _through(self, place: int, func: Call, /, *args: Any, **kwargs: Any) -> Any:
        while place:
            place -= 1
            watcher = self.watchers[place]
            if func in watcher.functions:
                return watcher.see(func, partial(self._through, place, func), args, kwargs)
        return func(*args, **kwargs)


def _functions_of(watchers: Iterable[Watching]) -> frozenset[Any]:
    return frozenset().union(*(each.functions for each in watchers))


def transformed(*given: Tensor | None) -> bool:
    """Whether torch differentiates forwards or transforms a function, as none of these kernels can be."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:  # nobody does: asking each tensor takes longer
        return False
    tensors = (each for each in given if each is not None)
    return any(forward_ad.unpack_dual(each).tangent is not None for each in tensors)


def of_others(x: Tensor) -> bool:
    """Whether a mode or a tensor that is not ours may look for a call of torch's function.

    It would not find it where one of ours stands in.

    Args:
        x: what the function is given.

    Example:
        >>> class Other(TorchFunctionMode):
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         return func(*args, **kwargs or {})
        >>> with Watching():
        ...     of_others(torch.ones(1))
        False
        >>> with Other():
        ...     of_others(torch.ones(1))
        True
    """
    plain = type(x) in (Tensor, torch.nn.Parameter)
    return not plain or any(type(mode) not in BLIND for mode in _get_current_function_mode_stack())


BLIND = {_Mode, BaseTorchFunctionMode, DeviceContext}
"""Modes that look for nothing but what stands here, or for what makes a tensor."""
