"""CAFA: class-aware feature alignment.

before: mu_c, Sigma_c = mean and covariance of the source features of class c
layers with statistics use those of the batch
for each batch x:
    z = f_theta(x),  g = features of x,  y_n = argmax z_n
    D_nc = (g_n - mu_c)^T Sigma_c^-1 (g_n - mu_c)
    theta <- theta - lr * d/dtheta mean_n ln( D_n,y_n / sum_{c != y_n} D_nc )
    return z
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from testtime._core.errors import NeedsSource, OptionError
from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.adaptation.parts.knowledge import ClassMoments, Known
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe

Reduction = Literal["sample", "batch"]


def mahalanobis(features: Tensor, means: Tensor, factor: Tensor) -> Tensor:
    """Squared Mahalanobis distance of each sample to each class, (B, C).

    Args:
        features: (B, d).
        means: (C, d).
        factor: lower Cholesky factor of the covariance, (d, d) or (C, d, d).

    Example:
        >>> mahalanobis(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 2 * torch.eye(2))
        tensor([[6.2500]])
    """
    if factor.dim() == 2:
        return distances_of_white(white(features, factor), white(means, factor))
    apart = (features[:, None] - means).permute(1, 2, 0)
    return torch.linalg.solve_triangular(factor, apart, upper=False).square().sum(1).T


def white(features: Tensor, factor: Tensor) -> Tensor:
    """Features (B, d) in units of a covariance, whose lower Cholesky factor is (d, d).

    Example:
        >>> white(torch.tensor([[3.0, 4.0]]), 2 * torch.eye(2))
        tensor([[1.5000, 2.0000]])
    """
    return torch.linalg.solve_triangular(factor, features.T, upper=False).T.contiguous()


def distances_of_white(features: Tensor, means: Tensor) -> Tensor:
    """Squared distances (B, C), by differences: by matrix products small ones lose half their digits.

    Example:
        >>> distances_of_white(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([[25.]])
    """
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(features, means, compute_mode=exact).square()


def intra_and_inter(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample, the distance to its class, and the sum of those to the others.

    Both are kept above zero, so that their logarithms are finite.

    Example:
        >>> intra_and_inter(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1]))
        (tensor([2.]), tensor([4.]))
    """
    own = torch.zeros_like(distances, dtype=torch.bool).scatter_(1, labels[:, None], True)
    tiny = torch.finfo(distances.dtype).tiny
    intra, inter = ((distances * which).sum(1) for which in (own, ~own))
    return intra.clamp(min=tiny), inter.clamp(min=tiny)


@dataclass(frozen=True, kw_only=True)
class ClassAlignment:
    """ln(intra / inter) of each sample, in float64 like what is known of the source.

    Args:
        tied: whether classes share one covariance.
        shrinkage: share of the mean variance that is added to each.
    """

    tied: bool
    shrinkage: float
    dense: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[ClassMoments]:
        """Means and covariances of the source features of each class."""
        return (ClassMoments(tied=self.tied),)

    def __call__(self, features: Tensor, logits: Tensor, known: dict[str, Known]) -> Tensor:
        intra, inter = self.parts(features, logits, known)
        return intra.log() - inter.log()

    def parts(
        self, features: Tensor, logits: Tensor, known: dict[str, Known]
    ) -> tuple[Tensor, Tensor]:
        """Intra and inter (B,) of the batch; no number where a prediction is none."""
        moments = known["class_moments"]
        features, factor = features.double(), self.factor(moments)
        if self.tied:
            if "white" not in moments:
                moments["white"] = white(moments["mean"], factor).detach()
            distances = distances_of_white(white(features, factor), moments["white"])
        else:
            distances = mahalanobis(features, moments["mean"], factor)
        predicted = logits.isfinite().all(-1, keepdim=True)
        distances = torch.where(predicted, distances, torch.nan)
        return intra_and_inter(distances, logits.argmax(-1))

    def factor(self, moments: Known) -> Tensor:
        """Cholesky factor of the shrunk covariance; computed once, then kept beside the moments."""
        if "factor" not in moments:
            covariance = moments["covariance"]
            if (covariance.dim() == 2) != self.tied:
                given, wanted = ("one for each class", "a tied one")[:: 1 if self.tied else -1]
                raise NeedsSource(
                    f"source= holds a class covariance that is {given}; this recipe needs {wanted}. "
                    f"Give source=tt.fit_source(model, loader, methods=[cafa(tied={self.tied})])."
                )
            share = moments["count"] / moments["count"].sum()
            variances = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
            ridge = self.shrinkage * (variances if self.tied else (share * variances).sum())
            unit = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
            with torch.no_grad():
                moments["factor"] = torch.linalg.cholesky(
                    covariance + ridge.clamp(min=1e-12) * unit
                )
        return moments["factor"]


@dataclass(frozen=True, kw_only=True)
class BatchAlignment:
    """ln(mean intra / mean inter) of a batch."""

    each: ClassAlignment
    dense: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[ClassMoments]:
        """Those of the alignment of each sample."""
        return self.each.needs

    def __call__(
        self, features: Tensor, logits: Tensor, known: dict[str, Known], ranks: Ranks
    ) -> Tensor:
        intra, inter = (ranks.mean(part) for part in self.each.parts(features, logits, known))
        return intra.log() - inter.log()


@register("method", paper="cafa")
def cafa(
    *,
    lr: float = 1e-3,
    reduction: Reduction = "sample",
    tied: bool = True,
    shrinkage: float = 0.01,
) -> Recipe:
    """Draws features to the source's Gaussian of their predicted class, away from the others.

    Needs class means and covariances of the source features: `tt.fit_source(model, loader,
    methods=["cafa"])`. Classes are the labels where the loader gives them, else the model's
    predictions. A class that the source data did not show has the mean of all.

    Use when: the features of classes are compact (a network trained with cross-entropy, and a
    linear layer last), and labelled source data was there once.

    Not when: features have many more dimensions than there were source samples to estimate a
    covariance from, or classes are so many that predictions under the shift are mostly wrong.

    Args:
        lr: step size of Adam; 1e-3, as Tent's for CIFAR, which the paper follows.
        reduction: sample: the mean of the samples' ln(intra / inter). batch: ln(mean intra / mean
            inter). The paper leaves it open; they differ little.
        tied: whether classes share one covariance (safe with few samples), or each has its own,
            which takes C d^2 numbers. Give `fit_source` the recipe then: methods=[cafa(tied=False)].
        shrinkage: share of the mean variance that is added to every variance, so that directions
            in which the source features do not vary cannot dominate; 0.01 (own choice).

    Example:
        >>> import torch
        >>> from testtime import adapt, fit_source
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(90, 4), torch.arange(90) % 3
        >>> adapter = adapt(model, "cafa", source=fit_source(model, [(x, y)], methods="cafa"))
        >>> adapter(torch.randn(16, 4)).shape
        torch.Size([16, 3])

    Reference: Jung et al., CAFA: Class-Aware Feature Alignment for Test-Time Adaptation, ICCV 2023.
    """
    in_range(0, shrinkage=shrinkage)
    if reduction not in ("sample", "batch"):
        raise OptionError(f"reduction is {reduction!r}; expected 'sample' or 'batch'")
    each = ClassAlignment(tied=tied, shrinkage=shrinkage)
    by_sample = reduction == "sample"
    return Recipe(
        scope=norm_affine,
        statistics=BatchStatistics(),
        objective=each if by_sample else None,
        batch_objective=None if by_sample else BatchAlignment(each=each),
        optimizer=Adam(lr=lr),
    )
