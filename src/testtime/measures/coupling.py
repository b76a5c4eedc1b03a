"""Couplings of little entropy, and compression whose output follows a given law. All in bits.

greedy coupling   while mass remains: i, j = argmax p, argmax q;  move min(p_i, q_j) to J_ij
bottleneck        T = X; merge the two likeliest symbols of T until H(T) <= R would be met by
                  merging the two least likely ones instead, or is met by itself
with bottleneck   P_XY = P_XT diag(1 / P_T) J_TY

The paper's local refinement of the encoder, and its Markov coding games, are not here.
"""

import heapq
import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.errors import InputError
from testtime._core.options import in_range


class Bottleneck(NamedTuple):
    """A deterministic encoder of X.

    Attributes:
        joint: (n, m) P_XT; symbols of X that cannot occur have rows of zeros.
        rate: H(T) in bits, which is I(X; T).
    """

    joint: Float[Tensor, "source codes"]
    rate: float


def entropy_bits(law: Float[Tensor, "*shape"]) -> float:
    """Shannon entropy in bits of a law of any shape; 0 ln 0 is 0.

    Raises:
        InputError: as `check_law`.

    Example:
        >>> entropy_bits(torch.tensor([0.5, 0.25, 0.25]))
        1.5
    """
    law = check_law(law.flatten(), "law")
    return -float(torch.xlogy(law, law).sum()) / math.log(2) + 0.0


def mutual_information_bits(joint: Float[Tensor, "rows columns"]) -> float:
    """I(X; Y) in bits of a joint law.

    Example:
        >>> mutual_information_bits(torch.eye(2) / 2)
        1.0
    """
    if joint.dim() != 2:
        raise InputError(
            f"joint has the shape {tuple(joint.shape)}; expected (rows, columns), a law of pairs."
        )
    joint = check_law(joint.flatten(), "joint").view(joint.shape)
    return entropy_bits(joint.sum(1)) + entropy_bits(joint.sum(0)) - entropy_bits(joint)


def greedy_coupling(
    p: Float[Tensor, "rows"], q: Float[Tensor, "columns"]
) -> Float[Tensor, "rows columns"]:
    """A joint law of p and q whose entropy is within 0.53 bits of the least, in float64.

    It takes at most n + m - 1 moves, each of the largest masses that are left.

    Raises:
        InputError: p or q is no law: a vector from 0 on that sums to 1 within 1e-6.

    Example:
        >>> greedy_coupling(torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]))
        tensor([[0.5000, 0.0000],
                [0.2500, 0.2500]], dtype=torch.float64)

    Reference: Kocaoglu et al., Entropic Causal Inference, AAAI 2017; bound: Compton et al.,
        Minimum-Entropy Coupling Approximation Guarantees Beyond the Majorization Barrier, 2023.
    """
    rows, columns = (_masses(law, name) for law, name in ((p, "p"), (q, "q")))
    joint = torch.zeros(len(p), len(q), dtype=torch.double)
    while rows and columns:
        (mass, i), (other, j) = heapq.heappop(rows), heapq.heappop(columns)
        moved = min(-mass, -other)
        joint[i, j] += moved
        for heap, left, place in ((rows, -mass - moved, i), (columns, -other - moved, j)):
            if left > 1e-15:
                heapq.heappush(heap, (-left, place))
    return joint.to(p.device)


def _masses(law: Tensor, name: str) -> list[tuple[float, int]]:
    """A heap of (-mass, place)."""
    law = check_law(law, name)
    heap = [(-mass, place) for place, mass in enumerate(_floats(law)) if mass > 0]
    heapq.heapify(heap)
    return heap


