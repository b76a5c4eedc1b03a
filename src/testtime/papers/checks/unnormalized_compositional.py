"""MECO's claim: a tracked partition function does what a batch's cannot, where NCE is flat.

That MECO beats a well-tuned stochastic NCE is not asked: in one dimension it need not.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.losses.compositional import (
    compositional_likelihood,
    log_partition,
    moving_average,
    storm,
)
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "The mean of a Gaussian, by quadrature: the likelihood has curvature 1 at the optimum wherever "
    "the data lie, NCE with standard noise less than 0.5 at R = 2 and less than 3 exp(-R^2 / 8) at R = 4, 6, 8. With "
    "data at 16, noise of deviation 16, batches of 8, 400 steps and the best rate of six: the error "
    "of the mean with u as a moving average, and with STORM, is less than 0.3 times that without "
    "memory (mean of five streams)."
)
RATES = (0.02, 0.1, 0.5, 1.0, 5.0, 20.0)
STEPS, STREAMS = 400, 5


@register("check", paper="unnormalized-compositional", name="unnormalized-compositional")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """The mean of a Gaussian, by MECO and NCE."""
    return reproduce(
        "unnormalized-compositional", CLAIM, measure=measure, holds=holds, seeds=seeds,
        on_progress=on_progress,
    )  # fmt: skip


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Curvatures, then errors of the mean."""
    for distance in (2.0, 4.0, 6.0, 8.0):
        yield f"likelihood, curvature at {distance:.0f}", curvature(likelihood, distance)
        yield f"nce, curvature at {distance:.0f}", curvature(contrast, distance)
    for kind in ("no memory", "moving average", "storm"):
        yield (
            f"{kind}, error",
            min(
                fmean(error(kind, rate, seed, stream) for stream in range(STREAMS))
                for rate in RATES
            ),
        )


def _normal(x: Tensor, mean: Tensor | float = 0.0, deviation: float = 1.0) -> Tensor:
    """ln of a Gaussian density."""
    return -((x - mean) / deviation).square() / 2 - math.log(deviation * math.sqrt(2 * math.pi))


def _grid(distance: float) -> Tensor:
    return torch.linspace(-12, distance + 12, 20_001, dtype=torch.double)


def likelihood(mean: Tensor, distance: float) -> Tensor:
    """Expected negative log-likelihood, by quadrature."""
    z = _grid(distance)
    energies = (z - mean).square() / 2
    data = torch.trapezoid(_normal(z, distance).exp() * energies, z)
    width = math.log(float(z[-1] - z[0]))
    return data + log_partition(energies, torch.full_like(z, -width))


def contrast(mean: Tensor, distance: float) -> Tensor:
    """Expected loss of NCE with standard noise, by quadrature."""
    z = _grid(distance)
    constant = torch.tensor(0.5 * math.log(2 * math.pi), dtype=torch.double)
    both = torch.zeros((), dtype=torch.double)
    for law, side in ((_normal(z, distance), 0), (_normal(z), 1)):
        score = -(z - mean).square() / 2 - constant - _normal(z)
        loss = torch.nn.functional.softplus(-score if side == 0 else score)
        both = both + torch.trapezoid(law.exp() * loss, z)
    return both


def curvature(objective: Callable[[Tensor, float], Tensor], distance: float) -> float:
    """Second derivative at the optimum."""
    mean = torch.tensor(distance, dtype=torch.double, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(objective(mean, distance), mean, create_graph=True)
        (second,) = torch.autograd.grad(slope, mean)
    return float(second)


def error(kind: str, rate: float, seed: int, stream: int) -> float:
    """|mean - 16| after the steps; infinite where the rate is so large that the mean runs away."""
    try:
        missed = abs(descended(kind, rate, generator(seed, "meco", stream)) - 16)
    except InputError:  # no noise has a density any more
        return math.inf
    return missed if math.isfinite(missed) else math.inf


def descended(kind: str, rate: float, random: torch.Generator) -> float:
    """The mean after the steps."""
    mean = before = torch.zeros(())
    log_u: Tensor | None = None
    for _ in range(STEPS):
        data = 16 + torch.randn(8, generator=random)
        noise = 16 * torch.randn(8, generator=random)
        with torch.enable_grad():
            leaf = mean.detach().requires_grad_()
            log_noise = _normal(noise, 0.0, 16.0)
            log_g = log_partition((noise - leaf).square() / 2, log_noise)
            if kind == "storm":
                old = log_partition((noise - before).square() / 2, log_noise)
                log_u = storm(log_u, log_g, old)
            else:
                log_u = moving_average(log_u, log_g, rate=1.0 if kind == "no memory" else 0.1)
            loss = compositional_likelihood((data - leaf).square() / 2, log_g, log_u)
            (slope,) = torch.autograd.grad(loss, leaf)
        before, mean = mean, mean - rate * slope
    return float(mean)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    for name, value in found.items():
        if name.startswith("likelihood") and abs(value - 1) > 1e-3:
            return False
        distance = float(name.rsplit(" ", 1)[1]) if name.startswith("nce") else 0.0
        if name.startswith("nce") and value > min(0.5, 3 * math.exp(-(distance**2) / 8)):
            return False
    bar = 0.3 * found["no memory, error"]
    return found["moving average, error"] < bar and found["storm, error"] < bar
