"""Gradients through rejection samplers (RSVI): gamma, beta, Dirichlet, Student.

    z = h(e, theta) of noise e that the sampler accepted; e is a constant from then on

    grad E f(z) = E[ f'(z) dh/dtheta ]                          the pathwise part
                + E[ f(z) d/dtheta ln( q(h) / r(h) ) ]          the correction

Gamma of shape a >= 1 and rate 1, after Marsaglia and Tsang, e from a standard normal:

    b = a - 1/3,  c = 1 / sqrt(9 b),  v = 1 + c e,  h = b v^3
    dh/da     = v^3 - 13.5 e b v^2 c^3
    d ln r/da = -0.5 / b + 9 e c^3 / v                          (r: density of the proposal at h)
    d ln q/da = ln h + (a - 1) (dh/da) / h - dh/da - digamma(a)
    correction = f (d ln q/da - d ln r/da)

Any gamma sampler serves: e = sqrt(9 a - 3) ( (z / b)^(1/3) - 1 ) is recovered from its output.
Shapes are raised by B first: z = z' prod_i u_i^(1 / (a + i - 1)) of z' from shape a + B, which makes
the correction small and shapes below 1 possible. Samples of small shapes are smaller than any number:
all is computed in double precision and by ln z, which has shares where every z would be 0.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime._core.seeds import check_generator

LEAST, MOST = 1e-30, 1e30
"""The shapes between which samples and gradients are finite in double precision."""


class Draw(NamedTuple):
    """A sample and what its gradient needs.

    `surrogate` (below) makes a loss of them. Both are differentiable in the parameters.

    Attributes:
        sample: z, with the pathwise gradient.
        log_ratio: ln(q / r) of the accepted noise, summed over what belongs to one sample. Its
            value means nothing, its gradient is the correction.
    """

    sample: Tensor
    log_ratio: Tensor


def surrogate(values: Tensor, draw: Draw) -> Tensor:
    """Values f(z) whose gradient is an unbiased one of E f(z): both parts.

    Args:
        values: f(z) of `draw.sample`, of the shape of `draw.log_ratio`.
        draw: the samples.

    Raises:
        InputError: for values of another shape.

    Example:
        >>> shape = torch.full((20_000,), 2.0, dtype=torch.float64, requires_grad=True)
        >>> draw = gamma(shape, generator=torch.Generator().manual_seed(0))
        >>> surrogate((draw.sample - 3) ** 2, draw).sum().backward()
        >>> round(float(shape.grad.mean()))  # d/da E (z - 3)^2 = 2 a - 5
        -1

    Reference: Naesseth et al., Reparameterization Gradients through Acceptance-Rejection Sampling
        Algorithms, AISTATS 2017.
    """
    check_tensors(values=values)
    if values.shape != draw.log_ratio.shape:
        raise InputError(
            f"values have the shape {tuple(values.shape)}; expected {tuple(draw.log_ratio.shape)}, "
            "one for each sample"
        )
    return values + values.detach() * (draw.log_ratio - draw.log_ratio.detach())


def gamma(shape: Tensor, *, generator: torch.Generator, raised: int = 1) -> Draw:
    """Samples of Gamma(shape, 1); divide by a rate.

    Args:
        shape: any shape, from 1e-30 to 1e30.
        generator: of the samples.
        raised: B, 1; more shrinks the correction. 0 needs shapes of at least 1.

    Returns:
        Samples above 0, the smallest normal number in place of smaller ones, as in
        `torch.distributions`; these have no gradient, which matters to a function of ln z alone.
        Shapes below 0.1 in float32, and below 0.02 in float64, have more than one such in ten
        thousand, or in a million. Half precision is answered in float32.

    Raises:
        InputError: for shapes that are not positive or not finite, or below 1 where B is 0.
        OptionError: for a negative B.

    Example:
        >>> gamma(torch.ones(3, 2), generator=torch.Generator().manual_seed(0)).log_ratio.shape
        torch.Size([3, 2])

    Reference: Naesseth et al., AISTATS 2017; Marsaglia, Tsang, A Simple Method for Generating Gamma
        Variables, 2000.
    """
    log_sample, log_ratio = _log_gamma(shape, "shape", generator, raised)
    return Draw(_from_log(log_sample, log_ratio.dtype), log_ratio)


def beta(first: Tensor, second: Tensor, *, generator: torch.Generator, raised: int = 1) -> Draw:
    """Samples of Beta(first, second), as a share of two gammas. Options as `gamma`.

    A share within rounding of 0 or 1 is 0 or 1.

    Example:
        >>> draw = beta(torch.ones(4), torch.ones(4), generator=torch.Generator().manual_seed(0))
        >>> bool(((draw.sample > 0) & (draw.sample < 1)).all())
        True
    """
    check_tensors(first=first, second=second)
    if first.shape != second.shape:
        raise InputError(
            f"first is of shape {tuple(first.shape)}, second of {tuple(second.shape)}; expected one "
            "shape: torch.broadcast_tensors(first, second)"
        )
    both = dirichlet(torch.stack([first, second], -1), generator=generator, raised=raised)
    return Draw(both.sample[..., 0], both.log_ratio)


def dirichlet(concentration: Tensor, *, generator: torch.Generator, raised: int = 1) -> Draw:
    """Samples of Dirichlet(concentration): gammas by their sum. Options as `gamma`.

    Args:
        concentration: (*batch, k), positive.
        generator: of the samples.
        raised: B.

    Example:
        >>> draw = dirichlet(torch.ones(4, 3), generator=torch.Generator().manual_seed(0))
        >>> draw.sample.sum(-1), draw.log_ratio.shape
        (tensor([1.0000, 1.0000, 1.0000, 1.0000]), torch.Size([4]))
        >>> tiny = torch.full((2, 3), 1e-8)
        >>> dirichlet(tiny, generator=torch.Generator().manual_seed(0)).sample.sum(-1)
        tensor([1., 1.])
    """
    check_tensors(concentration=concentration)
    if not concentration.dim() or not concentration.shape[-1]:
        raise InputError(
            f"concentration is of shape {tuple(concentration.shape)}; expected (..., k)"
        )
    log_sample, log_ratio = _log_gamma(concentration, "concentration", generator, raised)
    return Draw(log_sample.softmax(-1).to(log_ratio.dtype), log_ratio.sum(-1))


def student(freedom: Tensor, *, generator: torch.Generator, raised: int = 1) -> Draw:
    """Samples of Student's t: normal / sqrt( gamma(freedom / 2) / (freedom / 2) ). As `gamma`.

    Few degrees of freedom make samples beyond any number: the largest one stands for those.

    Example:
        >>> student(torch.full((3,), 5.0), generator=torch.Generator().manual_seed(0)).sample.shape
        torch.Size([3])
    """
    check_tensors(freedom=freedom)
    log_sample, log_ratio = _log_gamma(freedom / 2, "freedom / 2", generator, raised)
    kind = log_ratio.dtype
    noise = _drawn(torch.randn, freedom, kind, generator)
    log_size = 0.5 * ((freedom.double() / 2).log() - log_sample) + noise.abs().double().log()
    return Draw(noise.sign() * _from_log(log_size, kind), log_ratio)


def _log_gamma(
    shape: Tensor, name: str, generator: torch.Generator, raised: int
) -> tuple[Tensor, Tensor]:
    """ln z in float64, and ln(q / r) in the type of the samples."""
    whole(0, raised=raised)
    _check_shape(shape, name, least=0.0 if raised else 1.0)
    drawn = at_least_single(shape)
    noise = accepted_noise((drawn + raised).detach(), generator)
    exact = shape.double()
    sample, log_ratio = _of_noise(exact + raised, noise.double())
    log_sample = sample.log()
    for i in range(raised):
        u = _drawn(torch.rand, shape, drawn.dtype, generator)
        # 1 - u is in (0, 1], so that its logarithm is finite
        log_sample = log_sample + (1 - u).double().log() / (exact + i)
    return log_sample, log_ratio.to(drawn.dtype)


def _drawn(
    draw: Callable[..., Tensor], like: Tensor, kind: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Numbers in the shape of a tensor, drawn where the generator is and moved to the tensor."""
    check_generator(generator)
    drawn = draw(like.shape, generator=generator, dtype=kind, device=generator.device)
    return drawn.to(like.device)


