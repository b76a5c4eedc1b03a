"""Rel-U: which pairs of classes does a model confuse? (Dadalto Câmara Gomes et al., ICLR 2024)

given: tuning samples with labels, p = softmax(z / T)
M ← λ mean_(wrong) p pᵀ - (1 - λ) mean_(right) p pᵀ
zero the diagonal, symmetrise, set negative entries to 0; all ones but the diagonal if none is left
D ← M / ‖M‖
s(x) = pᵀ D p                                          # high: probably wrong
optionally first x ← x + ε sign( ∇_x ln s(x) )
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime.guard.misclassification import check_classified, perturbed_score


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class RelativeUncertainty:
    """A score of being wrong, read off the softmax with what confusions cost on tuning data.

    Attributes:
        distances: (classes, classes) D: symmetric, not negative, zero diagonal, Frobenius norm 1.
        temperature: T.

    Example:
        >>> logits = torch.tensor([[2.0, 1.9, 0.0], [2.0, 0.0, 1.9], [1.0, 3.0, 0.0]]).repeat(8, 1)
        >>> labels = torch.tensor([1, 0, 1]).repeat(8)       # 0 is confused with 1, never with 2
        >>> rel_u = RelativeUncertainty.fit(logits, labels)
        >>> wrong, right, _ = rel_u.score(logits[:3])
        >>> bool(wrong > right)
        True

    Reference: Dadalto Câmara Gomes, Romanelli, Pichler, Piantanida, A Data-Driven Measure of
    Relative Uncertainty for Misclassification Detection, ICLR 2024.
    """

    distances: Tensor
    temperature: float = 1.0

    @staticmethod
    def fit(
        logits: Float[Tensor, "n classes"],
        labels: Int[Tensor, " n"],
        *,
        weight: float = 0.5,
        temperature: float = 1.0,
    ) -> "RelativeUncertainty":
        """Of tuning samples that the model was not trained on; the authors take a tenth of a test set.

        Without a wrong sample, or without a right one, that mean is 0. Where no entry is positive
        the score ranks as the Gini impurity 1 - Σ p².

        Args:
            logits: (n, classes), finite.
            labels: (n,).
            weight: λ, from 0 to 1; 0.5 (code).
            temperature: T; 1, and 0.2 to 2 is what the authors search.

        Raises:
            InputError: no samples, fewer than two classes, NaN, or labels that do not fit.
            OptionError: an option is out of its range.
        """
        in_range(0, 1, weight=weight)
        in_range(1e-6, temperature=temperature)
        check_classified(logits, labels)
        probs = (logits.double() / temperature).softmax(1)
        wrong = probs.argmax(1) != labels
        costs = weight * _outer(probs, wrong) - (1 - weight) * _outer(probs, ~wrong)
        costs = (costs - costs.diag().diag()).clamp(min=0)
        costs = (costs + costs.T) / 2
        if not bool(costs.any()):
            costs = torch.ones_like(costs) - torch.eye(len(costs), dtype=costs.dtype).to(costs)
        return RelativeUncertainty(
            distances=(costs / costs.norm()).to(torch.promote_types(logits.dtype, torch.float32)),
            temperature=temperature,
        )

    def score(self, logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
        """pᵀ D p for each sample; higher ones are more probably wrong.

        Raises:
            InputError: the logits are not (n, classes) with the classes of the tuning data, or NaN.
        """
        if logits.dim() != 2 or logits.shape[1] != len(self.distances):
            raise InputError(
                f"logits have the shape {tuple(logits.shape)}; expected (n, {len(self.distances)})."
            )
        probs = (logits.to(self.distances.dtype) / self.temperature).softmax(1)
        if bool(probs.isnan().any()):
            raise InputError("logits hold NaN or +inf; leave these samples out, and count them.")
        return torch.einsum("ni,ij,nj->n", probs, self.distances, probs)

    def score_perturbed(self, model: nn.Module, x: Tensor, *, epsilon: float) -> Tensor:
        """The score after a step of the input that raises it: two forwards and a backward.

        The model's modes, flags, gradients and the random state are the same afterwards.

        Args:
            model: maps x to logits.
            x: a batch of floating-point inputs.
            epsilon: size of the step; 0 to 0.004 is what the authors search, for inputs in [0, 1].

        Raises:
            InputError: as `score`.
            OptionError: epsilon is negative.
        """
        return perturbed_score(model, x, self.score, epsilon=epsilon)


def _outer(probs: Tensor, chosen: Bool[Tensor, " n"]) -> Tensor:
    """Mean of p pᵀ over the samples chosen; 0 where there are none."""
    picked = probs[chosen]
    return picked.T @ picked / max(len(picked), 1)
