"""Types of tensors."""

from typing import Any, cast

import torch
from torch import Tensor

from testtime._core.errors import InputError

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def check_tensors(**given: Any) -> None:
    """Refuses what is no tensor of dense numbers, with the name under which it was given.

    Example:
        >>> check_tensors(logits=torch.zeros(1), labels=[0])
        Traceback (most recent call last):
        testtime._core.errors.InputError: labels is of type list; expected a tensor: torch.as_tensor(...).
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            said = "None" if value is None else f"of type {type(value).__name__}"
            raise InputError(f"{name} is {said}; expected a tensor: torch.as_tensor(...).")
        check_dense(name, value)


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuses a tensor on the device "meta", which has no numbers, and a sparse one.

    Example:
        >>> check_dense("x", torch.eye(2).to_sparse())
        Traceback (most recent call last):
        testtime._core.errors.InputError: x is sparse; expected a dense tensor: x.to_dense().
    """
    if tensor.device.type == "meta":
        raise InputError(
            f"{name} is on the device meta, which holds shapes and no numbers; expected it on the "
            "CPU or an accelerator."
        )
    if tensor.layout in SPARSE:
        raise InputError(f"{name} is sparse; expected a dense tensor: {name}.to_dense().")


def as_given(values: Any) -> Tensor:
    """A tensor as it is; numbers and arrays as one on the CPU, whatever torch's default device is.

    Example:
        >>> with torch.device("meta"):
        ...     as_given([1, 2])
        tensor([1, 2])
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def at_least_single(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are.

    Example:
        >>> at_least_single(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> at_least_single(torch.ones(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, in a last dimension more; other tensors as they are.

    Example:
        >>> as_real(torch.tensor([1 + 2j]))
        tensor([[1., 2.]])
    """
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_was(own: Tensor, value: Tensor) -> Tensor:
    """A value in the type of the tensor that it is to replace: what `as_real` made, complex again.

    Example:
        >>> as_was(torch.tensor([1j]), torch.tensor([[1.0, 2.0]]))
        tensor([1.+2.j])
    """
    if own.is_complex():
        value = torch.complex(*value.unbind(-1))
    return value.to(own.dtype)


def in_type_of(given: Tensor, value: Tensor) -> Tensor:
    """A value in the type of what it was made of, but in float32 at least.

    Example:
        >>> in_type_of(torch.ones(3, dtype=torch.bfloat16), torch.tensor(1.0).double()).dtype
        torch.float32
    """
    return value.to(torch.promote_types(given.dtype, torch.float32))


def magnitude(largest: Tensor) -> Tensor:
    """The power of two above each number of 0 or more; 1 for 0.

    What is divided by it has the same digits, and squares that neither overflow nor vanish.

    Example:
        >>> magnitude(torch.tensor([0.0, 3.0, 4.0]))
        tensor([1., 4., 8.])
    """
    most = 1000 if largest.dtype == torch.float64 else 120
    exponent = torch.frexp(largest).exponent.clamp(-most, most)
    return torch.exp2(exponent.to(largest.dtype))


def places_of(numbers: Tensor, count: int) -> list[Tensor]:
    """Where each of the numbers 0 to `count` - 1 stands, found in one wait for the device.

    Args:
        numbers: (n,), whole; others are left out.
        count: of numbers that are looked for.

    Example:
        >>> places_of(torch.tensor([1, 0, 1, 9]), 2)
        [tensor([1]), tensor([0, 2])]
    """
    numbers = numbers.clamp(max=count)
    order = numbers.argsort(stable=True)
    each = torch.arange(count, device=numbers.device)
    found = (numbers[:, None] == each).sum(0)
    counts = cast(list[int], found.tolist())  # pyright: ignore[reportUnknownMemberType]
    return list(torch.split(order[: sum(counts)], counts))
