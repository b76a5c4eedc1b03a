"""Sums over the ranks of a process group, so that many processes adapt as one would."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from testtime._core.errors import OptionError, StateError


class _Sum(torch.autograd.Function):
    """Sum over ranks; its gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Ranks:
    """The ranks that adapt together; without a process group, this process alone.

    Args:
        group: a `torch.distributed` process group, or None. It is torch's to hold: whoever held it as
            well would keep its threads alive after it was destroyed, and they abort a process that ends.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise OptionError(
                f"process_group is {group!r:.60}; expected None, or a group of torch.distributed that "
                "this process belongs to: torch.distributed.group.WORLD, or what new_group gave."
            )
        self._group = (lambda: None) if group is None else weakref.ref(group)

    @property
    def group(self) -> Any:
        """The process group, or None.

        Raises:
            StateError: it was destroyed.
        """
        group = self._group()
        if group is None and isinstance(self._group, weakref.ref):
            raise StateError(
                "the process group of this adapter was destroyed. Save the state before, and load it "
                "into an adapter of a new group, or of this process alone."
            )
        return group

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.group is None or dist.get_world_size(self.group) == 1

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; gradients flow to all of them."""
        return value if self.alone else _Sum.apply(value, self.group)

    def stack(self, value: Tensor) -> Tensor:
        """Everyone's, one below another in order of rank; gradients flow to all of them."""
        if self.alone:
            return value[None]
        everyone = range(dist.get_world_size(self.group))
        mine, nothing = dist.get_rank(self.group), torch.zeros_like(value)
        return self.sum(torch.stack([value if rank == mine else nothing for rank in everyone]))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the first dimension of the joined batch of all ranks."""
        if self.alone:
            return values.mean(0)
        return self.sum(values.sum(0)) / self.sum(values.new_tensor(float(len(values))))

    def gather(self, values: Tensor) -> Tensor:
        """The joined batch of all ranks, in order of rank; batches may differ in size."""
        if self.alone:
            return values
        counts = self._counts(len(values), values.device)
        padded = values.new_zeros((max(counts), *values.shape[1:]))
        padded[: len(values)] = values.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def own(self, joined: Tensor, count: int) -> Tensor:
        """This rank's part, `count` samples, of a batch that `gather` joined."""
        if self.alone:
            return joined
        counts = self._counts(count, joined.device)
        start = sum(counts[: dist.get_rank(self.group)])
        return joined[start : start + count]

    def _counts(self, own: int, device: torch.device) -> list[int]:
        """How many samples each rank has."""
        mine = torch.tensor(own, device=device)
        each = [torch.zeros_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(each, mine, group=self.group)
        return [int(count) for count in each]

    def agree(self, complaint: Exception | None, device: torch.device) -> bool:
        """Whether no rank complains. All ranks must ask; a batch is refused by all or by none."""
        if self.alone:
            return complaint is None
        bad = torch.tensor(float(complaint is not None), device=device)
        dist.all_reduce(bad, group=self.group)
        return float(bad) == 0
