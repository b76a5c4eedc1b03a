"""Calibration after training that reads nothing but logits: one temperature, or one for each class.

    temperature: p = softmax(z / T)            vector: p = softmax(w ∘ z + b)

Both minimise the negative log-likelihood of held-out labels by L-BFGS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime.guard.misclassification import check_classified
from testtime.measures.information.networks import training
from testtime.measures.log_space import check_classes


@final
@dataclass(frozen=True, kw_only=True)
class TemperatureScaling:
    """One temperature for all samples; no answer changes.

    Attributes:
        temperature: T.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1]).repeat(25)
        >>> logits = torch.tensor([4.0, 0.0]).expand(100, 2)     # sure to 98 %, right in 75 %
        >>> scaling = TemperatureScaling.fit(logits, labels)
        >>> scaling.calibrate(logits[:1]).softmax(1)
        tensor([[0.7500, 0.2500]])

    Reference: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
    """

    temperature: float

    @staticmethod
    def fit(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> "TemperatureScaling":
        """Of held-out samples. T is kept between 0.001 and 1000.

        Raises:
            InputError: no samples, NaN, or labels that do not fit.
        """
        check_classified(logits, labels)
        z, truth = _apart(logits, labels)
        (log_t,) = _minimise(
            [z.new_zeros(())], lambda log_t: F.cross_entropy(z / log_t.exp(), truth)
        )
        return TemperatureScaling(temperature=float(log_t.exp().clamp(1e-3, 1e3)))

    def calibrate(self, logits: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
        """z / T, in float32 at least: rounding in half precision would change answers. NaN stays NaN.

        Raises:
            InputError: for what are no real logits.
        """
        check_classes(logits, "logits")
        return at_least_single(logits) / self.temperature


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class VectorScaling:
    """A scale and a shift for each class; answers may change.

    Attributes:
        scale, shift: (classes,).

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1]).repeat(25)
        >>> scaling = VectorScaling.fit(torch.zeros(100, 2), labels)
        >>> scaling.calibrate(torch.zeros(1, 2)).softmax(1)
        tensor([[0.7500, 0.2500]])

    Reference: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017.
    """

    scale: Tensor
    shift: Tensor

    @staticmethod
    def fit(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> "VectorScaling":
        """Of held-out samples, many more than classes.

        Raises:
            InputError: no samples, NaN, or labels that do not fit.
        """
        check_classified(logits, labels)
        z, truth = _apart(logits, labels)
        start = [torch.ones_like(z[0]), torch.zeros_like(z[0])]
        scale, shift = _minimise(start, lambda w, b: F.cross_entropy(w * z + b, truth))
        kind = torch.promote_types(logits.dtype, torch.float32)
        return VectorScaling(scale=scale.to(kind), shift=shift.to(kind))

    def calibrate(self, logits: Float[Tensor, "n classes"]) -> Float[Tensor, "n classes"]:
        """w ∘ z + b; NaN stays NaN.

        Raises:
            InputError: for logits of other classes.
        """
        check_classes(logits, "logits")
        if logits.shape[-1:] != self.scale.shape:
            raise InputError(
                f"logits have the shape {tuple(logits.shape)}; expected (..., {len(self.scale)}), the "
                "classes that the scales were fitted to."
            )
        return self.scale * logits + self.shift


def _apart(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Copies that gradients may pass through, also of what was computed in inference mode."""
    with torch.inference_mode(False):
        return logits.detach().double().clone(), labels.long().clone()


def _minimise(start: list[Tensor], loss: Callable[..., Tensor]) -> list[Tensor]:
    with training():
        values = [each.clone().requires_grad_() for each in start]
        search = torch.optim.LBFGS(values, max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            value = loss(*values)
            value.backward()
            return value

        search.step(closure)
    if not all(bool(each.isfinite().all()) for each in values):
        raise InputError(
            "the search left the numbers: the logits are too large for their squares. Divide them by "
            "a constant."
        )
    return [each.detach() for each in values]
