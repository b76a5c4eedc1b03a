"""A teacher: a moving average of what has adapted."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from testtime._core.options import in_range


@dataclass(frozen=True, kw_only=True)
class MovingTeacher:
    """Exponential moving average of the adapted tensors: m teacher + (1 - m) student.

    Tensors that do not adapt are the same for both and are shared with the model.

    Args:
        momentum: m; 0.999 in CoTTA and RoTTA (there written nu = 1 - m).
        whole: whether parameters that do not adapt are averaged too, with themselves, as published
            code does. It costs a copy of them and changes their last bits only, of which Adam makes
            whole steps in a transformer: the biases of its keys have no gradient but rounding.
    """

    momentum: float
    whole: bool = field(default=False, repr=False)
    dense = True

    def __post_init__(self) -> None:
        in_range(0, 1, momentum=self.momentum)

    def follow(self, teacher: list[Tensor], student: list[Tensor]) -> list[Tensor]:
        """The teacher after the student's step."""
        # two products and a sum, not one fused step: to the last bit the teacher of published code
        kept = torch._foreach_mul(teacher, self.momentum)
        torch._foreach_add_(kept, torch._foreach_mul(student, 1 - self.momentum))
        return list(kept)
