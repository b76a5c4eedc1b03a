"""Modes and tensors of somebody else's making, who look at calls of torch's functions."""

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Seeing(TorchFunctionMode):
    """Notes what was called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **kwargs or {})


def handling(function) -> type[Tensor]:
    """A kind of tensor that handles one function, and no other."""

    class Handling(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "handled" if func is function else NotImplemented

    return Handling