def greedy_bottleneck(p: Float[Tensor, "source"], *, rate: float) -> Bottleneck:
    """A deterministic T of X with H(T) <= rate that keeps nearly as much as any encoder can.

    The best encoder, random ones among them, keeps at most h(p_2) <= 1 bit more, with the binary
    entropy h and the second largest probability p_2. O(n log n).

    Args:
        p: (n,) law of X.
        rate: R in bits, from 0 on.

    Raises:
        InputError: p is no law.
        OptionError: rate is below 0.

    Example:
        >>> found = greedy_bottleneck(torch.tensor([0.5, 0.25, 0.125, 0.125]), rate=1.5)
        >>> found.rate, found.joint.sum(0).tolist()
        (1.5, [0.5, 0.25, 0.25])

    Reference: Ebrahimi, Chen, Khisti, Minimum Entropy Coupling with Bottleneck, NeurIPS 2024.
    """
    in_range(0, rate=rate)
    law = check_law(p, "p")
    groups = sorted(
        ((mass, [place]) for place, mass in enumerate(_floats(law)) if mass > 0),
        key=_largest_first,
    )
    left = entropy_bits(law)
    slack = 1e-12
    while left > rate + slack and len(groups) > 1:
        small = left - _lost(groups[-1][0], groups[-2][0])
        if small <= rate + slack:
            left = small
            groups = [*groups[:-2], _merged(groups[-2], groups[-1])]
            break
        left -= _lost(groups[0][0], groups[1][0])
        groups = [_merged(groups[0], groups[1]), *groups[2:]]  # the merged one stays the largest
    joint = torch.zeros(len(law), len(groups), dtype=torch.double, device=p.device)
    for code, (_, places) in enumerate(groups):
        joint[places, code] = law[places]
    return Bottleneck(joint, max(entropy_bits(joint.sum(0)), 0.0))


def _floats(law: Tensor) -> list[float]:
    return [float(law[place]) for place in range(len(law))]


def _largest_first(group: tuple[float, list[int]]) -> float:
    return -group[0]


def _lost(p: float, q: float) -> float:
    """Entropy that is lost by merging masses p and q."""
    return p * math.log2(1 + q / p) + q * math.log2(1 + p / q)


def _merged(
    one: tuple[float, list[int]], other: tuple[float, list[int]]
) -> tuple[float, list[int]]:
    return one[0] + other[0], one[1] + other[1]


def coupling_with_bottleneck(
    p: Float[Tensor, "rows"], q: Float[Tensor, "columns"], *, rate: float
) -> Float[Tensor, "rows columns"]:
    """A joint law of X and Y, Y of law q, through a code of at most `rate` bits: X - T - Y.

        I(X; Y) >= I(X; T) + I(T; Y) - H(T)

    Args:
        p: (n,) law of X.
        q: (m,) law of Y.
        rate: R in bits.

    Raises:
        InputError: p or q is no law.
        OptionError: rate is below 0.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> coupling_with_bottleneck(half, half, rate=1.0)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
        >>> mutual_information_bits(coupling_with_bottleneck(half, half, rate=0.0))
        0.0

    Reference: Ebrahimi, Chen, Khisti, Minimum Entropy Coupling with Bottleneck, NeurIPS 2024.
    """
    q = check_law(q, "q")
    joint = greedy_bottleneck(p, rate=rate).joint
    codes = joint.sum(0)
    return joint / codes @ greedy_coupling(codes, q)


def check_law(law: Tensor, name: str) -> Float[Tensor, "symbols"]:
    """The law of finitely many symbols in float64, with the sum 1 in that precision.

    Raises:
        InputError: another shape than (n,), entries below 0 or not finite, or a sum other than 1
            within 1e-6.
    """
    good = law.dim() == 1 and law.is_floating_point() and bool((law >= 0).all())
    if not good or abs(float(law.double().sum()) - 1) > 1e-6:
        raise InputError(
            f"{name} is of shape {tuple(law.shape)} and type {law.dtype} with the sum "
            f"{float(law.double().sum()):.6g}; expected probabilities (n,), from 0 on, with sum 1."
        )
    return law.double() / law.double().sum()
