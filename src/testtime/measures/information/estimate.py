"""What every estimator takes and answers: samples in, a value with its standard error out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from testtime._core.arrays import as_given, check_dense, magnitude
from testtime._core.errors import InputError

Estimator = Callable[[Tensor, Tensor], "Estimate"]
"""A function of paired samples x and y: an estimator of mutual information, options set."""


@dataclass(frozen=True)
class Estimate:
    """An estimate from samples.

    Attributes:
        value: the estimate, in nats.
        standard_error: of the value over draws of the samples it was evaluated on. What the choice
            of neighbours or the training of a network adds, bias above all, is not in it.
        trace: the objective during training, one number for each step, where it was asked for.

    Example:
        >>> Estimate(0.5, 0.01)
        Estimate(value=0.5, standard_error=0.01, trace=())
    """

    value: float
    standard_error: float
    trace: tuple[float, ...] = ()

    def __float__(self) -> float:
        """The value."""
        return self.value


def mean_estimate(terms: Tensor, trace: tuple[float, ...] = ()) -> Estimate:
    """The mean of terms that count as independent, and its standard error.

    Example:
        >>> mean_estimate(torch.tensor([1.0, 3.0]))
        Estimate(value=2.0, standard_error=1.0, trace=())
    """
    error = float(terms.std()) / math.sqrt(len(terms)) if len(terms) > 1 else math.inf
    return Estimate(float(terms.mean()), error, trace)


def checked(samples: Tensor, name: str, *, least: int = 2) -> Tensor:
    """Samples as (n, d) in float64, apart from the caller's graph; (n,) counts as one coordinate.

    Arrays and lists of numbers will do.

    Raises:
        InputError: for another shape, for fewer than `least` samples, for NaN or infinity, and for
            what has no numbers or is sparse.

    Example:
        >>> checked(torch.arange(3), "x").shape
        torch.Size([3, 1])
    """
    try:
        samples = as_given(samples)
    except Exception as error:  # whatever else it is
        raise InputError(
            f"{name} is of type {type(samples).__name__}; expected samples."
        ) from error
    check_dense(name, samples)
    if samples.ndim not in (1, 2) or samples.numel() == 0 or samples.is_complex():
        raise InputError(
            f"{name} has the shape {tuple(samples.shape)} and the type {samples.dtype}; expected "
            "real samples as (n, d), or (n,) for one coordinate. Flatten what one sample is."
        )
    if len(samples) < least:
        raise InputError(f"{name} has {len(samples)} samples; this needs at least {least}.")
    samples = samples.detach().reshape(len(samples), -1).to(torch.float64, copy=True)
    if not samples.isfinite().all():
        row = int((~samples.isfinite()).any(1).nonzero()[0])
        raise InputError(
            f"{name} holds NaN or infinity, first in sample {row}; expected finite numbers. Leave "
            "such samples out, in both variables."
        )
    return samples


def paired(x: Tensor, y: Tensor, *, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both variables as `checked`, of one length.

    Raises:
        InputError: as `checked`, and for lengths or devices that differ.

    Example:
        >>> x, y = paired(torch.arange(3), torch.ones(3, 2))
        >>> x.dtype, y.shape
        (torch.float64, torch.Size([3, 2]))
    """
    x, y = checked(x, "x", least=least), checked(y, "y", least=least)
    if len(x) != len(y) or x.device != y.device:
        raise InputError(
            f"x has {len(x)} samples on {x.device} and y {len(y)} on {y.device}; expected pairs "
            "(x_i, y_i): as many of each, on one device."
        )
    return x, y


def constant(x: Tensor) -> bool:
    """Whether all samples are the same: such a variable tells nothing.

    Example:
        >>> constant(torch.ones(3, 2))
        True
    """
    return bool((x == x[0]).all())


def standardised(x: Tensor) -> Tensor:
    """Each coordinate with mean 0 and standard deviation 1, in float32; constant ones become 0.

    Raises:
        InputError: as `checked`.

    Example:
        >>> standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([[-0.7071,  0.0000],
                [ 0.7071,  0.0000]])
    """
    x = checked(x, "x")
    x = x / magnitude(x.abs().amax(0))
    scale = x.std(0)
    varies = scale > 1e-12 * x.abs().amax(0)
    return torch.where(varies, (x - x.mean(0)) / torch.where(varies, scale, 1), 0).float()


def normal_scores(x: Tensor) -> Tensor:
    """Each coordinate as the normal quantiles of its ranks, in float64: call it before an estimator.

        x_ij -> Phi^-1( rank of x_ij among x_1j ... x_nj / (n + 1) ),   ties share their mean rank

    Mutual information does not change under invertible maps of each coordinate, but estimators do:
    heavy tails and edges harm them. Scores depend on the order within each coordinate alone, so that
    no increasing map of one moves an estimate. Take both variables, of all samples that the estimator
    is given. Not for entropies and divergences, which such maps change. A constant becomes 0.

    Args:
        x: (n, d) or (n,).

    Raises:
        InputError: for NaN, infinity, or one sample.

    Example:
        >>> normal_scores(torch.tensor([1.0, 1e9, 5.0, 5.0])).round(decimals=2)
        tensor([-0.8400,  0.8400,  0.0000,  0.0000], dtype=torch.float64)

    Reference: van der Waerden, Order Tests for the Two-Sample Problem and their Power, 1952.
    """
    columns = checked(x, "x").T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    ranks = (below + up_to + 1).double() / 2
    share = ranks / (columns.shape[1] + 1)
    scores = cast(Tensor, torch.special.ndtri(share))  # pyright: ignore[reportUnknownMemberType]
    return scores.T.reshape(as_given(x).shape)
