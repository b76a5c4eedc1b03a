"""ROID: weight ensembling, diversity weighting and prior correction.

c = uniform
for each batch x of B:
    z_i = f_theta(x_i),  p_i = softmax(z_i)
    d_i = 1 - cos(c, p_i)  and  e_i = -H(p_i),  both scaled to [0, 1] over the batch
    w_i = exp(d_i e_i / tau)  if d_i >= mean d,  else 0
    c <- 0.9 c + 0.1 mean p
    l_i = SLR(z_i) + SCE(f_theta(T(x_i)), z_i)
    theta <- theta - lr * d/dtheta sum_i w_i l_i / B
    theta <- m theta + (1 - m) source
    return z * smoothed mean p

SLR(z) = -sum_k q_k ln(q_k / (1 - q_k) + 1e-5),  q = min(p, 0.99)
SCE(a, b) = -1/2 sum softmax(b) ln softmax(a) - 1/2 sum softmax(a) ln softmax(b)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.adaptation.parts.objective import symmetric_cross_entropy
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.preservation import SourcePull
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.parts.views import Augment, needs_pixels, roid_view
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class CertainAndDiverse:
    """Samples that differ from what the model mostly predicts, the surest counting most.

    Args:
        temperature: tau.
        momentum: share of the mean prediction c that is kept.
    """

    temperature: float
    momentum: float
    dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        in_range(0, 1, momentum=self.momentum)
        in_range(1e-6, temperature=self.temperature)

    def init(self) -> dict[str, Any]:
        """No batch yet: the mean prediction is uniform."""
        return {"mean": None}

    def __call__(
        self,
        inputs: Tensor,
        logits: Tensor,
        entropies: Tensor,
        ranks: Ranks,
        state: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        probs = at_least_single(logits.detach()).softmax(-1)
        mean = state["mean"]
        if mean is None:
            mean = torch.full_like(probs[0], 1 / probs.shape[-1])
        unlike = 1 - F.cosine_similarity(mean[None], probs, dim=1)
        diversity = _differ(inputs, ranks) * _unit(ranks.gather(unlike))
        certainty = _unit(ranks.gather(-entropies.detach()))
        common = diversity < diversity.mean()
        weights = torch.exp(diversity * certainty / self.temperature).masked_fill(common, 0)
        # the engine's mean is over those that teach, the paper's over the batch
        weights = weights * (1 - common.to(weights.dtype).mean())
        fresh = self.momentum * mean + (1 - self.momentum) * ranks.mean(probs)
        return ranks.own(weights, len(probs)), {"mean": fresh}


def _differ(inputs: Tensor, ranks: Ranks) -> Tensor:
    """Whether samples differ at all. Answers to equal ones may: rows of a product round each its own
    way, and normalised by a batch without variance that is all there is."""
    other = inputs != ranks.gather(inputs[:1])[:1]
    return ranks.sum(other.any().float()) > 0


def _unit(values: Tensor) -> Tensor:
    """Scaled to [0, 1]; zeros where all are alike."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """SLR of each prediction: as entropy, but with a gradient that stays where it is sure.

    Example:
        >>> soft_likelihood_ratio(torch.tensor([[2.0, 0.0, 0.0]]))
        tensor([-0.5754])
    """
    probs = at_least_single(logits).softmax(-1).clamp(max=0.99)
    return -(probs * torch.log(probs / (1 - probs) + 1e-5)).sum(-1)


@dataclass(frozen=True, kw_only=True)
class RatioAndConsistency:
    """The soft likelihood ratio, and agreement with the prediction for a changed copy.

    Copies are made, and run, of the samples that teach, and of no others.

    Args:
        augment: T, makes the copy.
    """

    augment: Augment
    dense: ClassVar[bool] = False

    @property
    def pixels(self) -> bool:
        """Whether inputs must be images in [0, 1]."""
        return needs_pixels(self.augment)

    def __call__(
        self,
        inputs: Tensor,
        logits: Tensor,
        weights: Tensor,
        forward_with_gradient: Callable[[Tensor], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        teaching = weights.nonzero().flatten()
        ratio = soft_likelihood_ratio(logits)
        changed = forward_with_gradient(self.augment(inputs[teaching], generator))
        agreement = symmetric_cross_entropy(changed, logits[teaching])
        return ratio + torch.zeros_like(ratio).index_put((teaching,), agreement)


@dataclass(frozen=True, kw_only=True)
class PriorCorrection:
    """Answers weighed by the batch's mean prediction, smoothed the more the smaller the batch.

        pr = mean p,  s = max(1/B, 1/C) / max pr,  pr' = (pr + s) / (1 + s C)

    Args:
        form: `logits` returns z pr', as the code does; `probs` returns z + ln pr', whose
            probabilities are p pr' over their sum: Bayes' rule for a new prior.
    """

    form: Literal["logits", "probs"]

    def to_scale(self, answers: Tensor) -> Tensor:
        """The same answers on the scale of logits, for guards: shares are 1 / C on the mean."""
        return answers * answers.shape[1] if self.form == "logits" else answers

    def __call__(self, logits: Tensor, ranks: Ranks) -> Tensor:
        prior = self.smoothed(ranks.gather(at_least_single(logits.detach()).softmax(-1)))
        prior = prior.to(logits.dtype)
        return logits * prior if self.form == "logits" else logits + prior.log()

    def smoothed(self, probs: Tensor) -> Tensor:
        """pr' of predictions (B, C)."""
        count, classes = probs.shape
        prior = probs.mean(0)
        smooth = max(1 / count, 1 / classes) / prior.max()
        return (prior + smooth) / (1 + smooth * classes)


