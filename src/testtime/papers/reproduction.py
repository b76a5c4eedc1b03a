"""What a small check of a paper finds: the claim, the numbers of each seed, held or not."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from testtime._core.errors import OptionError

Progress = Callable[[int, int | None], None]
"""Called with the steps done and their number, None while that is not known."""


@dataclass(frozen=True)
class Reproduction:
    """The outcome of a small check.

    Attributes:
        slug: of the paper.
        claim: what was asserted of every seed, with its thresholds.
        held: whether it was so for every seed.
        numbers: what was measured, by name, one value for each seed; `claim held` is 1 or 0.
        seeds: the seeds.
    """

    slug: str
    claim: str
    held: bool
    numbers: dict[str, list[float]]
    seeds: list[int]


def reproduce(
    slug: str,
    claim: str,
    *,
    measure: Callable[[int], Iterator[tuple[str, float]]],
    holds: Callable[[dict[str, float]], bool],
    seeds: Sequence[int],
    on_progress: Progress | None = None,
) -> Reproduction:
    """Measures with every seed and asks whether the claim holds for each.

    Args:
        slug: of the paper.
        claim: the assertion in words.
        measure: gives named numbers of one seed, one after another.
        holds: the assertion, of the numbers of one seed.
        seeds: at least one.
        on_progress: called after each number.

    Raises:
        OptionError: no seed was given.

    Example:
        >>> found = reproduce(
        ...     "two", "n + 1 > 2", measure=lambda seed: iter([("n", seed + 1.0)]),
        ...     holds=lambda n: n["n"] > 2, seeds=[1, 2])
        >>> found.held, found.numbers
        (False, {'n': [2.0, 3.0], 'claim held': [0.0, 1.0]})
    """
    if not seeds:
        raise OptionError("no seed was given; expected at least one, e.g. seeds=(0, 1, 2)")
    numbers: dict[str, list[float]] = {}
    done, total = 0, None
    for seed in seeds:
        found: dict[str, float] = {}
        with usual_defaults():
            for name, value in measure(seed):
                found[name] = value
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        total = len(seeds) * len(found)
        found["claim held"] = float(holds(found))
        for name, value in found.items():
            numbers.setdefault(name, []).append(value)
    return Reproduction(slug, claim, all(numbers["claim held"]), numbers, list(seeds))


@contextmanager
def usual_defaults() -> Iterator[None]:
    """While it lasts, torch makes tensors of float32 on the CPU, as the thresholds of claims expect.

    Example:
        >>> torch.set_default_dtype(torch.float64)
        >>> with usual_defaults():
        ...     torch.zeros(1).dtype
        torch.float32
        >>> torch.set_default_dtype(torch.float32)
    """
    dtype, device = torch.get_default_dtype(), torch.empty(0).device
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
