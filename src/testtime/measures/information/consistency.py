"""Self-consistency: what any estimator of mutual information should satisfy, without the truth."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from testtime._core.errors import InputError
from testtime.measures.information.estimate import Estimator, checked, paired


@dataclass(frozen=True)
class Consistency:
    """What the three tests gave.

    Attributes:
        information: I(X; Y), on half of the samples as all of these.
        independent: I of x and the y of other samples: should be 0.
        processing: I(X; [Y, h(Y)]) / I(X; Y): should be 1.
        additivity: I([X, X']; [Y, Y']) / I(X; Y) with an independent copy: should be 2.
    """

    information: float
    independent: float
    processing: float
    additivity: float


def self_consistency(
    estimator: Estimator, x: Tensor, y: Tensor, *, process: Callable[[Tensor], Tensor] = torch.tanh
) -> Consistency:
    """The three tests of Song and Ermon, for any estimator of mutual information.

    The samples are cut in two halves; that of the second half is the independent copy. Ratios are
    infinite or NaN where the estimator gives I(X; Y) = 0: take samples that depend on each other.

    Args:
        estimator: called as `estimator(x, y)`, with its options set (`functools.partial`).
        x: (n, dx) or (n,).
        y: (n, dy) or (n,), the partner of each.
        process: h, any function of y (n, dy); it may lose information.

    Raises:
        InputError: for NaN, lengths that differ, fewer than four samples, and as the estimator.

    Example:
        >>> from testtime.measures.information.neighbours import ksg
        >>> x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(2000, generator=torch.Generator().manual_seed(1))
        >>> found = self_consistency(ksg, x, 0.8 * x + 0.6 * noise)
        >>> round(found.independent, 1) + 0.0, round(found.processing, 1)
        (0.0, 1.0)

    Reference: Song, Ermon, Understanding the Limitations of Variational Mutual Information
        Estimators, ICLR 2020.
    """
    x, y = paired(x, y, least=4)
    half = len(x) // 2
    (x, other_x), (y, other_y) = ((v[:half], v[half : 2 * half]) for v in (x, y))
    told = checked(process(y), "process(y)")
    if len(told) != len(y) or told.device != y.device:
        raise InputError(
            f"process answers {len(told)} samples on {told.device} for {len(y)} on {y.device}; expected "
            "h(y_i) of each."
        )
    base = torch.tensor(estimator(x, y).value, dtype=torch.float64, device="cpu")
    independent = estimator(x, other_y).value
    processed = estimator(x, torch.cat([y, told], 1)).value
    twice = estimator(torch.cat([x, other_x], 1), torch.cat([y, other_y], 1)).value
    return Consistency(float(base), independent, float(processed / base), float(twice / base))
