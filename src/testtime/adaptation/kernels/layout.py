"""How a tensor lies in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By dimensions: how images and volumes lie whose channels lie together."""


class Shape(NamedTuple):
    """How a tensor is laid out, without its values."""

    sizes: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x: Tensor) -> "Shape":
        """The layout of x."""
        return Shape(x.shape, x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        """A tensor laid out so, of any values; on a CPU its pages are never touched."""
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device=self.device)


def dense(x: Tensor) -> bool:
    """Whether the values of x lie in memory without gaps and overlaps.

    Example:
        >>> dense(torch.ones(2, 3)), dense(torch.ones(2, 3)[:, :2])
        (True, False)
    """
    return x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def laid_as(x: Tensor, other: Tensor) -> Tensor:
    """The values of x without gaps in memory, in the order of another tensor's; x where they lie so.

    Example:
        >>> images = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
        >>> laid_as(torch.ones(2, 3, 4, 4), images).stride() == images.stride()
        True
    """
    last = CHANNELS_LAST.get(other.dim())
    if last is None or other.is_contiguous() or not other.is_contiguous(memory_format=last):
        return x.contiguous()
    return x.contiguous(memory_format=last)


def in_memory(x: Tensor) -> Tensor:
    """The values of x, without gaps in memory, in the order in which they lie there; not copied.

    Example:
        >>> in_memory(torch.tensor([[1, 2], [3, 4]]).T)
        tensor([1, 2, 3, 4])
    """
    return x.as_strided((x.numel(),), (1,))
