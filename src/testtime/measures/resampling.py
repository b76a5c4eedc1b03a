"""The standard error of any measure of samples, from its values on halves of them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from testtime._core.arrays import as_given
from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime._core.seeds import check_seed, generator
from testtime.measures.information.estimate import Estimate

LEAST = 10
"""Samples of a kind below which halves tell nothing."""


def with_standard_error(
    measure: Callable[..., Any],
    *samples: Tensor,
    paired: bool = False,
    rounds: int = 100,
    seed: int = 0,
) -> Estimate:
    """A measure of samples with its standard error, by the delete-half jackknife.

    The measure is taken of random halves, drawn without replacement, whose spread is that of the
    measure of all. That is so for measures that err as means do, by n^-1/2. It is too large for
    those that err by less, as a distance of two samples of one law does, and no bias is in it.

    Args:
        measure: a function of as many tensors as there are kinds of samples, to one number.
        samples: (n, ...) of each kind, at least 10.
        paired: whether the i-th of all kinds belong together, and are drawn together.
        rounds: halves that are drawn; 100 leave 7 % of the standard error to chance.
        seed: of the draws.

    Returns:
        The measure of all samples, and its standard error.

    Raises:
        InputError: no samples, too few, paired ones of unlike length, or a measure that gives no
            single finite number.
        OptionError: fewer than two rounds, or a seed that is no whole number.

    Example:
        >>> from testtime.measures.network_divergence import frechet_distance
        >>> chance = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 500, 3, generator=chance)
        >>> found = with_standard_error(frechet_distance, x, y + 1)
        >>> abs(found.value - 3) < 3 * found.standard_error < 1
        True

    Reference: Shao, Wu, A General Theory for Jackknife Variance Estimation, Annals of Statistics
    17(3), 1989.
    """
    whole(2, rounds=rounds)
    check_seed(seed)
    kinds = [as_given(each) for each in samples]
    lengths = [len(each) if each.dim() else 0 for each in kinds]
    if not kinds or min(lengths) < LEAST or (paired and len(set(lengths)) > 1):
        raise InputError(
            f"the samples number {lengths}; expected at least {LEAST} of each kind, along the first "
            "dimension, and as many of each where they are paired."
        )
    value = _number(measure(*kinds))
    chance = generator(seed, "halves")
    found: list[float] = []
    for _ in range(rounds):
        more = int(
            torch.randint(2, (), generator=chance, device="cpu")
        )  # of odd ones half the time
        orders = [
            torch.randperm(n, generator=chance, device="cpu")[: (n + more) // 2]
            for n in (lengths[:1] if paired else lengths)
        ]
        halves = orders * len(kinds) if paired else orders
        chosen = (kind[half.to(kind.device)] for kind, half in zip(kinds, halves, strict=True))
        found.append(_number(measure(*chosen)))
    return Estimate(value, float(torch.tensor(found, dtype=torch.float64, device="cpu").std()))


def _number(told: Any) -> float:
    """What a measure gave, as a float."""
    value = getattr(told, "value", told)
    number = float(value) if isinstance(value, int | float) or _single(value) else math.nan
    if not math.isfinite(number):
        raise InputError(f"the measure gave {told!r:.60}; expected one finite number.")
    return number


def _single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
