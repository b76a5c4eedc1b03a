"""MINE: mutual information neural estimation.

for each step:
    (x_1, y_1) ... (x_b, y_b) drawn, and partners y_pi(i) from a permutation, in which
        no sample of a small batch keeps its own
    V = mean_i T(x_i, y_i) - ln mean_i e^T(x_i, y_pi(i))
    ma <- (1 - a) ma + a mean_i e^T(x_i, y_pi(i))
    T <- T + lr * Adam of ( mean_i grad T(x_i, y_i) - mean_i grad e^T(x_i, y_pi(i)) / ma ), lr falling to 0
value: V on held-out samples

The gradient of V itself divides by the mean over the batch, which is biased; `ma` is not.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime._core.seeds import generator
from testtime.measures.information.estimate import (
    Estimate,
    constant,
    mean_estimate,
    paired,
    standardised,
)
from testtime.measures.information.networks import (
    JointCritic,
    adam,
    mlp,
    single,
    trainable,
    training,
)
from testtime.measures.information.variational import (
    LEAST,
    batches,
    check_training,
    finite,
    split,
)

PARTNERS = 16
"""Wrong partners of each held-out sample, for the mean over the product law."""
SMALL = 32
"""Samples of a batch below which no sample may be its own wrong partner; the number is ours.