def _from_log(log_value: Tensor, kind: torch.dtype) -> Tensor:
    """exp within the normal numbers of a type, and no gradient beyond them."""
    limits = torch.finfo(kind)
    return log_value.clamp(math.log(limits.tiny), math.log(limits.max)).exp().to(kind)


def accepted_noise(shape: Tensor, generator: torch.Generator) -> Tensor:
    """Noise that the sampler of Marsaglia and Tsang accepts, for shapes of at least 1.

    Raises:
        InputError: for other shapes, of which none or too little would be accepted.

    Example:
        >>> accepted_noise(torch.full((5,), 2.0), torch.Generator().manual_seed(0)).shape
        torch.Size([5])
    """
    _check_shape(shape, "shape", least=1.0)
    shape = at_least_single(shape.detach())
    b = shape.double() - 1 / 3  # in single precision v has no digits left for large shapes
    c = (9 * b).rsqrt()
    noise, open_ = torch.zeros_like(shape), torch.ones_like(shape, dtype=torch.bool)
    while open_.any():  # each round accepts more than 95 %
        e = _drawn(torch.randn, shape, shape.dtype, generator)
        u = _drawn(torch.rand, shape, shape.dtype, generator)
        v = (1 + c * e) ** 3
        within = u.double().log() < 0.5 * e.double() ** 2 + b * (1 - v + v.clamp(min=1e-30).log())
        now = open_ & (v > 0) & within
        noise, open_ = torch.where(now, e, noise), open_ & ~now
    return noise


