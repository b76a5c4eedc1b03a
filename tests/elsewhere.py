"""A second device, played on this one: tensors that say they are elsewhere and hold their values.

An operation on tensors of both devices fails as it would on real ones, and so does a random number
generator of the wrong device, or a state of one; everything else gives the numbers of the CPU. Where
the host would have to wait for a real device, that is noted in `WAITS`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy", 0)  # any type whose backward runs on the caller's thread

BETWEEN = ("aten._to_copy.default", "aten.copy_.default")
"""What brings values from one device to the other."""

WAITS: list[str] = []
"""Operations that made the host wait."""

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
          "unique_consecutive", "bincount")  # fmt: skip
"""Operations whose result the host must know, if only its size."""

_Generator = torch.Generator
_places: dict[int, torch.device] = {}
"""Address of a generator -> its device; torch hands on generators under a new object."""


class There(Tensor):
    """A tensor that is elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    def tolist(self) -> Any:
        WAITS.append("tolist")
        return self.held.detach().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        WAITS.append("new_tensor")
        return There(self.held.new_tensor(data, **options))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _PlacedGenerator(_Generator):
    def __new__(cls, device: Any = "cpu") -> "_PlacedGenerator":
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        _places[self._cdata] = torch.device(device)

    @property
    def device(self) -> torch.device:
        return _places[self._cdata]

    def get_state(self) -> Tensor:  # kinds of devices keep states of different sizes
        state = super().get_state()
        return state if self.device.type == "cpu" else F.pad(state, (0, 1))

    def set_state(self, state: Tensor) -> None:
        if len(state) != len(self.get_state()):
            raise RuntimeError("RNG state is wrong size")
        super().set_state(state if self.device.type == "cpu" else state[:-1].clone())


def _waits(name: str, args: Any, place: str) -> bool:
    """Whether the host would have to wait for a real device."""
    operation = name.split(".")[1]
    there = [isinstance(value, There) for value in args if isinstance(value, Tensor)]
    if name in BETWEEN:
        return len({*there, place == DEVICE.type}) > 1
    if operation in ASKING:
        return any(there)
    if operation in ("index", "index_put", "index_put_") and there[0]:
        filled = len(args) > 2 and not args[2].dim() and not there[1]
        return not filled and any(
            i is not None and (i.dtype == torch.bool or not isinstance(i, There)) for i in args[1]
        )
    return False


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func)
    values = tree_flatten((args, kwargs))[0]
    there = any(isinstance(v, There) for v in values)
    here = [v for v in values if isinstance(v, Tensor) and not isinstance(v, There) and v.dim()]
    indexed = "index" in name  # a mask or an index may lie on the CPU, as on a real device
    if there and here and not indexed and name not in BETWEEN:
        raise RuntimeError(f"{name}: tensors of two devices, {[tuple(v.shape) for v in here]} here")
    to = kwargs.get("device")
    place = torch.device(to).type if to is not None else (DEVICE.type if there else "cpu")
    for value in values:
        if isinstance(value, _Generator) and _places[value._cdata].type != place:
            raise RuntimeError(f"{name}: the generator is not on {place}, where the tensors are")
    if _waits(name, args, place):
        WAITS.append(name)
    if to is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args_here, kwargs_here = tree_map_only(There, lambda v: v.held, (args, kwargs))
    out = func(*args_here, **kwargs_here)
    if torch.Tag.inplace_view in func.tags:  # the shape of the one that is elsewhere changes too
        before = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            with no_dispatch():
                func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)
    operation = name.split(".")[1]
    if operation.endswith("_") and not operation.startswith("__"):
        return args[0] if out is not None else None
    if place == "cpu":
        return out
    return tree_map_only(Tensor, lambda v: v if isinstance(v, There) else There(v), out)


def _placed(make: Any) -> Any:
    def made(data: Any, *more: Any, device: Any = None, **options: Any) -> Tensor:
        if isinstance(data, There):
            return data
        out = make(data, *more, **options)
        if device is None or torch.device(device).type != DEVICE.type:
            return out
        WAITS.append(make.__name__)
        return There(out)

    return made


def _plain(make: Any) -> Any:
    def made(*args: Any, **options: Any) -> Any:
        with _disable_current_modes():  # files are read from storages, which modes do not know
            return make(*args, **options)

    return made


@contextmanager
def elsewhere(monkeypatch: Any) -> Iterator[None]:
    """While it lasts, `DEVICE` is a device like any other."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Generator", _PlacedGenerator)
        patch.setattr(torch, "tensor", _placed(torch.tensor))
        patch.setattr(torch, "as_tensor", _placed(torch.as_tensor))
        patch.setattr(torch, "asarray", _plain(torch.asarray))
        with _Mode():
            yield


def send(model: nn.Module) -> nn.Module:
    """Moves a model there, in place."""
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                moved = There(tensor.detach().clone())
                module._parameters[name] = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        for name, tensor in list(module._buffers.items()):
            if tensor is not None:
                module._buffers[name] = There(tensor.clone())
    return model
