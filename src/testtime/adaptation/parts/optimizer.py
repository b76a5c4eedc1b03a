"""How a step is taken: pure functions of lists of tensors, written with multi-tensor operations.

They reproduce `torch.optim`; old tensors are never written to, so that a state once taken stays.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from testtime._core.options import in_range, whole

OptimizerState = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum, as `torch.optim.SGD`.

    Args:
        lr: step size.
        momentum: share of the last direction that is kept.
        nesterov: whether the step looks ahead along the direction.
        weight_decay: share of the tensors that is added to their gradients.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        in_range(0, lr=self.lr, weight_decay=self.weight_decay)
        in_range(0, 1, momentum=self.momentum)

    def init(self, tensors: list[Tensor]) -> OptimizerState:
        """No direction yet."""
        return {"direction": None}

    def step(
        self, state: OptimizerState, tensors: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], OptimizerState]:
        """Tensors and state after one step against the gradients."""
        if self.weight_decay:
            grads = list(torch._foreach_add(grads, tensors, alpha=self.weight_decay))
        direction = grads
        if state["direction"] is not None and self.momentum:
            direction = torch._foreach_mul(state["direction"], self.momentum)
            torch._foreach_add_(direction, grads)
        kept = list(direction) if self.momentum else None
        if self.nesterov and kept is not None:
            direction = torch._foreach_add(grads, kept, alpha=self.momentum)
        moved = torch._foreach_add(tensors, direction, alpha=-self.lr)
        return list(moved), {"direction": kept}


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam, as `torch.optim.Adam`, or AdamW when `weight_decay` is set (Kingma and Ba, ICLR 2015).

    Args:
        lr: step size.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay (Loshchilov and Hutter, ICLR 2019).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        in_range(0, lr=self.lr, eps=self.eps, weight_decay=self.weight_decay)

    def init(self, tensors: list[Tensor]) -> OptimizerState:
        """Both moments at zero."""
        zeros = [torch.zeros_like(tensor) for tensor in tensors]
        return {"steps": 0, "first": zeros, "second": zeros}

    def step(
        self, state: OptimizerState, tensors: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], OptimizerState]:
        """Tensors and state after one step against the gradients."""
        steps, (one, two) = state["steps"] + 1, self.betas
        first, second = _moments(state, grads, self.betas)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - two**steps) ** 0.5)
        torch._foreach_add_(scale, self.eps)
        if self.weight_decay:
            tensors = list(torch._foreach_mul(tensors, 1 - self.lr * self.weight_decay))
        moved = torch._foreach_addcdiv(tensors, first, scale, -self.lr / (1 - one**steps))
        return list(moved), {"steps": steps, "first": first, "second": second}


@dataclass(frozen=True, kw_only=True)
class AdaMod:
    """Adam, whose rate of each entry never exceeds a moving average of what it was.

        rate = lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps)
        bound <- beta3 bound + (1 - beta3) rate;    step = min(rate, bound) m

    Args:
        lr: step size.
        betas: decay of the first and second moment.
        beta3: decay of the bound, which begins at zero.
        eps: added to the root of the second moment.

    Reference: Ding, Ren, Luo, Sun, An Adaptive and Momental Bound Method for Stochastic Learning,
        2019.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        in_range(0, lr=self.lr, eps=self.eps)
        in_range(0, 1, beta3=self.beta3)

    def init(self, tensors: list[Tensor]) -> OptimizerState:
        """Both moments and the bound at zero."""
        zeros = [torch.zeros_like(tensor) for tensor in tensors]
        return {"steps": 0, "first": zeros, "second": zeros, "bound": zeros}

    def step(
        self, state: OptimizerState, tensors: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], OptimizerState]:
        """Tensors and state after one step against the gradients."""
        steps, (one, two) = state["steps"] + 1, self.betas
        first, second = _moments(state, grads, self.betas)
        # the root of zero has no slope, which attacks that differentiate through steps would meet
        root = torch._foreach_sqrt(torch._foreach_clamp_min(second, 1e-30))
        rate = torch._foreach_reciprocal(torch._foreach_add(root, self.eps))
        rate = torch._foreach_mul(rate, self.lr * (1 - two**steps) ** 0.5 / (1 - one**steps))
        bound = torch._foreach_lerp(state["bound"], rate, 1 - self.beta3)
        moved = torch._foreach_addcmul(
            tensors, torch._foreach_minimum(rate, bound), first, value=-1
        )
        kept = {"first": first, "second": second, "bound": list(bound)}
        return list(moved), {"steps": steps, **kept}


