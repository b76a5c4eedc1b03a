"""MINDE: mutual information neural diffusion estimation.

    z_t = m(t) z_0 + s(t) eps,   m = e^(-B/2),  s^2 = 1 - e^(-B),  B(t) = b0 t + (b1 - b0) t^2 / 2
    one network eps(z, tau) predicts the noise; tau has a time for each variable:
        t diffused,  0 given (its clean value is fed),  1 marginalised (zeros are fed)
    it is trained as a correction: eps = s z + network, s z being right for a standard normal law

for each step:
    a mask is drawn; kind "c": x alone, or x given y; kind "j": both (twice as often), x|y, y|x
    t ~ r(t) / Z,   r = beta / s^2 held at r(0.001) below 0.001,   Z = integral of r;
        or, without importance sampling, t ~ U(0.00001, 1)
    minimise w sum_k (eps_k - noise_k)^2 / n over the n diffused coordinates, w = 1 + (D - n) / D
value, with running means of the weights, on held-out samples:
    "c"   Z/2 mean | eps_x - eps_x|y |^2
    "j"   Z/2 mean | eps_xy - [eps_x|y, eps_y|x] |^2
or, "outside", with e(S) = Z/2 mean | eps_S - s z_t |^2, a divergence from a standard normal law:
    "c"   e(x|y) - e(x)
    "j"   e(x|y) + e(y|x) - e(xy)
without importance sampling Z |eps - eps'|^2 is beta(t) |eps - eps'|^2 / s^2, as a score is -eps / s
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import whole
from testtime._core.seeds import check_generator, generator
from testtime.measures.information.estimate import (
    Estimate,
    constant,
    mean_estimate,
    paired,
    standardised,
)
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
from testtime.measures.information.variational import LEAST, finite, split

Noise = Callable[[Tensor, Tensor], Tensor]
"""eps(z (n, D), tau (n, 2)) -> (n, D)."""
Kind = Literal["c", "j"]
Difference = Literal["inside", "outside"]


def minde(
    x: Tensor,
    y: Tensor,
    *,
    kind: Kind = "c",
    difference: Difference = "inside",
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
    """Mutual information of x and y in nats by the scores of a diffusion.

    A quarter of the samples is held out from training, and the value is that on them. It is no
    bound. A variable that is constant tells nothing: 0.

    Args:
        x: (n, dx) or (n,); coordinates are standardised. Where tails are heavy, give the
            `normal_scores` of both variables.
        y: (n, dy) or (n,), the partner of each.
        kind: "c" diffuses x only, "j" both.
        difference: of scores, "inside" the square, and never negative; "outside" it, of divergences.
        importance: times drawn by how much they count, as in the published runs; False: uniform
            ones, in training and for the value, whose standard error is several times as large, as
            early times are rare and count much.
        width: of the network; the code has 64 up to ten coordinates in all, 128 up to 50, then 256.
        steps: 1500, ours for small problems; the code makes 300 to 500 epochs of 100,000 samples.
        batch_size: 256 (code; 128 up to five coordinates).
        lr: of Adam, 2e-3 (code; 1e-3 up to five coordinates), falling to 0, which is ours.
        decay: of the running mean of the weights, ours for few steps; 0.999 in the code.
        draws: of noise and time for every held-out sample, 10 (code).
        seed: of the split, the weights and all noise.
        trace: whether the loss of each step is kept.

    Raises:
        InputError: for NaN, lengths that differ, or fewer than 32 samples.
        OptionError: for an option out of its range.

    Example:
        >>> x = torch.randn(400, generator=torch.Generator().manual_seed(0))
        >>> minde(x, x, steps=3).value >= 0
        True

    Reference: Franzese, Bounoua, Michiardi, MINDE: Mutual Information Neural Diffusion Estimation,
        ICLR 2024.
    """
    options = Training(
        importance=importance, width=width, steps=steps, batch_size=batch_size, lr=lr,
        decay=decay, draws=draws, trace=trace,
    )  # fmt: skip
    _check_kind(kind, difference)
    x, y = paired(x, y, least=LEAST)
    if constant(x) or constant(y):
        return Estimate(0.0, 0.0)
    random = generator(seed, "minde")
    known, held = split(standardised(x), standardised(y), random)
    d = x.shape[1]

    def loss(network: Noise, index: list[Tensor]) -> Tensor:
        a, b = (own[index[0]] for own in known)
        return _loss(around_normal(network, d), a, b, kind, random, importance)

    network, values = options.fit(known[:1], loss, dims=d + y.shape[1], random=random)
    terms = diffusion_information(
        around_normal(network, d), held[0], held[1],
        kind=kind, difference=difference, importance=importance, draws=draws, generator=random,
    )  # fmt: skip
    return finite(mean_estimate(terms, values))


def diffusion_information(
    noise: Noise,
    x: Tensor,
    y: Tensor,
    *,
    kind: Kind,
    difference: Difference = "inside",
    importance: bool = True,
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """What each sample says of the mutual information, of a function that predicts noise.

    Args:
        noise: of z (n, D) and tau (n, 2).
        x: (n, dx), standardised.
        y: (n, dy), standardised.
        kind: "c" or "j".
        difference: "inside" or "outside", as of `minde`.
        importance: whether times are drawn by how much they count, as of `minde`.
        draws: of noise and time for every sample.
        generator: of these, on the CPU.

    Raises:
        InputError: for samples that are no finite (n, d) in floating point, or do not go together.
        OptionError: for another kind or difference, or no draws.

    Example:
        >>> terms = diffusion_information(
        ...     lambda z, tau: tau.sum(1, keepdim=True) * z, torch.ones(4, 1), torch.ones(4, 1),
        ...     kind="c", draws=2, generator=torch.Generator().manual_seed(0))
        >>> terms.shape
        torch.Size([4])

    Reference: Franzese, Bounoua, Michiardi, ICLR 2024.
    """
    _check_kind(kind, difference)
    whole(1, draws=draws)
    check_generator(generator)
    check_tensors(x=x, y=y)
    for name, own in (("x", x), ("y", y)):
        check_samples(own, name)
    if x.shape[:1] != y.shape[:1] or x.dtype != y.dtype or x.device != y.device:
        raise InputError(
            f"x is {tuple(x.shape)} of {x.dtype} on {x.device} and y {tuple(y.shape)} of {y.dtype} on "
            f"{y.device}; expected pairs (x_i, y_i): as many of each, of one type on one device."
        )
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    d = x.shape[1]
    with torch.no_grad(), single():
        for _ in range(draws):
            drawn = sampled_times(len(x), generator, importance=importance)
            weight = time_weight(drawn, importance=importance).to(x.device)
            t = drawn.to(x)
            both = torch.cat([x, y], 1)
            z = diffused(both, normal_like(both, generator), t)
            given = noise(*_fed(both, z, t, d, "x|y"))[:, :d]
            if kind == "c":
                alone = noise(*_fed(both, z, t, d, "x"))[:, :d]
            else:
                given = torch.cat([given, noise(*_fed(both, z, t, d, "y|x"))[:, d:]], 1)
                alone = noise(*_fed(both, z, t, d, "xy"))
            if difference == "inside":
                gap = (alone - given).double().square()
            else:
                normal = signal_and_noise(t)[1][:, None] * z[:, : alone.shape[1]]
                gap = (given - normal).double().square() - (alone - normal).double().square()
            total += weight * gap.sum(1)
    return total / 2 / draws


def around_normal(network: Noise, d: int) -> Noise:
    """A network's answer as a correction of s z, what predicts the noise of standard normal variables.

    The code's network predicts the noise itself. Where it is nearly all that is left of a sample this is
    the identity, which normalised layers learn slowly, and what they miss is in the value. Of twenty and
    twenty Gaussian coordinates and 3 nats, kind "c" then found 1.3 and "j" 14 to 17, with 5000 samples
    and the default steps; as a correction they find 2.5 to 2.7 and 2.0 to 2.1.

    Args:
        network: of z (n, D) and tau (n, 2).
        d: coordinates of the first variable.

    Example:
        >>> noise = around_normal(lambda z, tau: 0 * z, 1)
        >>> noise(torch.ones(1, 2), torch.tensor([[1.0, 0.0]])).round(decimals=4)
        tensor([[1., 0.]])
    """

    def noise(z: Tensor, tau: Tensor) -> Tensor:
        s = signal_and_noise(tau)[1]
        return network(z, tau) + torch.cat([s[:, :1] * z[:, :d], s[:, 1:] * z[:, d:]], 1)

    return noise


def _check_kind(kind: Kind, difference: Difference) -> None:
    if kind not in ("c", "j"):
        raise OptionError(f"kind is {kind!r}; expected 'c' or 'j'")
    if difference not in ("inside", "outside"):
        raise OptionError(f"difference is {difference!r}; expected 'inside' or 'outside'")


MASKS = {"c": ("x", "x|y"), "j": ("xy", "xy", "x|y", "y|x")}


def _loss(
    network: Noise, x: Tensor, y: Tensor, kind: Kind, random: torch.Generator, importance: bool
) -> Tensor:
    masks = MASKS[kind]
    mask = masks[int(torch.randint(len(masks), (), generator=random, device="cpu"))]
    both, d = torch.cat([x, y], 1), x.shape[1]
    t = sampled_times(len(x), random, importance=importance).to(x)
    noise = normal_like(both, random)
    told = network(*_fed(both, diffused(both, noise, t), t, d, mask))
    part = {"x": slice(d), "x|y": slice(d), "y|x": slice(d, None), "xy": slice(None)}[mask]
    error = (told - noise)[:, part]
    dims, own = both.shape[1], error.shape[1]
    return (1 + (dims - own) / dims) * error.square().mean(1).mean()


def _fed(both: Tensor, z: Tensor, t: Tensor, d: int, mask: str) -> tuple[Tensor, Tensor]:
    """What the network is given: diffused, given or missing values, and the times that say so."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    if mask == "x":
        return torch.cat([z[:, :d], torch.zeros_like(z[:, d:])], 1), torch.stack([t, one], 1)
    if mask == "x|y":
        return torch.cat([z[:, :d], both[:, d:]], 1), torch.stack([t, zero], 1)
    if mask == "y|x":
        return torch.cat([both[:, :d], z[:, d:]], 1), torch.stack([zero, t], 1)
    return z, torch.stack([t, t], 1)
