"""Cauchy-Schwarz divergences by kernels: of two conditional laws, and of a joint law from its marginals.

    G(a, b)_ij = exp( -|a_i - b_j|^2 / 2 s^2 )

    D_CS(p(y|x); p(yh|x)) = -2 ln T(G(yh, y)) + ln T(G(y, y)) + ln T(G(yh, yh))
        T(L) = sum_j [ sum_i K_ji L_ji / ( sum_i K_ji )^2 ],   K = G(x, x)

    I(x, z) = ln( sum_ij K_ij Q_ij / N^2 ) + ln( sum K sum Q / N^4 )
              - 2 ln( sum_i (K 1)_i (Q 1)_i / N^3 ),   Q = G(z, z)

    information bottleneck:  D_CS(p(y|x); p(yh|x)) + beta I(x, z) / sqrt( I(x, x) I(z, z) )

Neither assumes a law or bounds anything, and both are differentiable: nothing is detached.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range

Samples = Float[Tensor, "samples dims"]
ENTRIES = 2**22
"""Differences of coordinates that are held at one time."""


def conditional_divergence(
    x: Samples,
    y: Samples,
    predicted: Samples,
    *,
    width: float = 1.0,
    denominator: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """D_CS of p(y|x) and p(predicted|x) in nats: 0 for the same, infinite for what is far apart.

    Standardise the data first, as the kernels have one width. A loss for regression that an outlier
    moves little. The divergence is never below 0; its estimate weighs the samples j by other numbers
    than the samples i and can be, by a little (-0.02 was seen of equal laws and 300 samples).

    Args:
        x: (N, dx).
        y: (N, dy).
        predicted: (N, dy), what a model says of each x.
        width: s of all kernels, 1 (code; the paper names the median distance).
        denominator: "paper" divides by (sum_i K_ji)^2, "code" by sum_i K_ji^2, as the published
            code does.

    Raises:
        InputError: for shapes that do not fit, NaN or infinity.
        OptionError: for a width that is not positive, or another denominator.

    Example:
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> conditional_divergence(x, x, x + 1) > 0.1
        tensor(True)

    Reference: Yu et al., Cauchy-Schwarz Divergence Information Bottleneck for Regression, ICLR 2024.
    """
    _check(x=x, y=y, predicted=predicted)
    if y.shape != predicted.shape:
        raise InputError(
            f"y has the shape {tuple(y.shape)} and predicted {tuple(predicted.shape)}; expected "
            "one shape (N, dy)."
        )
    if denominator not in ("paper", "code"):
        raise OptionError(f"denominator is {denominator!r}; expected 'paper' or 'code'")
    log_k = log_gram(x, x, width=width)
    log_below = 2 * log_k.logsumexp(1) if denominator == "paper" else (2 * log_k).logsumexp(1)

    def log_t(near: Tensor) -> Tensor:
        # in logarithms: kernels of what is far apart are below the smallest number
        return ((log_k + near).logsumexp(1) - log_below).logsumexp(0)

    grams = [
        log_gram(a, b, width=width) for a, b in ((predicted, y), (y, y), (predicted, predicted))
    ]
    return -2 * log_t(grams[0]) + log_t(grams[1]) + log_t(grams[2])


def quadratic_information(x: Samples, z: Samples, *, width: float = 1.0) -> Float[Tensor, ""]:
    """Cauchy-Schwarz quadratic mutual information of x and z in nats: 0 where one is constant.

    Args:
        x: (N, dx).
        z: (N, dz).
        width: s of both kernels.

    Raises:
        InputError: for lengths that differ, NaN or infinity.
        OptionError: for a width that is not positive.

    Example:
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> quadratic_information(x, x) > quadratic_information(x, x.sin().roll(5, 0))
        tensor(True)

    Reference: Yu et al., ICLR 2024; Principe, Information Theoretic Learning, 2010.
    """
    _check(x=x, z=z)
    return _information(log_gram(x, x, width=width), log_gram(z, z, width=width))


def normalised_information(x: Samples, z: Samples, *, width: float = 1.0) -> Float[Tensor, ""]:
    """I(x, z) / sqrt( I(x, x) I(z, z) ): 1 for z = x, 0 where one is constant. As `quadratic_information`.

    1 is no bound: this information obeys no inequality of Cauchy's and Schwarz's, and can be larger
    than both of its own (1.2 was seen of three samples).

    Example:
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> normalised_information(x, x), normalised_information(x, torch.ones(20, 1))
        (tensor(1.), tensor(0.))
    """
    _check(x=x, z=z)
    k, q = (log_gram(v, v, width=width) for v in (x, z))
    of_x, of_z = _information(k, k), _information(q, q)
    within = (of_x > 0) & (of_z > 0)
    x_root, z_root = (torch.where(within, own, 1).sqrt() for own in (of_x, of_z))
    return torch.where(within, _information(k, q) / (x_root * z_root), 0)


def bottleneck_loss(
    x: Samples,
    y: Samples,
    z: Samples,
    predicted: Samples,
    *,
    beta: float,
    width: float = 1.0,
    denominator: Literal["paper", "code"] = "paper",
) -> Float[Tensor, ""]:
    """The information bottleneck of a regression: fit, plus beta times what z keeps of x.

    Args:
        x: (N, dx), standardised.
        y: (N, dy), standardised.
        z: (N, dz), what an encoder makes of x.
        predicted: (N, dy), what a decoder makes of z.
        beta: 1e-4 to 1 in the paper, chosen on validation data.
        width: s of all kernels.
        denominator: as `conditional_divergence`.

    Raises:
        InputError: as `conditional_divergence`.
        OptionError: as `conditional_divergence`, and for a negative beta.

    Example:
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> float(bottleneck_loss(x, x, x, x, beta=0.5).round(decimals=3))
        0.5

    Reference: Yu et al., ICLR 2024.
    """
    in_range(0, beta=beta)
    fit = conditional_divergence(x, y, predicted, width=width, denominator=denominator)
    return fit + beta * normalised_information(x, z, width=width) if beta else fit


def gram(a: Samples, b: Samples, *, width: float) -> Float[Tensor, "samples others"]:
    """Gaussian kernels of all pairs, not normalised. Of a sample that is NaN they are NaN.

    Raises:
        InputError: for what is not (N, d) and (M, d).
        OptionError: for a width that is not positive.

    Example:
        >>> gram(torch.zeros(1, 1), torch.ones(1, 1), width=1.0)
        tensor([[0.6065]])
    """
    return log_gram(a, b, width=width).exp()


def log_gram(a: Samples, b: Samples, *, width: float) -> Float[Tensor, "samples others"]:
    """Logarithms of the kernels: -|a_i - b_j|^2 / 2 s^2. Otherwise as `gram`.

    Example:
        >>> log_gram(torch.zeros(1, 1), torch.ones(1, 1), width=1.0)
        tensor([[-0.5000]])
    """
    in_range(0, width=width)
    check_tensors(a=a, b=b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.is_complex() or b.is_complex():
        raise InputError(
            f"the shapes are {tuple(a.shape)} of {a.dtype} and {tuple(b.shape)} of {b.dtype}; "
            "expected real (N, d) and (M, d)"
        )
    kind = torch.promote_types(at_least_single(a).dtype, at_least_single(b).dtype)
    a, b = a.to(kind), b.to(kind)
    limits, below = torch.finfo(kind), 2 * width * width
    if not limits.tiny <= below <= limits.max:
        raise OptionError(
            f"width is {width}; expected a positive number whose square is one of {limits.dtype}"
        )
    if len(a) * len(b) * a.shape[1] > ENTRIES:  # differences that nobody wants to hold, or keep
        apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    else:
        apart = (a[:, None] - b[None]).square().sum(-1)
    return -apart / below


def _information(log_k: Tensor, log_q: Tensor) -> Tensor:
    # With J, M and C the three means in the logarithms, J M - C^2 = M H - c^2, where H is the mean
    # product of both kernels centred in rows and columns and c the covariance of their row means.
    # Nearly equal samples have kernels near 1: J, M and C lose what tells them apart, 1 - K keeps it.
    rows_k, rows_q = log_k.exp().mean(1), log_q.exp().mean(1)
    marginal, cross = rows_k.mean() * rows_q.mean(), (rows_k * rows_q).mean()
    (far_k, off_k), (far_q, off_q) = (_centred(-log.expm1()) for log in (log_k, log_q))
    above = marginal * (far_k * far_q).mean() - (off_k * off_q).mean().square()
    return (above / cross.square()).log1p()


def _centred(far: Tensor) -> tuple[Tensor, Tensor]:
    off = far.mean(1) - far.mean()
    return far - off[:, None] - off[None] - far.mean(), off


def _check(**samples: Tensor) -> None:
    check_tensors(**samples)
    lengths = {name: len(v) if v.ndim == 2 else None for name, v in samples.items()}
    if None in lengths.values() or len(set(lengths.values())) != 1 or 0 in lengths.values():
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in samples.items())
        raise InputError(f"the shapes are {shapes}; expected (N, d) with one N for all")
    for name, v in samples.items():
        if v.is_complex() or not v.isfinite().all():
            raise InputError(f"{name} holds NaN, infinity or complex numbers; expected finite ones")
