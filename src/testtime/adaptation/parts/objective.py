"""What is minimised? One value for each sample; the engine alone reduces."""

from dataclasses import dataclass

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range
from testtime.adaptation.ranks import Ranks
from testtime.measures import entropy as measure
from testtime.measures.label_encoding import Distance, label_encoding_distance


def entropy(entropies: Tensor) -> Tensor:
    """Shannon entropy of each prediction."""
    return entropies


def teacher_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of each prediction against the teacher's, which gets no gradient."""
    return measure.cross_entropy(at_least_single(teacher.detach()).softmax(-1), logits)


def symmetric_cross_entropy(logits: Tensor, others: Tensor) -> Tensor:
    """Mean of the cross-entropies of two predictions against each other; gradients flow to both.

    -1/2 sum_c q_c ln p_c - 1/2 sum_c p_c ln q_c
    """
    logits, others = at_least_single(logits), at_least_single(others)
    one = measure.cross_entropy(others.softmax(-1), logits)
    return 0.5 * one + 0.5 * measure.cross_entropy(logits.softmax(-1), others)


def symmetric_with_teacher(logits: Tensor, teacher: Tensor) -> Tensor:
    """Symmetric cross-entropy of each prediction with the teacher's, which gets no gradient."""
    return symmetric_cross_entropy(logits, teacher.detach())


def agreement_with_teacher(logits: Tensor, augmented: Tensor, teacher: Tensor) -> Tensor:
    """Symmetric cross-entropy with the teacher, half of the batch's and half of a changed copy's."""
    teacher = teacher.detach()
    plain = symmetric_cross_entropy(logits, teacher)
    return 0.5 * plain + 0.5 * symmetric_cross_entropy(augmented, teacher)


def marginal_entropy(logits: Tensor, ranks: Ranks) -> Tensor:
    """Entropy of the mean prediction of the batch."""
    return measure.entropy_of_probs(ranks.mean(at_least_single(logits).softmax(-1)))


@dataclass(frozen=True)
class LabelEncoding:
    """Label-encoding risk of the batch: sure predictions, and every class among them.

    Args:
        distance: of a class's mean prediction from its code; absolute, squared or divergence.
    """

    distance: Distance = "absolute"

    def __post_init__(self) -> None:
        one = torch.ones(1, device="cpu")
        label_encoding_distance(one[:, None], one, distance=self.distance)  # refuses another one

    def __call__(self, logits: Tensor, ranks: Ranks) -> Tensor:
        probs = at_least_single(logits).softmax(-1)
        together, belonging = ranks.sum(probs.T @ probs), ranks.sum(probs.sum(0))
        return label_encoding_distance(together, belonging, distance=self.distance)


def generalised_entropy(logits: Tensor) -> Tensor:
    """GEM-T: T^2 H(softmax(z / T)), with a temperature T of each sample's own.

    T is twice the deviation of its logits, so that sure predictions, too, have a gradient.

    Reference: Zhang, Qi, Shi, Gao, DomainAdaptor, ICCV 2023.
    """
    cool, temperature = _cooled(logits)
    return temperature.square() * measure.entropy(cool)


def self_distillation(logits: Tensor) -> Tensor:
    """GEM-SKD: T^2 CE(softmax(z), z / T), where the prediction itself teaches, without gradient."""
    cool, temperature = _cooled(logits)
    probs = at_least_single(logits.detach()).softmax(-1)
    return temperature.square() * measure.cross_entropy(probs, cool)


def augmented_distillation(logits: Tensor, augmented: Tensor) -> Tensor:
    """GEM-Aug: T^2 CE(softmax(z_aug), z / T), where changed copies teach, without gradient."""
    cool, temperature = _cooled(logits)
    probs = at_least_single(augmented.detach()).softmax(-1)
    return temperature.square() * measure.cross_entropy(probs, cool)


def _cooled(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Centred logits divided by their temperature, and the temperature, which has no gradient."""
    logits = at_least_single(logits)
    temperature = 2 * logits.detach().std(-1)
    centred = logits - logits.detach().mean(-1, keepdim=True)
    return centred / temperature.clamp(min=1e-12)[..., None], temperature


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Minus the entropy of the batch's mean prediction, times a weight: rewards diverse batches."""

    weight: float

    def __post_init__(self) -> None:
        in_range(0, weight=self.weight)

    def __call__(self, logits: Tensor, ranks: Ranks) -> Tensor:
        return -self.weight * marginal_entropy(logits, ranks)
