"""Types of tensors."""

import torch
from torch import Tensor


def at_least_single(tensor: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are.

    Example:
        >>> at_least_single(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> at_least_single(torch.ones(1, dtype=torch.float64)).dtype
        torch.float64
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