A permutation leaves one true pair on average, which is little among many."""


def mine(
    x: Tensor,
    y: Tensor,
    *,
    critic: nn.Module | None = None,
    rate: float = 0.01,
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    trace: bool = False,
) -> Estimate:
    """Mutual information of x and y in nats by MINE, a lower bound up to chance.

    A quarter of the samples is held out from training, and the value is that on them: with few
    samples it falls, below zero too. Hold ten thousand or more out where the information is large:
    the variance grows like its exponential. A variable that is constant tells nothing: 0.

    Args:
        x: (n, dx) or (n,); coordinates are standardised. Where tails are heavy, give the
            `normal_scores` of both variables.
        y: (n, dy) or (n,), the partner of each.
        critic: a module that gives one score for each x (b, dx) and y (b, dy); a copy of it is
            trained. Default: a network on both with two hidden layers of 64 and ELU.
        rate: a of the running mean, 0.01 as usual; 1 is the biased gradient.
        steps: 2000, ours for small problems.
        batch_size: 256, ours.
        lr: of Adam, 1e-3, the largest of the usual ones, falling to 0, which is ours: with one that stays
            the last step counts too much, and of heavy tails the value may lie a fifth lower.
        seed: of the split, the weights and the batches.
        trace: whether V of each step is kept.

    Raises:
        InputError: for NaN, lengths that differ, fewer than 32 samples, or a critic without weights,
            or that does not give one score for each pair.
        OptionError: for an option out of its range.

    Example:
        >>> x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(2000, generator=torch.Generator().manual_seed(1))
        >>> abs(mine(x, 0.8 * x + 0.6 * noise, steps=100, lr=5e-3).value - 0.51) < 0.15
        True

    Reference: Belghazi et al., MINE: Mutual Information Neural Estimation, ICML 2018.
    """
    check_training(steps=steps, batch_size=batch_size, lr=lr)
    in_range(0, 1, rate=rate)
    x, y = paired(x, y, least=LEAST)
    if constant(x) or constant(y):
        return Estimate(0.0, 0.0)
    random = generator(seed, "mine")
    with training():
        known, held = split(standardised(x), standardised(y), random)
        if critic is None:
            critic = JointCritic(mlp([x.shape[1] + y.shape[1], 64, 64, 1], random, nn.ELU))
        critic = trainable(critic).to(x.device)
        descend = adam(critic, lr=lr, decay_over=steps)
        log_mean, values = None, list[float]()
        for index in batches(len(known[0]), batch_size, steps, random):
            a, b = (v[index] for v in known)
            together = _scored(critic, a, b)
            apart = _scored(critic, a, b[partners(len(b), random)])
            log_mean = running_log_mean(log_mean, apart, rate=rate)
            descend(-mine_objective(together, apart, log_mean))
            if trace:
                values.append(float(mine_value(together, apart).detach()))
    with torch.no_grad(), single():
        return finite(_held_out(critic, held[0], held[1], tuple(values)))


def partners(n: int, random: torch.Generator) -> Tensor:
    """Whose y each sample's x meets for the product law: a permutation, (n,).

    Below 32 samples it is a derangement, a random cycle through all: nobody meets their own. That
    needs two samples, which the batches of `mine` have.

    Example:
        >>> partners(2, torch.Generator())
        tensor([1, 0])

    Reference: Belghazi et al., ICML 2018.
    """
    order = torch.randperm(n, generator=random, device="cpu")
    return order if n >= SMALL else order.roll(1)[order.argsort()]


def mine_value(
    together: Float[Tensor, "joint"], apart: Float[Tensor, "product"]
) -> Float[Tensor, ""]:
    """V = mean T(x, y) - ln mean e^T(x, y'), differentiable: a term to raise or to lower.

    As a loss it takes any scores: one that is NaN makes it NaN.

    Args:
        together: scores of pairs that belong together.
        apart: scores of pairs from the product law.

    Raises:
        InputError: for scores that are not (n,) in floating point, or none.

    Example:
        >>> mine_value(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 0.0]))
        tensor(2.)

    Reference: Belghazi et al., ICML 2018.
    """
    _check_scores(together=together, apart=apart)
    return together.mean() - apart.logsumexp(0) + math.log(len(apart))


def running_log_mean(
    log_mean: Tensor | None, apart: Float[Tensor, "product"], *, rate: float
) -> Float[Tensor, ""]:
    """ln ma after a batch; the first batch (None) starts it. In logarithms, as e^T overflows.

    A score that is NaN makes it NaN for good: leave such batches out.

    Example:
        >>> running_log_mean(torch.tensor(0.0), torch.tensor([math.log(3.0)]), rate=0.5).exp()
        tensor(2.)
    """
    in_range(0, 1, rate=rate)
    _check_scores(apart=apart)
    new = (apart.logsumexp(0) - math.log(len(apart))).detach()
    return new if log_mean is None else torch.logaddexp(
        log_mean + math.log1p(-rate) if rate < 1 else new - math.inf,
        new + math.log(rate) if rate > 0 else new - math.inf,
    )  # fmt: skip


def mine_objective(
    together: Float[Tensor, "joint"], apart: Float[Tensor, "product"], log_mean: Tensor
) -> Float[Tensor, ""]:
    """What MINE ascends: its gradient is that of V with the mean of e^T replaced by a running one.

        mean T(x, y) - mean e^(T(x, y') - ln ma)

    Args:
        together: scores of pairs that belong together.
        apart: scores of pairs from the product law.
        log_mean: ln ma, of `running_log_mean`.

    Raises:
        InputError: as `mine_value`, whose words on NaN hold here too.

    Example:
        >>> mine_objective(torch.zeros(2), torch.zeros(2), torch.tensor(0.0))
        tensor(-1.)

    Reference: Belghazi et al., ICML 2018, section 3.2.
    """
    _check_scores(together=together, apart=apart)
    check_tensors(log_mean=log_mean)
    return together.mean() - (apart - log_mean.detach()).exp().mean()


def adaptive_clip(gradient: Tensor, limit: Tensor) -> Tensor:
    """The gradient of the information term, no longer than that of the loss that it goes with.

        g <- min( |limit|, |g| ) g / |g|

    NaN or infinity in the gradient leaves NaN in it, and an infinite limit does not bind.

    Raises:
        InputError: gradients that are no tensors in floating point.

    Example:
        >>> adaptive_clip(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
        tensor([0.6000, 0.8000])

    Reference: Belghazi et al., ICML 2018, section 5.1.
    """
    check_tensors(gradient=gradient, limit=limit)
    if not (gradient.is_floating_point() and limit.is_floating_point()):
        raise InputError(
            f"gradient is {gradient.dtype} and limit {limit.dtype}; expected floating point numbers."
        )
    # the squares of large numbers overflow in their own precision
    own, most = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in (gradient, limit))
    share = (most / own.clamp(min=torch.finfo(own.dtype).tiny)).clamp(max=1)
    return (gradient * share).to(gradient.dtype)


def _check_scores(**scores: Tensor) -> None:
    check_tensors(**scores)
    for name, own in scores.items():
        if own.ndim != 1 or not len(own) or not own.is_floating_point():
            raise InputError(
                f"{name} is {own.dtype} of the shape {tuple(own.shape)}; expected the scores of a "
                "critic, (n,) in floating point, at least one."
            )


def _scored(critic: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One score for each pair, (n,)."""
    scores = critic(x, y)
    if not isinstance(scores, Tensor) or scores.numel() != len(x):
        said = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"the critic answers {said} for {len(x)} pairs; expected one score for each, (n,)."
        )
    return scores.reshape(-1)


def _held_out(critic: nn.Module, x: Tensor, y: Tensor, trace: tuple[float, ...]) -> Estimate:
    """V, and the standard error of its linearisation: each sample counts as x, as y, and as pair."""
    n = len(x)
    together = _scored(critic, x, y).double()
    shifts = range(1, min(PARTNERS, n - 1) + 1)
    apart = torch.stack([_scored(critic, x, y.roll(-s, 0)) for s in shifts]).double()
    log_mean = apart.logsumexp((0, 1)) - math.log(apart.numel())
    ratio = (apart - log_mean).exp()
    as_y = torch.stack([row.roll(s, 0) for s, row in zip(shifts, ratio, strict=True)])
    terms = together - log_mean - (ratio.mean(0) - 1) - (as_y.mean(0) - 1)
    return mean_estimate(terms, trace)
