"""Small networks that an estimator trains for itself, with a generator of its own.

Whatever the caller's mode is (`no_grad`, `inference_mode`, `autocast`, a default type) and wherever the
global random state stands: training inside `training()` works, in float32, and touches none of them.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import copy
import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError


@contextmanager
def training() -> Generator[None]:
    """Gradients and full precision, also within the caller's `no_grad`, `inference_mode` or `autocast`.

    Example:
        >>> with torch.inference_mode(), training():
        ...     torch.ones(1).requires_grad_().exp().requires_grad
        True
    """
    with torch.inference_mode(False), torch.enable_grad(), single():
        yield


@contextmanager
def single() -> Generator[None]:
    """No autocast inside: networks compute in the type of their weights.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), single():
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with torch's default initialisation, drawn from `generator` on the CPU.

    Example:
        >>> linear(4, 2, torch.Generator().manual_seed(0)).weight.shape
        torch.Size([2, 4])
    """
    layer = nn.Linear(inputs, outputs, device="meta", dtype=torch.float32).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def mlp(
    widths: Sequence[int], generator: torch.Generator, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """A multilayer perceptron: `widths` from the input to the output.

    Example:
        >>> len(mlp([3, 64, 64, 1], torch.Generator().manual_seed(0)))
        5
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [linear(inputs, outputs, generator), activation()]
    return nn.Sequential(*layers[:-1])


def trainable(critic: object) -> nn.Module:
    """A copy of a caller's critic to be trained, in float32 as its samples are.

    Raises:
        InputError: for what is no module, or has no weight that may be trained.

    Example:
        >>> critic = nn.Linear(1, 1)
        >>> trainable(critic) is critic
        False
    """
    if not isinstance(critic, nn.Module):
        raise InputError(f"the critic is of type {type(critic).__name__}; expected a torch module.")
    if not any(weight.requires_grad for weight in critic.parameters()):
        raise InputError(
            f"the critic, a {type(critic).__name__}, has no weight that may be trained; expected "
            "at least one. Call requires_grad_() on it, or leave it out for the default."
        )
    return copy.deepcopy(critic).float()


class JointCritic(nn.Module):
    """T(x, y) of both together: one network on (x, y). Leading dimensions are broadcast.

    Example:
        >>> critic = JointCritic(mlp([3, 8, 1], torch.Generator().manual_seed(0)))
        >>> critic(torch.ones(5, 1, 2), torch.ones(1, 4, 1)).shape
        torch.Size([5, 4])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = torch.broadcast_tensors(x[..., 0], y[..., 0])[0]
        both = torch.cat([v.expand(*pairs.shape, v.shape[-1]) for v in (x, y)], -1)
        return self.network(both).squeeze(-1)


class SeparableCritic(nn.Module):
    """T(x, y) = g(x) . h(y): as many evaluations as samples, not as pairs.

    Example:
        >>> g, h = (mlp([d, 8, 3], torch.Generator().manual_seed(d)) for d in (2, 1))
        >>> SeparableCritic(g, h)(torch.ones(5, 1, 2), torch.ones(1, 4, 1)).shape
        torch.Size([5, 4])
    """

    def __init__(self, of_x: nn.Module, of_y: nn.Module) -> None:
        super().__init__()
        self.of_x = of_x
        self.of_y = of_y

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("...e,...e->...", self.of_x(x), self.of_y(y))


def adam(
    network: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    decay_over: int | None = None,
) -> Callable[[Tensor], None]:
    """A function that makes one step of Adam down a loss; lr may fall linearly to 0 over steps.

    Example:
        >>> network = mlp([1, 1], torch.Generator().manual_seed(0))
        >>> descend = adam(network, lr=0.1)
        >>> descend(network(torch.ones(1, 1)).sum())
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=betas)
    taken = itertools.count(1)

    def descend(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        with torch.device("cpu"):  # where Adam keeps its clock
            optimizer.step()
        if decay_over is not None:
            optimizer.param_groups[0]["lr"] = lr * max(0.0, 1 - next(taken) / decay_over)

    return descend


class Averaged:
    """A copy of a network whose weights are a running mean of those that it follows.

    Example:
        >>> network = mlp([1, 1], torch.Generator().manual_seed(0))
        >>> averaged = Averaged(network, decay=0.5)
        >>> averaged.follow(network)
        >>> bool((averaged.network[0].weight == network[0].weight).all())
        True
    """

    def __init__(self, network: nn.Module, *, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    def follow(self, network: nn.Module) -> None:
        """mean <- decay mean + (1 - decay) weights"""
        for mean, new in zip(self.network.parameters(), network.parameters(), strict=True):
            mean.lerp_(new.detach(), 1 - self._decay)
