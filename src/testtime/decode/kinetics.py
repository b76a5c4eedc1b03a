"""What test-time compute costs, with the traffic of the key-value cache: the kinetics law.

    P parameters, H_q query heads, H_kv key-value heads, D = head dimension x layers,
    c tokens of the prompt, L generated tokens, N samples, I FLOPs in the time of one byte

    dense:   compute = N ( 2 P L + 2 (2 c + L) L H_q D )
             traffic = 2 (2 c + N L) L H_kv D      bytes x 2, cache in 16 bits, the prompt's shared
    top-k:   K = sum over tokens of min(context, B) = B L - max(0, B - c)^2 / 2   (L >= B - c)
             compute = N ( 2 P L + 4 K H_q D ),   traffic = 4 N K H_kv D
    block:   top-k of blocks, and to find them a key per block is read and compared

    cost in equivalent FLOPs = compute + I traffic

Token t is charged a context of c + t - 1/2, so that sums are these closed forms exactly. The traffic
of the weights is left out, as in the paper: many requests are served by one reading of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from testtime._core.errors import InputError, OptionError
from testtime._core.options import in_range, whole

INTENSITY = 562.5
"""FLOPs in the time of one byte (code)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the cost of a language model depends on.

    Attributes:
        parameters: that multiply an activation for each token; embeddings that are only looked up
            do no work.
        layers: with attention.
        heads: query heads.
        kv_heads: key-value heads.
        head_dim: of both.
    """

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        in_range(1, parameters=self.parameters)
        whole(
            1, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim
        )


QWEN3 = {
    name: Shape(parameters=p, layers=layers, heads=heads, kv_heads=8, head_dim=128)
    for name, p, layers, heads in (
        ("0.6B", 0.752e9, 28, 16), ("1.7B", 2.03e9, 28, 16), ("4B", 4.02e9, 36, 32),
        ("8B", 8.19e9, 36, 32), ("14B", 14.77e9, 40, 40), ("32B", 32.76e9, 64, 64),
    )
}  # fmt: skip
"""The models that the paper measures."""


@dataclass(frozen=True)
class Cost:
    """Of generating.

    Attributes:
        compute: FLOPs.
        traffic: bytes of key-value cache that are read.
        intensity: FLOPs in the time of one byte.
    """

    compute: float
    traffic: float
    intensity: float = INTENSITY

    @property
    def total(self) -> float:
        """Equivalent FLOPs."""
        return self.compute + self.intensity * self.traffic


def dense_cost(
    shape: Shape, *, prompt: float, length: float, samples: float = 1, intensity: float = INTENSITY
) -> Cost:
    """Cost of `samples` answers of `length` tokens to one prompt, with full attention.

    Args:
        shape: of the model.
        prompt: its tokens, c. Reading them the first time is not in the cost.
        length: generated tokens of each answer, L.
        samples: N.
        intensity: FLOPs in the time of one byte; 562.5 (code).

    Raises:
        OptionError: an option out of its range.

    Example:
        >>> small, large = (dense_cost(QWEN3[n], prompt=200, length=32768) for n in ("0.6B", "14B"))
        >>> large.total / small.total  # though it has 20 times the parameters
        1.46

    Reference: Sadhukhan et al., Kinetics: Rethinking Test-Time Scaling Laws, 2025.
    """
    _check(shape, prompt=prompt, length=length, samples=samples, intensity=intensity)
    width = shape.head_dim * shape.layers
    attended = (2 * prompt + length) * length  # twice the sum of all contexts
    compute = samples * (2 * shape.parameters * length + 2 * attended * shape.heads * width)
    traffic = 2 * (2 * prompt + samples * length) * length * shape.kv_heads * width
    return Cost(compute, traffic, intensity)


def top_k_cost(
    shape: Shape,
    *,
    budget: float,
    prompt: float,
    length: float,
    samples: float = 1,
    intensity: float = INTENSITY,
) -> Cost:
    """Cost when every token attends to at most `budget` keys, found at no cost.

    Samples choose different keys of the prompt, so nothing is shared among them.

    Args:
        shape: of the model.
        budget: keys of one token, B.
        prompt: its tokens, c.
        length: generated tokens of each answer, L.
        samples: N.
        intensity: FLOPs in the time of one byte; 562.5 (code).

    Raises:
        OptionError: an option out of its range.

    Example:
        >>> asked = {"prompt": 200, "length": 32768}
        >>> sparse = top_k_cost(QWEN3["32B"], budget=1024, **asked).total
        >>> sparse / dense_cost(QWEN3["32B"], **asked).total
        0.085

    Reference: Sadhukhan et al., 2025. Their code for this cost adds max(0, B - c)^2 / 2 where the
    sum over tokens subtracts it; this is the sum.
    """
    _check(shape, prompt=prompt, length=length, samples=samples, intensity=intensity)
    in_range(1, budget=budget)
    width = shape.head_dim * shape.layers
    dense = min(length, max(0.0, budget - prompt))  # tokens whose context lies within the budget
    attended = (prompt + dense / 2) * dense + budget * (length - dense)
    compute = samples * (2 * shape.parameters * length + 4 * attended * shape.heads * width)
    return Cost(compute, 4 * samples * attended * shape.kv_heads * width, intensity)


def block_top_k_cost(
    shape: Shape,
    *,
    blocks: int,
    prompt: float,
    length: float,
    block: int = 16,
    local: int = 0,
    samples: float = 1,
    intensity: float = INTENSITY,
) -> Cost:
    """Cost of attending to a local window and the best blocks of keys, with that of finding them.

    Args:
        shape: of the model.
        blocks: that are kept, k.
        prompt: its tokens, c.
        length: generated tokens of each answer, L.
        block: keys of a block; 16 (code).
        local: keys of the local window; the budget is local + block k.
        samples: N.
        intensity: FLOPs in the time of one byte; 562.5 (code).

    Raises:
        OptionError: an option out of its range.

    Example:
        >>> asked = {"prompt": 200, "length": 32768}
        >>> found = block_top_k_cost(QWEN3["32B"], blocks=64, **asked).total
        >>> found / top_k_cost(QWEN3["32B"], budget=1024, **asked).total
        1.357

    Reference: Sadhukhan et al., 2025.
    """
    whole(0, local=local)
    whole(1, blocks=blocks, block=block)
    kept = top_k_cost(
        shape, budget=local + block * blocks, prompt=prompt, length=length, samples=samples,
        intensity=intensity,
    )  # fmt: skip
    width = shape.head_dim * shape.layers
    compared = samples * ((2 * prompt + length) // block) * length * shape.heads * width
    read = ((2 * prompt + samples * length) // block) * length * shape.kv_heads * width
    return Cost(kept.compute + compared, kept.traffic + read, intensity)


def largest(cost: Callable[[int], Cost], *, budget: float) -> int:
    """The largest whole number whose cost is within a budget: of samples, or of tokens.

    Args:
        cost: of a number; must not fall as it grows.
        budget: equivalent FLOPs.

    Returns:
        0 if even 1 costs more.

    Raises:
        OptionError: the budget is no positive number, or more than 2^60 are within it.

    Example:
        >>> ask = {"prompt": 200, "length": 8192}
        >>> largest(lambda n: dense_cost(QWEN3["4B"], samples=n, **ask), budget=1e17)
        34
        >>> largest(lambda n: dense_cost(QWEN3["4B"], prompt=200, length=n), budget=1e17)
        48635
    """
    if not 0 < budget < math.inf:
        raise OptionError(f"budget is {budget!r}; expected a positive number of equivalent FLOPs.")
    high = 1
    while cost(high).total <= budget:
        high *= 2
        if high > 2**60:
            raise OptionError("the cost does not grow; expected one that passes the budget.")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle).total <= budget else (low, middle)
    return low


def coverage(right: int, trials: int, samples: int) -> float:
    """Chance that at least one of n samples is right, when k of T recorded trials were.

        1 - C(T - k, n) / C(T, n)

    Raises:
        InputError: unless 0 <= k <= T and 1 <= n <= T.

    Example:
        >>> coverage(1, 4, 2)
        0.5

    Reference: Chen et al., Evaluating Large Language Models Trained on Code, 2021.
    """
    if not (0 <= right <= trials and 1 <= samples <= trials):
        raise InputError(
            f"{right} of {trials} trials were right and {samples} samples are asked for; expected "
            "0 <= right <= trials and 1 <= samples <= trials."
        )
    return 1 - math.comb(trials - right, samples) / math.comb(trials, samples)


def _check(shape: Shape, *, prompt: float, length: float, samples: float, intensity: float) -> None:
    in_range(0, prompt=prompt, length=length, intensity=intensity)
    in_range(1, samples=samples)