def gamma_from_noise(shape: Tensor, noise: Tensor) -> Draw:
    """h and ln(q / r) of accepted noise; shapes of at least 1.

        ln q = (a - 1) ln h - h - ln Gamma(a),   ln r = ln s(e) - ln |dh/de|,   dh/de = 3 b c v^2

    Raises:
        InputError: for shapes below 1, or noise that is never accepted: 1 + c e is not above 0.

    Example:
        >>> gamma_from_noise(torch.tensor(4 / 3), torch.tensor(0.0)).sample
        tensor(1.0000)
    """
    _check_shape(shape, "shape", least=1.0)
    _check_together(shape, noise, "noise")
    shape, noise = at_least_single(shape), at_least_single(noise)
    v = 1 + (9 * shape.detach() - 3).rsqrt() * noise.detach()
    if not bool(((v > 0) & (v**3).isfinite()).all()):
        raise InputError("noise holds numbers that the sampler never accepts; see accepted_noise")
    return _of_noise(shape, noise)


def _of_noise(shape: Tensor, noise: Tensor) -> Draw:
    b = shape - 1 / 3
    c = (9 * b).rsqrt()
    v = 1 + c * noise
    sample = b * v**3
    log_q = (shape - 1) * sample.log() - sample - shape.lgamma()
    log_r = -0.5 * noise**2 - (3 * b * c * v**2).log() - 0.5 * math.log(2 * math.pi)
    return Draw(sample, log_q - log_r)


def noise_of_gamma(sample: Tensor, shape: Tensor) -> Tensor:
    """The noise that the output of any sampler of Gamma(shape >= 1, 1) stands for.

    Raises:
        InputError: for shapes below 1, or samples that are below 0 or not finite.

    Example:
        >>> noise_of_gamma(torch.tensor(5.0), torch.tensor(5 + 1 / 3))
        tensor(0.)
    """
    _check_shape(shape, "shape", least=1.0)
    _check_together(shape, sample, "sample")
    if not bool(((sample >= 0) & sample.isfinite()).all()):
        raise InputError("sample holds numbers below 0 or not finite; no gamma has those")
    kind = torch.promote_types(at_least_single(sample).dtype, at_least_single(shape).dtype)
    exact = shape.double()  # a root near 1 less 1
    noise = (9 * exact - 3).sqrt() * ((sample.double() / (exact - 1 / 3)).pow(1 / 3) - 1)
    return noise.to(kind)


def _check_together(shape: Tensor, other: Tensor, name: str) -> None:
    check_tensors(**{name: other})
    pairs = zip(reversed(shape.shape), reversed(other.shape), strict=False)
    if other.is_complex() or not all(a == b or 1 in (a, b) for a, b in pairs):
        raise InputError(
            f"{name} is {other.dtype} {tuple(other.shape)} and shape {tuple(shape.shape)}; expected "
            "real numbers that broadcast: one for each."
        )


def _check_shape(shape: Tensor, name: str, *, least: float) -> None:
    check_tensors(**{name: shape})
    if shape.is_complex():
        raise InputError(f"{name} is {shape.dtype}; expected real numbers.")
    values = at_least_single(shape.detach())
    good = (values >= max(least, LEAST)) & (values <= MOST)
    if not shape.is_floating_point() or not good.all():
        wrong = "integers" if not shape.is_floating_point() else float(values[~good].flatten()[0])
        raise InputError(
            f"{name} holds {wrong}; expected finite numbers "
            f"{f'of at least {least}, or raised of at least 1' if least else 'above 0'}, within "
            f"{LEAST:g} and {MOST:g}"
        )
