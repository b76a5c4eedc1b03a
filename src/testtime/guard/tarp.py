"""TARP: is a posterior sampler right? A test by expected coverage (Lemos et al., ICML 2023).

    given: true parameters θ*_i, samples θ_si from q(θ | x_i), reference points r_i
    scale all by the range of θ* in each dimension
    f_i ← share of samples s with d(θ_si, r_i) < d(θ*_i, r_i)
    ECP(level) ← share of i with f_i < level               # level for every level, if q is exact
    band ← standard deviation of ECP over bootstraps of the simulations i

If q is the posterior, f is uniform, whatever the references; where parameters are discrete and
distances equal, f is too low, and only the p-value is right. The reverse needs references that may
depend on x: with references that do not, a sampler that answers the prior passes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.errors import InputError, OptionError
from testtime._core.options import whole
from testtime._core.seeds import generator
from testtime.guard.monitor import finite


@dataclass(frozen=True)
class Coverage:
    """Expected coverage of a sampler at all credibility levels.

    Attributes:
        levels: (bins + 1,) from 0 to 1.
        coverage: (bins + 1,) ECP; equal to the levels if the sampler is exact.
        band: (bins + 1,) standard deviation of the coverage over bootstraps.
        p_value: of a Kolmogorov-Smirnov test that the ranks f are uniform, samples as far away as the
            truth in a random order, so that it holds for parameters of whole numbers as well.
        deviation: largest |coverage - level|.
        area: mean of coverage - level on the upper half of the levels less that on the lower half:
            negative for samples that are too narrow (over-confident), positive for too wide ones.
        ranks: (n,) f of each simulation.
    """

    levels: Tensor
    coverage: Tensor
    band: Tensor
    p_value: float
    deviation: float
    area: float
    ranks: Tensor


def tarp(
    samples: Float[Tensor, "samples n parameters"],
    truth: Float[Tensor, "n parameters"],
    *,
    references: Float[Tensor, "n parameters"] | None = None,
    metric: str = "euclidean",
    bins: int | None = None,
    bootstrap: int = 100,
    seed: int = 0,
) -> Coverage:
    """Tests a posterior sampler from its samples alone.

    Args:
        samples: (S, n, D) from q(θ | x_i).
        truth: (n, D) parameters that x_i was simulated with.
        references: (n, D) in the units of the parameters; they may depend on x_i, not on θ*_i. None:
            uniform in the box that holds all of truth, as in the code. That box depends on θ*, so with
            few simulations an exact sampler gets a p-value below 0.05 too often: with 10 parameters 30 %
            of the time for 10 simulations, 15 % for 20, and at most 7 % from 50 on. For fewer, give
            references drawn without a look at truth, e.g. from the prior; then the p-value is right.
        metric: "euclidean" or "manhattan".
        bins: of the histogram; n // 10, at least 2 (code).
        bootstrap: rounds; 100 (code), each with fresh draws of one generator.
        seed: of references and bootstrap.

    Raises:
        InputError: shapes that do not fit, NaN, or fewer than two simulations.
        OptionError: an option is out of its range.

    Example:
        >>> chance = torch.Generator().manual_seed(1)
        >>> mean, truth, draws = torch.randn(102, 400, 2, generator=chance).split([1, 1, 100])
        >>> exact, narrow = (tarp(mean + scale * draws, (mean + truth)[0]) for scale in (1, 0.5))
        >>> exact.p_value > 1e-6 > narrow.p_value, narrow.area < 0
        (True, True)

    Reference: Lemos, Coogan, Hezaveh, Perreault-Levasseur, Sampling-Based Accuracy Testing of
    Posterior Estimators for General Inference, ICML 2023.
    """
    samples, truth = finite("samples", samples), finite("truth", truth)
    if samples.dim() != 3 or samples.shape[1:] != truth.shape or len(truth) < 2:
        raise InputError(
            f"samples have the shape {tuple(samples.shape)} and truth {tuple(truth.shape)}; expected "
            "(samples, n, parameters) and (n, parameters), with n at least 2."
        )
    if metric not in ("euclidean", "manhattan"):
        raise OptionError(f"metric is {metric!r}; expected 'euclidean' or 'manhattan'.")
    count, chance = len(truth), generator(seed, "tarp", "references")
    bins = max(count // 10, 2) if bins is None else bins
    whole(2, bins=bins, bootstrap=bootstrap)
    low, high = truth.amin(0), truth.amax(0)
    span = torch.where(high > low, high - low, 1)
    if references is None:
        at = torch.rand(truth.shape, generator=chance, dtype=torch.float64, device="cpu")
    else:
        at = finite("references", references)
        if at.shape != truth.shape:
            raise InputError(
                f"references have the shape {tuple(at.shape)}; expected {tuple(truth.shape)}."
            )
        at = (at - low) / span
    order = 2 if metric == "euclidean" else 1
    far = torch.linalg.vector_norm((truth - low) / span - at, order, dim=-1)
    near = torch.linalg.vector_norm((samples - low) / span - at, order, dim=-1)
    if not bool(span.isfinite().all() & far.isfinite().all()):
        raise InputError(
            "the range of truth, or its distance from references, overflows; scale all."
        )
    below, equal = (near < far).sum(0), (near == far).sum(0)
    # in whole numbers: a rank on a level is not below it, which rounding may say
    place = (below * bins // len(samples)).clamp(max=bins - 1)
    coverage = _coverage(place, bins)
    again = torch.randint(count, (bootstrap, count), generator=chance, device="cpu")
    band = torch.stack([_coverage(place[index], bins) for index in again]).std(0)
    levels = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu")
    bent = coverage - levels
    blur = torch.rand(count, generator=chance, dtype=torch.float64, device="cpu")
    return Coverage(
        levels=levels, coverage=coverage, band=band, ranks=below.double() / len(samples),
        p_value=uniform_p_value((below + blur * (equal + 1)) / (len(samples) + 1)),
        deviation=float(bent.abs().max()),
        area=float(bent[levels > 0.5].mean() - bent[levels < 0.5].mean()),
    )  # fmt: skip


def uniform_p_value(values: Float[Tensor, " n"]) -> float:
    """p-value of the Kolmogorov-Smirnov test that values are uniform on [0, 1].

    The limiting distribution with Stephens' correction, good to about 0.01 from five values on.

    Raises:
        InputError: no values, NaN, or values outside of [0, 1].

    Example:
        >>> uniform_p_value(torch.full((20,), 0.5)) < 0.001
        True
    """
    values = finite("values", values)
    if values.dim() != 1 or not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError(
            f"values have the shape {tuple(values.shape)} and lie between {float(values.min()):.4g} "
            f"and {float(values.max()):.4g}; expected (n,) within 0 and 1."
        )
    count = len(values)
    ranked = values.double().sort().values
    steps = torch.arange(count + 1, dtype=torch.float64, device="cpu") / count
    distance = float(torch.maximum(steps[1:] - ranked, ranked - steps[:-1]).max())
    x = distance * (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count))
    if x < 0.3:  # the series converges too slowly, and the p-value is 1 to five digits
        return 1.0
    series = sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(max(2 * series, 0.0), 1.0)


def _coverage(place: Tensor, bins: int) -> Tensor:
    """Shares below each level, of the bins in which ranks lie."""
    counts = place.bincount(minlength=bins).cumsum(0)
    return torch.nn.functional.pad(counts.double() / len(place), (1, 0))