@dataclass(frozen=True, kw_only=True)
class CosineAnnealed:
    """Steps `base` with a rate that falls to zero along a cosine, and rises again after that.

        rate = lr (1 + cos(pi t / period)) / 2      at step t = 0, 1, ...

    A reset begins anew at t = 0.

    Args:
        base: the optimizer that takes the step.
        period: steps until the rate is zero.

    Reference: Loshchilov, Hutter, SGDR, ICLR 2017; `torch.optim.lr_scheduler.CosineAnnealingLR`.
    """

    base: SGD | Adam
    period: int

    def __post_init__(self) -> None:
        whole(1, period=self.period)

    def init(self, tensors: list[Tensor]) -> OptimizerState:
        """No step yet."""
        return {"steps": 0, "base": self.base.init(tensors)}

    def step(
        self, state: OptimizerState, tensors: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], OptimizerState]:
        """The base optimizer's step at the rate of now."""
        steps = state["steps"]
        share = (1 + math.cos(math.pi * steps / self.period)) / 2
        moved, inner = replace(self.base, lr=share * self.base.lr).step(
            state["base"], tensors, grads
        )
        return moved, {"steps": steps + 1, "base": inner}


@dataclass(frozen=True, kw_only=True)
class SharpnessAware:
    """Steps `base` with the gradient at the worst point nearby (Foret et al., ICLR 2021).

        worst = tensors + rho * g / ||g||

    Args:
        base: the optimizer that takes the step.
        rho: radius of the neighbourhood; 0.05 in the paper and in SAR.
    """

    base: SGD | Adam | CosineAnnealed
    rho: float = 0.05

    def __post_init__(self) -> None:
        in_range(0, rho=self.rho)

    def init(self, tensors: list[Tensor]) -> OptimizerState:
        """The base optimizer's."""
        return self.base.init(tensors)

    def worst(self, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """The point of the neighbourhood where the loss is highest, to first order."""
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        climb = torch._foreach_mul(grads, self.rho / (norm + 1e-12))
        return list(torch._foreach_add(tensors, climb))

    def step(
        self, state: OptimizerState, tensors: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], OptimizerState]:
        """The base optimizer's step, with gradients taken at the worst point."""
        return self.base.step(state, tensors, grads)


Optimizer = SGD | Adam | AdaMod | CosineAnnealed | SharpnessAware


def rate_for_batch(lr: float, batch_size: int) -> float:
    """The rate for small batches: full from 32 samples, in proportion below, doubled for one.

    The rule of the code of SAR and DeYO for ResNets, (lr / 64) * B * 2 below 32 samples.

    Example:
        >>> rate_for_batch(0.32, 64), rate_for_batch(0.32, 8), rate_for_batch(0.32, 1)
        (0.32, 0.08, 0.02)
    """
    in_range(0, lr=lr)
    whole(1, batch_size=batch_size)
    return lr * min(1.0, batch_size / 32) * (2 if batch_size == 1 else 1)


def _moments(
    state: OptimizerState, grads: list[Tensor], betas: tuple[float, float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Moving averages of the gradients, and of their squares."""
    one, two = betas
    first = torch._foreach_lerp(state["first"], grads, 1 - one)
    second = torch._foreach_mul(state["second"], two)
    torch._foreach_addcmul_(second, grads, grads, 1 - two)
    return list(first), list(second)
