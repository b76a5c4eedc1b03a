"""How a token is drawn: one uniform number a row and step, from a generator of that row."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime._core.seeds import generator


def check_logits(logits: Float[Tensor, "rows tokens"]) -> None:
    """An `InputError` for logits from which no token can be chosen.

    Raises:
        InputError: a row holds NaN or +inf, or nothing but -inf.
    """
    bad = ~logits.amax(-1).isfinite()  # NaN goes through a maximum
    if bool(bad.any()):
        rows = bad.nonzero().flatten().tolist()
        raise InputError(
            f"the model's logits of row {rows[0]} hold NaN or +inf, or are all -inf; expected at "
            "least one finite number and no NaN. The weights may be damaged, or overflow in half "
            "precision: try model.float()."
        )


def inverse_cdf(
    logits: Float[Tensor, "rows tokens"], uniform: Float[Tensor, "rows"]
) -> Int[Tensor, "rows"]:
    """The token whose part of the unit interval holds the number: a draw from softmax(logits).

    Sums are kept in float64, so that rare tokens of a large vocabulary have their share; a token of
    probability 0 is never drawn.

    Example:
        >>> inverse_cdf(torch.tensor([[0.0, -torch.inf, 0.0]] * 2), torch.tensor([0.4, 0.6]))
        tensor([0, 2])
    """
    # of what is masked, softmax makes nought six times as fast as exp
    sums = at_least_single(logits).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # a product that rounds up to the total would point behind the last possible token
    mark = torch.minimum(uniform.double()[:, None] * total, total.nextafter(total.new_zeros(())))
    return torch.searchsorted(sums, mark, right=True).squeeze(-1)


class Drawer:
    """Draws for each row with a generator of its own, so that a row's draws are its own.

    Args:
        seeds: one for each row, or None to take the most probable token.

    Example:
        >>> Drawer(None)(torch.tensor([[0.0, 2.0]]))
        tensor([1])
    """

    def __init__(self, seeds: Sequence[int] | None) -> None:
        self._random = None if seeds is None else [generator(seed, "token") for seed in seeds]

    def __call__(self, logits: Float[Tensor, "rows tokens"]) -> Int[Tensor, "rows"]:
        """One token for each row."""
        if self._random is None:
            return logits.argmax(-1)
        # named, for a default device may be another than that of the generators
        numbers = [
            torch.rand(1, generator=g, dtype=torch.float64, device="cpu") for g in self._random
        ]
        return inverse_cdf(logits, torch.cat(numbers).to(logits.device))