@register("method", paper="roid")
def roid(
    *,
    lr: float = 1e-3,
    momentum: float = 0.99,
    temperature: float = 1 / 3,
    probs_momentum: float = 0.9,
    correction: Literal["logits", "probs"] = "logits",
    augment: Augment = roid_view,
) -> Recipe:
    """Learns from sure and diverse samples, and is pulled back to the source after each step.

    Inputs are images in [0, 1], normalisation belongs in the model; an `augment` of your own may
    take other inputs.

    Use when: nothing is known of the stream: domains that follow each other or mix, labels in any
    order. One step costs two forwards and backwards, the second of at most the diverse half.

    Not when: logits are dense, or batches hold a sample or two: there is nobody to differ from.

    Args:
        lr: step size of Adam; 1e-3 for CIFAR (code; ImageNet ResNet-50: SGD 2.5e-4 with momentum
            0.9, `replace(roid(), optimizer=SGD(lr=2.5e-4, momentum=0.9))`).
        momentum: m, share of the adapted tensors that the pull to the source leaves; 0.99 (code).
            1 is no pull.
        temperature: tau; 1/3 (code).
        probs_momentum: share of the mean prediction that is kept; 0.9 (code).
        correction: of the answer: of the `logits`, as the code does, or of the `probs`, which is
            Bayes' rule. The first are logits times shares of about 1 / C, whose softmax is nearly
            flat: take `probs` where probabilities are read. A guard is shown C times as much.
        augment: T.

    Departures from the code: B is the size of the batch at hand, in the code the configured one,
    also for a shorter last batch; a batch of samples that are all alike teaches with weights of
    one, where the code divides zero by zero, or takes for weights how their answers were rounded.

    Example:
        >>> roid(momentum=0.9).restoration.momentum
        0.9

    Reference: Marsden, Döbler, Yang, Universal Test-time Adaptation through Weight Ensembling,
    Diversity Weighting, and Prior Correction, WACV 2024.
    """
    return Recipe(
        scope=norm_affine,
        statistics=BatchStatistics(),
        objective=RatioAndConsistency(augment=augment),
        selection=CertainAndDiverse(temperature=temperature, momentum=probs_momentum),
        restoration=SourcePull(momentum=momentum),
        prediction=PriorCorrection(form=correction),
        optimizer=Adam(lr=lr),
    )
