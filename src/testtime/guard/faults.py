"""Faults of hardware, for trying whether a monitor notices: flipped bits, stuck bits, drift.

A fault is a frozen value; called with a tensor and chance it gives a faulty copy. `inject` makes a
faulty copy of a model's weights, `faulty_activations` disturbs what modules answer while a block
runs. The model that is handed in stays as it was.
"""

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range
from testtime._core.seeds import check_generator, generator
from testtime.adaptation.layers import Hook, hooked
from testtime.adaptation.outputs import map_tensors

Fault = Callable[[Tensor, torch.Generator], Tensor]
"""A floating-point tensor, chance -> a faulty copy of the same shape and type.

Those of this file refuse other tensors (InputError)."""

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16,
            torch.float32: torch.int32, torch.float64: torch.int64}  # fmt: skip


@final
@dataclass(frozen=True, kw_only=True)
class BitFlips:
    """One random bit of a share of the values is flipped.

    Args:
        rate: share of the values.
        memory: "float" flips bits of the values as they are stored; "int8" those of the values
            rounded to 8 bits, 127 for the largest of a tensor, as accelerators hold weights. All
            values are rounded then.

    Example:
        >>> fault = BitFlips(rate=1.0)
        >>> one = fault(torch.ones(8), torch.Generator().manual_seed(0))
        >>> bool((one != 1).all())
        True
    """

    rate: float
    memory: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        in_range(0, 1, rate=self.rate)
        _check_memory(self.memory)

    def __call__(self, values: Tensor, chance: torch.Generator) -> Tensor:
        return _on_bits(values, self.rate, self.memory, chance, lambda word, mask: word ^ mask)


@final
@dataclass(frozen=True, kw_only=True)
class StuckAt:
    """One random bit of a share of the values is stuck at 0 or at 1; it may have been so already.

    Args:
        bit: 0 or 1.
        rate: share of the values.
        memory: as of `BitFlips`.

    Example:
        >>> fault = StuckAt(bit=0, rate=1.0)
        >>> fault(torch.zeros(3), torch.Generator())
        tensor([0., 0., 0.])
    """

    bit: int
    rate: float
    memory: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        in_range(0, 1, rate=self.rate)
        _check_memory(self.memory)
        if self.bit not in (0, 1):
            raise OptionError(f"bit is {self.bit}; expected 0 or 1")

    def __call__(self, values: Tensor, chance: torch.Generator) -> Tensor:
        stick = (lambda word, mask: word | mask) if self.bit else (lambda word, mask: word & ~mask)
        return _on_bits(values, self.rate, self.memory, chance, stick)


@final
@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A share of the values is multiplied by a factor: -1 for sign flips.

    Args:
        factor: -1 by default.
        rate: share of the values.

    Example:
        >>> Scaling(rate=1.0)(torch.tensor([1.0, -2.0]), torch.Generator())
        tensor([-1.,  2.])
    """

    rate: float
    factor: float = -1.0

    def __post_init__(self) -> None:
        in_range(0, 1, rate=self.rate)
        in_range(-1e30, factor=self.factor)

    def __call__(self, values: Tensor, chance: torch.Generator) -> Tensor:
        hit = _hit(values, self.rate, chance)
        return torch.where(hit, values * self.factor, values)


@final
@dataclass(frozen=True, kw_only=True)
class Drift:
    """Gaussian drift of all values: w (1 + m n) + a s n', s the standard deviation of the tensor.

    Args:
        additive: a.
        multiplicative: m.

    Example:
        >>> Drift()(torch.tensor([1.0, 2.0]), torch.Generator())
        tensor([1., 2.])
    """

    additive: float = 0.0
    multiplicative: float = 0.0

    def __post_init__(self) -> None:
        in_range(0, additive=self.additive, multiplicative=self.multiplicative)

    def __call__(self, values: Tensor, chance: torch.Generator) -> Tensor:
        _check(values)
        check_generator(chance)
        factor, shift = (
            torch.randn(values.shape, generator=chance, dtype=torch.float32, device="cpu").to(
                values
            )
            for _ in range(2)
        )
        spread = values.std(correction=0) if values.numel() else values.new_zeros(())
        return values * (1 + self.multiplicative * factor) + self.additive * spread * shift


def inject(model: nn.Module, faults: Fault | Sequence[Fault], *, seed: int = 0) -> nn.Module:
    """A copy of the model with faults in its floating-point parameters.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> faulty = inject(model, Scaling(rate=1.0))
        >>> torch.equal(faulty.weight, -model.weight)
        True
    """
    faulty, chance = copy.deepcopy(model), generator(seed, "faults")
    with torch.no_grad():
        for parameter in faulty.parameters():
            if parameter.is_floating_point():
                for fault in _listed(faults):
                    parameter.copy_(fault(parameter.detach(), chance))
    return faulty


@contextmanager
def faulty_activations(
    model: nn.Module, faults: Fault | Sequence[Fault], *, seed: int = 0
) -> Generator[None, None, None]:
    """While the block runs, what the model's innermost modules answer is faulty, each time anew.

    Example:
        >>> model, x = nn.Linear(4, 3), torch.ones(2, 4)
        >>> with faulty_activations(model, Scaling(rate=1.0)), torch.no_grad():
        ...     bool((model(x) == 0).any())
        False
        >>> len(model._forward_hooks)
        0
    """
    chance = generator(seed, "faults", "activations")

    def spoil(value: Tensor) -> Tensor:
        for fault in _listed(faults) if value.is_floating_point() else ():
            value = fault(value, chance)
        return value

    def disturb(_: nn.Module, __: Any, output: Any) -> Any:
        return map_tensors(spoil, output)

    innermost = [module for module in model.modules() if not [*module.children()]]
    with hooked(Hook(module, disturb, after=True) for module in innermost):
        yield


def _listed(faults: Fault | Sequence[Fault]) -> Sequence[Fault]:
    return faults if isinstance(faults, Sequence) else [faults]


def _check(values: Tensor) -> None:
    check_tensors(values=values)
    if not values.is_floating_point():
        raise InputError(
            f"values are {values.dtype}; expected floating point numbers to be faulty."
        )


def _hit(values: Tensor, rate: float, chance: torch.Generator) -> Tensor:
    _check(values)
    check_generator(chance)
    drawn = torch.rand(values.shape, generator=chance, dtype=torch.float32, device="cpu")
    return (drawn < rate).to(values.device)


def _on_bits(
    values: Tensor,
    rate: float,
    memory: str,
    chance: torch.Generator,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    hit = _hit(values, rate, chance)
    if not values.numel():
        return values
    step = values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny) / 127
    if memory == "int8":
        word = (values / step).round().to(torch.int8)
    else:
        word = values.contiguous().view(INTEGERS[values.dtype])
    place = torch.randint(8 * word.element_size(), values.shape, generator=chance, device="cpu").to(
        word
    )
    word = torch.where(hit, change(word, torch.ones_like(word) << place), word)
    return word.to(values.dtype) * step if memory == "int8" else word.view(values.dtype)


def _check_memory(memory: str) -> None:
    if memory not in ("float", "int8"):
        raise OptionError(f"memory is {memory!r}; expected 'float' or 'int8'")
