"""SMILE and the variational estimators that it criticises: a critic is trained on a bound.

for each step:
    (x_1, y_1) ... (x_B, y_B) drawn from the training share of the samples
    F_ij = f(x_i, y_j)
    f <- f + lr * Adam of the gradient of bound(F)
value: mean of bound(F) over blocks of the held-out samples
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import generator
from testtime.measures.information.bounds import smile_bound
from testtime.measures.information.estimate import (
    Estimate,
    constant,
    mean_estimate,
    paired,
    standardised,
)
from testtime.measures.information.networks import (
    SeparableCritic,
    adam,
    mlp,
    single,
    trainable,
    training,
)

HELD_OUT = 0.25
"""Share of the samples that no critic is trained on and the value is of."""
BLOCK = 256
"""Held-out samples that are scored against each other at one time."""
LEAST = 32
"""Samples without which there is nothing to train and hold out."""


def smile(
    x: Tensor,
    y: Tensor,
    *,
    clip: float = 5.0,
    critic: nn.Module | None = None,
    steps: int = 4000,
    batch_size: int = 64,
    lr: float = 5e-4,
    seed: int = 0,
    trace: bool = False,
) -> Estimate:
    """Mutual information by SMILE: `variational` with `smile_bound`.

    The value may lie above the truth. Options as `variational`, and:

    Args:
        x: (n, dx) or (n,).
        y: (n, dy) or (n,), the partner of each.
        clip: tau of the density ratio.

    Raises:
        InputError: as `variational`.
        OptionError: as `variational`, and for a negative clip.

    Example:
        >>> x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(4000, generator=torch.Generator().manual_seed(1))
        >>> found = smile(x, 0.8 * x + 0.6 * noise, steps=100, lr=2e-3)
        >>> abs(found.value - 0.51) < 0.15
        True

    Reference: Song, Ermon, Understanding the Limitations of Variational Mutual Information
        Estimators, ICLR 2020.
    """
    return variational(
        x, y, bound=partial(smile_bound, clip=clip), critic=critic, steps=steps,
        batch_size=batch_size, lr=lr, seed=seed, trace=trace,
    )  # fmt: skip


def variational(
    x: Tensor,
    y: Tensor,
    *,
    bound: Callable[[Tensor], Tensor],
    critic: nn.Module | None = None,
    steps: int = 4000,
    batch_size: int = 64,
    lr: float = 5e-4,
    seed: int = 0,
    trace: bool = False,
) -> Estimate:
    """Mutual information of x and y in nats by a bound on it, with a critic that is trained for it.

    A quarter of the samples is held out from training, and the value is that on them, in blocks of
    at most 256; a bound that depends on the size of a batch (InfoNCE: at most its logarithm) has
    this one. With few samples the critic learns by heart what does not hold, and the value falls,
    below zero too. A variable that is constant tells nothing: 0.

    Args:
        x: (n, dx) or (n,); coordinates are standardised. Where tails are heavy, give the
            `normal_scores` of both variables.
        y: (n, dy) or (n,), the partner of each.
        bound: a function of `testtime.measures.information.bounds`.
        critic: a module that gives scores of x (..., dx) and y (..., dy), leading dimensions
            broadcast; a copy of it is trained. Default: two networks of three hidden layers of 256
            with ReLU, and the product of their 32 outputs (the separable one of the code).
        steps: 4000, as many as the code makes at each of its five values.
        batch_size: 64 (code).
        lr: of Adam, 5e-4 (code).
        seed: of the split, the weights and the batches.
        trace: whether the value of each step is kept.

    Raises:
        InputError: for NaN, lengths that differ, fewer than 32 samples, or a critic without weights.
        OptionError: for an option out of its range.

    Example:
        >>> from testtime.measures.information.bounds import infonce
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> variational(x, x, bound=infonce, steps=3, trace=True).trace.__len__()
        3

    Reference: Song, Ermon, ICLR 2020; Poole et al., ICML 2019.
    """
    check_training(steps=steps, batch_size=batch_size, lr=lr)
    x, y = paired(x, y, least=LEAST)
    if constant(x) or constant(y):
        return Estimate(0.0, 0.0)
    random = generator(seed, "variational")
    with training():
        known, held = split(standardised(x), standardised(y), random)
        if critic is None:
            of_x, of_y = (mlp([v.shape[1], 256, 256, 256, 32], random) for v in known)
            critic = SeparableCritic(of_x, of_y)
        critic = trainable(critic).to(x.device)
        descend = adam(critic, lr=lr)
        values: list[float] = []
        for index in batches(len(known[0]), batch_size, steps, random):
            a, b = (v[index] for v in known)
            value = bound(critic(a[:, None], b[None]))
            descend(-value)
            if trace:
                values.append(float(value.detach()))
    with torch.no_grad(), single():
        blocks = torch.arange(len(held[0]), device="cpu").tensor_split(
            max(4, -(-len(held[0]) // BLOCK))
        )
        found = [bound(critic(held[0][i][:, None], held[1][i][None])) for i in blocks]
    return finite(mean_estimate(torch.stack(found), tuple(values)))


def split(x: Tensor, y: Tensor, random: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Training and held-out samples of both variables.

    Example:
        >>> known, held = split(torch.rand(8, 1), torch.rand(8, 2), torch.Generator())
        >>> known[0].shape, held[1].shape
        (torch.Size([6, 1]), torch.Size([2, 2]))
    """
    order = torch.randperm(len(x), generator=random, device="cpu").to(x.device)
    held = int(HELD_OUT * len(x))
    return [v[order[held:]] for v in (x, y)], [v[order[:held]] for v in (x, y)]


def batches(samples: int, size: int, steps: int, random: torch.Generator) -> list[Tensor]:
    """Indices of a batch for each step: every sample once, in another order each time round.

    Example:
        >>> [len(batch) for batch in batches(10, 4, 3, torch.Generator())]
        [4, 4, 4]
    """
    size = min(size, samples)
    found: list[Tensor] = []
    while len(found) < steps:
        order = torch.randperm(samples, generator=random, device="cpu")
        found += [order[i : i + size] for i in range(0, samples - size + 1, size)]
    return found[:steps]


def check_training(*, steps: int, batch_size: int, lr: float) -> None:
    """Refuses options of a training that are out of their range.

    Example:
        >>> check_training(steps=1, batch_size=1, lr=0.1)
        Traceback (most recent call last):
        testtime._core.errors.OptionError: batch_size is 1; expected a whole number, at least 2
    """
    whole(1, steps=steps)
    whole(2, batch_size=batch_size)
    in_range(0, lr=lr)


def finite(estimate: Estimate) -> Estimate:
    """The estimate, if the training that led to it did not diverge.

    Raises:
        InputError: when the value is not finite.

    Example:
        >>> finite(Estimate(1.0, 0.1)).value
        1.0
    """
    if not abs(estimate.value) < float("inf"):
        raise InputError(
            f"the trained critic gives the value {estimate.value}; expected a finite one. The "
            "training diverged: take a smaller lr, a larger batch, or a bound with less variance."
        )
    return estimate
