"""MINDE's entropy and divergence: of one law, or of two, by the noise that diffusions predict.

z_t = m z_0 + s eps and r, Z as in `minde`; one network eps(z, (t, k)), k = 0 for x and 1 for y
training: a law k is drawn for each step, t ~ r / Z, and | eps(z_t, (t, k)) - noise |^2 falls;
          without importance sampling t is uniform, and r stands for Z in what follows
KL(x || y)   Z/2 E_x | eps_0 - eps_1 |^2
H(x)         ln of the scales + (d ln 2 pi + E |x|^2) / 2 - Z/2 E_x | eps_0 - s z_t |^2,
             as s z_t is what the diffusion of a standard normal law predicts
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from testtime._core.arrays import magnitude
from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime._core.seeds import check_generator
from testtime._core.seeds import generator as seeded
from testtime.measures.information.estimate import Estimate, checked, mean_estimate, standardised
from testtime.measures.information.networks import single
from testtime.measures.information.noise import (
    check_samples,
    diffused,
    normal_like,
    sampled_times,
    signal_and_noise,
    time_weight,
)
from testtime.measures.information.noise_network import Training
from testtime.measures.information.variational import HELD_OUT, LEAST, finite

Noise = Callable[[Tensor, Tensor], Tensor]
"""eps(z (n, d), t (n,)) -> (n, d)."""


def minde_entropy(
    x: Tensor,
    *,
    importance: bool = True,
    width: int = 64,
    steps: int = 1500,
    batch_size: int = 256,
    lr: float = 2e-3,
    decay: float = 0.99,
    draws: int = 10,
    seed: int = 0,
    trace: bool = False,
) -> Estimate:
    """Differential entropy of x in nats, which may be negative. Options, uniform times too, as `minde`.

    Few steps leave it too low: what the network has not learned counts as divergence from a normal
    law.

    Raises:
        InputError: for NaN, fewer than 32 samples, or a constant coordinate, which has no density.
        OptionError: for an option out of its range.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> minde_entropy(x, steps=3, trace=True).trace.__len__()
        3

    Reference: Franzese, Bounoua, Michiardi, MINDE, ICLR 2024.
    """
    options = Training(
        importance=importance, width=width, steps=steps, batch_size=batch_size, lr=lr,
        decay=decay, draws=draws, trace=trace,
    )  # fmt: skip
    x = checked(x, "x", least=LEAST)
    unit = magnitude(x.abs().amax(0))
    log_scale = (x / unit).std(0).log() + unit.log()
    if not bool(log_scale.isfinite().all()) or bool((standardised(x) == 0).all(0).any()):
        raise InputError("a coordinate of x is constant, so x has no density; leave it out.")
    random = seeded(seed, "minde entropy")
    known, held = _apart(standardised(x), random)
    noise, values = _trained([known], options, random)
    gap = diffusion_gap(
        noise[0], _of_normal, held, importance=importance, draws=draws, generator=random
    )
    around = (x.shape[1] * math.log(2 * math.pi) + held.double().square().sum(1)) / 2
    return finite(mean_estimate(log_scale.sum() + around - gap, values))


def minde_divergence(
    x: Tensor,
    y: Tensor,
    *,
    importance: bool = True,
    width: int = 64,
    steps: int = 1500,
    batch_size: int = 256,
    lr: float = 2e-3,
    decay: float = 0.99,
    draws: int = 10,
    seed: int = 0,
    trace: bool = False,
) -> Estimate:
    """KL divergence of the law of x from that of y in nats, never negative.

    Options, uniform times too, as `minde`. The standard error is that of the held-out samples, the networks
    given: it says little of other draws, where values of a few hundred samples spread many times as far.
    Of constant coordinates that differ, where the truth is infinite, the value is finite and large.

    Args:
        x: (n, d) or (n,).
        y: (m, d) or (m,), samples of the other law, no partners.

    Raises:
        InputError: for NaN, fewer than 32 samples, or unlike numbers of coordinates.
        OptionError: for an option out of its range.

    Example:
        >>> x = torch.randn(400, generator=torch.Generator().manual_seed(0))
        >>> minde_divergence(x, x + 1, steps=3).value >= 0
        True

    Reference: Franzese, Bounoua, Michiardi, MINDE, ICLR 2024.
    """
    options = Training(
        importance=importance, width=width, steps=steps, batch_size=batch_size, lr=lr,
        decay=decay, draws=draws, trace=trace,
    )  # fmt: skip
    x, y = checked(x, "x", least=LEAST), checked(y, "y", least=LEAST)
    if x.shape[1] != y.shape[1] or x.device != y.device:
        raise InputError(
            f"x has {x.shape[1]} coordinates on {x.device} and y {y.shape[1]} on {y.device}; "
            "expected the same coordinates of both."
        )
    random = seeded(seed, "minde divergence")
    both = standardised(torch.cat([x, y]))
    (known, held), (other, _) = (_apart(own, random) for own in (both[: len(x)], both[len(x) :]))
    noise, values = _trained([known, other], options, random)
    gap = diffusion_gap(
        noise[0], noise[1], held, importance=importance, draws=draws, generator=random
    )
    return finite(mean_estimate(gap, values))


def diffusion_gap(
    one: Noise,
    other: Noise,
    x: Tensor,
    *,
    importance: bool = True,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """What each sample says of how far two diffusions' predictions are apart: (n,), in nats.

    Args:
        one: predicts noise, of the law of x.
        other: alike, of another law.
        x: (n, d), in the units of both.
        importance: whether times are drawn by how much they count, as of `minde`.
        draws: of noise and time for every sample.
        generator: of these, on the CPU.

    Raises:
        InputError: for samples that are no finite (n, d) in floating point.
        OptionError: without draws.

    Example:
        >>> zero = lambda z, t: 0 * z
        >>> diffusion_gap(zero, zero, torch.ones(3, 1), draws=2, generator=torch.Generator())
        tensor([0., 0., 0.], dtype=torch.float64)
    """
    whole(1, draws=draws)
    check_generator(generator)
    check_samples(x, "x")
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with torch.no_grad(), single():
        for _ in range(draws):
            drawn = sampled_times(len(x), generator, importance=importance)
            weight = time_weight(drawn, importance=importance).to(x.device)
            t = drawn.to(x)
            z = diffused(x, normal_like(x, generator), t)
            total += weight * (one(z, t) - other(z, t)).double().square().sum(1)
    return total / 2 / draws


def _of_normal(z: Tensor, t: Tensor) -> Tensor:
    return signal_and_noise(t)[1][:, None] * z


def _apart(x: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training and held-out samples."""
    order = torch.randperm(len(x), generator=random, device="cpu").to(x.device)
    held = int(HELD_OUT * len(x))
    return x[order[held:]], x[order[:held]]


def _trained(
    laws: Sequence[Tensor], options: Training, random: torch.Generator
) -> tuple[list[Noise], tuple[float, ...]]:
    """What predicts the noise of each law, and the loss of each step."""

    def loss(network: Noise, index: list[Tensor]) -> Tensor:
        k = int(torch.randint(len(laws), (), generator=random, device="cpu"))
        x = laws[k][index[k]]
        t = sampled_times(len(x), random, importance=options.importance).to(x)
        noise = normal_like(x, random)
        return (network(diffused(x, noise, t), _told(t, k)) - noise).square().mean()

    network, values = options.fit(laws, loss, dims=laws[0].shape[1], random=random)

    def of(k: int) -> Noise:
        return lambda z, t: network(z, _told(t, k))

    return [of(k) for k in range(len(laws))], values


def _told(t: Tensor, k: int) -> Tensor:
    return torch.stack([t, torch.full_like(t, k)], 1)
