"""How far each conditional p(x_j | x_-j) of one sample is from that of another: one number a feature.

`GaussianScore` and `DeepScore` compare scores of fitted densities, `ModelKS` and `KnnKS` the
conditionals themselves; the first is by far the fastest. Their options are whole numbers from 1 on, or
an OptionError.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime.guard.densities import DeepDensity, Gaussian

Statistic = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""X and Y (..., n, d), chance -> one number for each feature (..., d); higher for more shift."""


@final
@dataclass(frozen=True, kw_only=True)
class GaussianScore:
    """φ with Gaussian densities: one gradient in closed form for all features.

    Args:
        samples: m, drawn from each density; 100 (code; 30 in the experiments).

    Example:
        >>> x = torch.eye(3).repeat(4, 1).double()
        >>> GaussianScore()(x, x, torch.Generator())
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    samples: int = 100

    def __post_init__(self) -> None:
        whole(1, samples=self.samples)

    def __call__(self, x: Tensor, y: Tensor, chance: torch.Generator) -> Tensor:
        p, q = Gaussian.fit(x), Gaussian.fit(y)
        drawn = torch.cat([p.sample(self.samples, chance), q.sample(self.samples, chance)], -2)
        return (p.score(drawn) - q.score(drawn)).square().mean(-2)


@final
@dataclass(frozen=True, kw_only=True)
class DeepScore:
    """φ with deep densities, for features that are far from Gaussian.

    Args:
        samples: m, drawn from each density; 100 (code).
        layers: of each density; 2 (code).
        bins: of each histogram; 10 (code).

    Example:
        >>> x = torch.rand(50, 2, dtype=torch.float64)
        >>> DeepScore()(x, x, torch.Generator())
        tensor([0., 0.], dtype=torch.float64)
    """

    samples: int = 100
    layers: int = 2
    bins: int = 10

    def __post_init__(self) -> None:
        whole(1, samples=self.samples, layers=self.layers, bins=self.bins)

    def __call__(self, x: Tensor, y: Tensor, chance: torch.Generator) -> Tensor:
        if x.dim() > 2:
            return torch.stack([self(a, b, chance) for a, b in zip(x, y, strict=True)])
        p, q = (DeepDensity.fit(each, layers=self.layers, bins=self.bins) for each in (x, y))
        drawn = torch.cat([p.sample(self.samples, chance), q.sample(self.samples, chance)])
        return (p.score(drawn) - q.score(drawn)).square().mean(0)


@final
@dataclass(frozen=True, kw_only=True)
class ModelKS:
    """Mean distance of the Gaussian conditionals: Kolmogorov-Smirnov between draws of the two.

    The conditioning points are drawn from both densities. The authors' code passes a variance where
    a standard deviation is asked for; this uses the standard deviation.

    Args:
        samples: conditioning points from each density; 30.
        draws: from each conditional; 1000 (code).

    Example:
        >>> x = torch.eye(3).repeat(4, 1).double()
        >>> bool((ModelKS(samples=5)(x, x, torch.Generator().manual_seed(0)) < 0.05).all())
        True
    """

    samples: int = 30
    draws: int = 1000

    def __post_init__(self) -> None:
        whole(1, samples=self.samples, draws=self.draws)

    def __call__(self, x: Tensor, y: Tensor, chance: torch.Generator) -> Tensor:
        if x.dim() > 2:
            return torch.stack([self(a, b, chance) for a, b in zip(x, y, strict=True)])
        p, q = Gaussian.fit(x), Gaussian.fit(y)
        given = torch.cat([p.sample(self.samples, chance), q.sample(self.samples, chance)])
        drawn: list[Tensor] = []
        for density in (p, q):
            mean, std = density.conditionals(given)
            shape = (self.draws, *mean.shape)
            noise = torch.randn(shape, generator=chance, dtype=x.dtype, device=chance.device)
            drawn.append(mean + std * noise.to(x.device))
        return ks_distance(drawn[0], drawn[1]).mean(0)


@final
@dataclass(frozen=True, kw_only=True)
class KnnKS:
    """Mean Kolmogorov-Smirnov distance of a feature among the nearest neighbours in the others.

    Args:
        samples: conditioning points, from X and from Y; 30.
        neighbours: k; 100 (code), and at most n.

    Example:
        >>> x = torch.eye(3).repeat(4, 1).double()
        >>> KnnKS(samples=5, neighbours=4)(x, x, torch.Generator())
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    samples: int = 30
    neighbours: int = 100

    def __post_init__(self) -> None:
        whole(1, samples=self.samples, neighbours=self.neighbours)

    def __call__(self, x: Tensor, y: Tensor, chance: torch.Generator) -> Tensor:
        if x.dim() > 2:
            return torch.stack([self(a, b, chance) for a, b in zip(x, y, strict=True)])
        picked = [
            side[
                torch.randint(
                    len(side), (self.samples,), generator=chance, device=chance.device
                ).to(x.device)
            ]
            for side in (x, y)
        ]
        given, found = torch.cat(picked), list[Tensor]()
        for j in range(x.shape[1]):
            rest = torch.arange(x.shape[1], device=x.device) != j
            near = [
                side[:, j][
                    torch.cdist(given[:, rest], side[:, rest])
                    .topk(min(self.neighbours, len(side)), largest=False)
                    .indices
                ]
                for side in (x, y)
            ]
            found.append(ks_distance(near[0].T, near[1].T).mean())
        return torch.stack(found)


def ks_distance(a: Tensor, b: Tensor) -> Tensor:
    """Two-sample Kolmogorov-Smirnov distance along the first dimension, in float32 at least.

    Raises:
        InputError: no samples, NaN, or other dimensions of the two.

    Example:
        >>> ks_distance(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0]))
        tensor(0.5000)
    """
    check_tensors(a=a, b=b)
    for each in (a, b):
        if not each.dim() or not each.numel() or each.shape[1:] != b.shape[1:] or each.is_complex():
            raise InputError(
                f"the samples are of the shapes {tuple(a.shape)} and {tuple(b.shape)}; expected real "
                "(n, ...) and (m, ...) that differ in the first dimension only, not empty."
            )
        if bool(each.isnan().any()):
            raise InputError("the samples hold NaN, which has no rank; leave these out.")
    a, b = (each.movedim(0, -1).contiguous().sort(-1).values for each in (a, b))
    both = torch.cat([a, b], -1)
    kind = torch.promote_types(both.dtype, torch.float32)
    below = [
        torch.searchsorted(each, both, right=True).to(kind) / each.shape[-1] for each in (a, b)
    ]
    return (below[0] - below[1]).abs().amax(-1)
