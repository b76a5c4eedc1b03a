"""Rel-U: which pairs of classes does a model confuse? (Dadalto Câmara Gomes et al., ICLR 2024)

given: tuning samples with labels, p = softmax(z / T)
M ← λ mean_(wrong) p pᵀ - (1 - λ) mean_(right) p pᵀ
zero the diagonal, symmetrise, set negative entries to 0; all ones but the diagonal if none is left
D ← M / ‖M‖
s(x) = pᵀ D p                                          # high: probably wrong
optionally first x ← x + ε sign( ∇_x ln s(x) )
T and ε: those of a grid with the fewest false alarms on held-out samples
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime.adaptation.outputs import read_logits
from testtime.guard.borrow import borrowed
from testtime.guard.misclassification import (
    check_classified,
    perturbed_score,
    raising_direction,
)
from testtime.measures.detection import auroc, fpr_at_95_tpr
from testtime.measures.information.networks import single

TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0)
"""What is searched for T (code)."""
EPSILONS = tuple(step / 2000 for step in range(9))
"""What is searched for ε: 0, 0.0005, ..., 0.004, for inputs in [0, 1] (code)."""


class Searched(NamedTuple):
    """What `RelativeUncertainty.search` chose.

    The score is that of `detector.score_perturbed(model, x, epsilon=epsilon)`; `fpr` is the share of
    the right held-out samples that a threshold flags which finds 95 % of the wrong ones.
    """

    detector: "RelativeUncertainty"
    epsilon: float
    fpr: float


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
            temperature: T; 1, and 0.2 to 2 is what the authors, and `search`, try.

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
            costs = torch.ones_like(costs) - torch.eye(
                len(costs), dtype=costs.dtype, device="cpu"
            ).to(costs)
        return RelativeUncertainty(
            distances=(costs / costs.norm()).to(torch.promote_types(logits.dtype, torch.float32)),
            temperature=temperature,
        )

    @staticmethod
    def search(
        model: nn.Module,
        tuning: Iterable[tuple[Tensor, Tensor]],
        held: Iterable[tuple[Tensor, Tensor]],
        *,
        weight: float = 0.5,
    ) -> Searched:
        """Fits D at each of the authors' temperatures, and takes what works best on held-out data.

        All 99 pairs of T and ε are tried. The fewest false alarms at 95 % of the wrong samples found
        wins, of equals the higher AUROC, then the smaller T and ε; the authors report every pair, so
        this rule is ours. A held-out batch costs 100 forwards and 11 backwards. The model's modes,
        flags, gradients and the random state are the same afterwards.

        Args:
            model: maps inputs to logits.
            tuning: batches of floating-point inputs and labels (n,) that the model was not trained
                on; the authors take a tenth of a test set.
            held: others of the same kind; theirs are a fifth of the rest. Report no figures on them.
            weight: λ, from 0 to 1; 0.5 (code).

        Raises:
            InputError: as `fit`; or the held-out samples are all right, or all wrong.
            OptionError: the weight is out of its range.

        Example:
            >>> x = 2 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
            >>> labels = x[:, :2].argmax(1)                  # so an answer of 2 is always wrong
            >>> tuning, held = [(x[:100], labels[:100])], [(x[100:], labels[100:])]
            >>> found = RelativeUncertainty.search(nn.Identity(), tuning, held)
            >>> found.detector.temperature in TEMPERATURES, found.epsilon in EPSILONS
            (True, True)
        """
        answers = [(logits, labels) for _, logits, labels in _answered(model, tuning)]
        if not answers:
            raise InputError("tuning holds no batch; expected inputs and their labels.")
        logits, labels = (torch.cat(side) for side in zip(*answers, strict=True))
        detectors = [
            RelativeUncertainty.fit(logits, labels, weight=weight, temperature=temperature)
            for temperature in TEMPERATURES
        ]
        tried = [(detector, epsilon) for detector in detectors for epsilon in EPSILONS]
        scores, wrong = [list[Tensor]() for _ in tried], list[Tensor]()
        for x, logits, labels in _answered(model, held):
            wrong.append(logits.argmax(1) != labels)
            slopes = [raising_direction(model, x, detector.score) for detector in detectors]
            for i, (detector, epsilon) in enumerate(tried):
                moved = x + epsilon * slopes[i // len(EPSILONS)]
                scores[i].append(detector.score(_logits(model, moved) if epsilon else logits))
        if not wrong:
            raise InputError("held holds no batch; expected inputs and their labels.")
        missed = torch.cat(wrong)
        quality = [
            (float(fpr_at_95_tpr(each, missed)), -float(auroc(each, missed)))
            for each in map(torch.cat, scores)
        ]
        best = min(range(len(tried)), key=quality.__getitem__)
        return Searched(*tried[best], quality[best][0])

    def score(self, logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
        """pᵀ D p for each sample; higher ones are more probably wrong.

        Raises:
            InputError: the logits are not (n, classes) with the classes of the tuning data, or NaN.
        """
        check_tensors(logits=logits)
        if logits.dim() != 2 or logits.shape[1] != len(self.distances):
            raise InputError(
                f"logits have the shape {tuple(logits.shape)}; expected (n, {len(self.distances)})."
            )
        probs = (logits.to(self.distances.dtype) / self.temperature).softmax(1)
        if bool(probs.isnan().any()):
            raise InputError("logits hold NaN or +inf; leave these samples out, and count them.")
        with single():
            return torch.einsum("ni,ij,nj->n", probs, self.distances, probs)

    def score_perturbed(self, model: nn.Module, x: Tensor, *, epsilon: float) -> Tensor:
        """The score after a step of the input that raises it: two forwards and a backward.

        The model's modes, flags, gradients and the random state are the same afterwards.

        Args:
            model: maps x to logits.
            x: a batch of floating-point inputs.
            epsilon: size of the step; 0 to 0.004 is what the authors, and `search`, try, for inputs
                in [0, 1].

        Raises:
            InputError: as `score`.
            OptionError: epsilon is negative.
        """
        return perturbed_score(model, x, self.score, epsilon=epsilon)


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with borrowed(model):
        return read_logits(model(x))


def _answered(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, logits and labels of each batch, which belong together."""
    for x, labels in batches:
        logits = _logits(model, x)
        check_classified(logits, labels)
        yield x, logits, labels


def _outer(probs: Tensor, chosen: Bool[Tensor, " n"]) -> Tensor:
    """Mean of p pᵀ over the samples chosen; 0 where there are none."""
    picked = probs[chosen]
    return picked.T @ picked / max(len(picked), 1)
