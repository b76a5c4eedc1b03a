"""LAME: parameter-free online test-time adaptation.

q = softmax(f(x)),  g = features of x, normalised,  W_ij = affinity of g_i and g_j
Y <- softmax(ln q);  repeat  Y_i <- softmax_k( ln q_i + sum_j W_ij Y_j )
until  E(Y) = sum_i Y_i . (ln Y_i - ln q_i) - sum_ij W_ij Y_i . Y_j  stands still
return Y
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import OptionError
from testtime._core.options import whole
from testtime._core.registry import register
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe

Affinity = Literal["knn", "rbf", "linear"]


def affinities(
    features: Tensor, *, kind: Affinity, neighbours: int, symmetric: bool = False
) -> Tensor:
    """How alike the samples of a batch are: (N, d) features, normalised here, to (N, N).

    knn: 1 for the nearest `neighbours` others, else 0. rbf: exp(-d^2 / 2 s^2), s the mean distance
    to the k-th nearest, a sample counting as its own first. linear: cosine similarity.
    """
    features = F.normalize(at_least_single(features), dim=-1)
    if kind == "linear":
        weights = features @ features.T
    else:
        # by matrix products, the default for many rows, small distances lose half their digits
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(features, features, compute_mode=exact)
        if kind == "rbf":
            kth = distance.sort(-1).values[:, min(neighbours, len(features)) - 1]
            width = kth.mean().clamp(min=1e-12)
            weights = (-distance.square() / (2 * width.square())).exp()
        else:
            others = distance.fill_diagonal_(torch.inf)
            nearest = others.topk(min(neighbours, len(features) - 1), largest=False).indices
            weights = torch.zeros_like(distance).scatter_(1, nearest, 1.0)
    return (weights + weights.T) / 2 if symmetric else weights


def laplacian_assignments(
    log_probs: Tensor, weights: Tensor, *, steps: int = 100, tolerance: float = 1e-8
) -> Tensor:
    """Minimises E over assignments (N, C) by its concave-convex iteration; returns ln Y."""
    unary = -(log_probs.exp() + 1e-10).log()
    log_y = torch.log_softmax(-unary, -1)
    before = torch.inf
    for step in range(steps):
        pull = weights @ log_y.exp()
        log_y = torch.log_softmax(pull - unary, -1)
        y = log_y.exp()
        energy = float((y * (unary - pull + log_y.clamp(min=-1e30))).sum())
        if step > 1 and abs(energy - before) <= tolerance * abs(before):
            break
        before = energy
    return log_y


@dataclass(frozen=True, kw_only=True)
class LaplacianCorrection:
    """Answers with assignments that agree with the model and among neighbours."""

    affinity: Affinity
    neighbours: int
    symmetric: bool
    dense: ClassVar[bool] = False

    def __call__(self, logits: Tensor, features: Tensor, ranks: Ranks) -> Tensor:
        log_probs = ranks.gather(at_least_single(logits).log_softmax(-1))
        weights = affinities(
            ranks.gather(features),
            kind=self.affinity,
            neighbours=self.neighbours,
            symmetric=self.symmetric,
        )
        return ranks.own(laplacian_assignments(log_probs, weights), len(logits))


@register("method", paper="lame")
def lame(*, affinity: Affinity = "knn", neighbours: int = 5, symmetric: bool = False) -> Recipe:
    """Leaves the model alone and corrects a batch's probabilities so that neighbours agree.

    Keeps nothing between batches.

    Use when: consecutive samples share labels, as in video, and the model must not be touched.

    Not when: labels in a batch are mixed: it then does harm. It corrects a batch, so a batch of
    one stays as it is.

    Args:
        affinity: knn (recommended in the paper), rbf (default of the code) or linear.
        neighbours: k; 5 (paper).
        symmetric: whether the affinity is made symmetric.

    Example:
        >>> lame().learns
        False

    Reference: Boudiaf et al., Parameter-free Online Test-time Adaptation, CVPR 2022.
    """
    if affinity not in ("knn", "rbf", "linear"):
        raise OptionError(f"affinity is {affinity!r}; expected 'knn', 'rbf' or 'linear'")
    whole(1, neighbours=neighbours)
    return Recipe(
        prediction=LaplacianCorrection(
            affinity=affinity, neighbours=neighbours, symmetric=symmetric
        )
    )
