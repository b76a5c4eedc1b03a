"""Couplings of little entropy, and compression whose output follows a given law. All in bits.

greedy coupling   while mass remains: i, j = argmax p, argmax q;  move min(p_i, q_j) to J_ij
bottleneck        T = X; merge the two likeliest symbols of T until H(T) <= R would be met by
                  merging the two least likely ones instead, or is met by itself
refined           from the last mapping with H(T) <= R: the cell with the smallest share of its column
                  gives mass to a new column; from the mapping before it: the smallest cell of the
                  lightest column gives mass to the heaviest; each until H(T) = R; the better one
with bottleneck   P_XY = P_XT diag(1 / P_T) J_TY
"""

import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range

SLACK = 1e-12
"""Bits that rounding may add."""


class Bottleneck(NamedTuple):
    """An encoder of X.

    Attributes:
        joint: (n, m) P_XT; symbols of X that cannot occur have rows of zeros.
        rate: H(T) in bits.
        information: I(X; T) in bits; the rate, if the encoder is deterministic.
    """

    joint: Float[Tensor, "source codes"]
    rate: float
    information: float


def entropy_bits(law: Float[Tensor, "*shape"]) -> float:
    """Shannon entropy in bits of a law of any shape; 0 ln 0 is 0.

    Raises:
        InputError: as `check_law`.

    Example:
        >>> entropy_bits(torch.tensor([0.5, 0.25, 0.25]))
        1.5
    """
    check_tensors(law=law)
    law = check_law(law.flatten(), "law")
    return -float(torch.xlogy(law, law).sum()) / math.log(2) + 0.0


def mutual_information_bits(joint: Float[Tensor, "rows columns"]) -> float:
    """I(X; Y) in bits of a joint law.

    Example:
        >>> mutual_information_bits(torch.eye(2) / 2)
        1.0
    """
    check_tensors(joint=joint)
    if joint.dim() != 2:
        raise InputError(
            f"joint has the shape {tuple(joint.shape)}; expected (rows, columns), a law of pairs."
        )
    joint = check_law(joint.flatten(), "joint").view(joint.shape)
    kept = entropy_bits(joint.sum(1)) + entropy_bits(joint.sum(0)) - entropy_bits(joint)
    return max(kept, 0.0)  # rounding


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
    joint = torch.zeros(len(p), len(q), dtype=torch.double, device="cpu")
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
    entropy h and the second largest probability p_2. The search is O(n log n); the joint law that is
    answered has n m entries.

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
    law = check_law(p, "p")
    below, _ = _around(law, rate)
    return _bottleneck(_joint(law, below))


def refined_bottleneck(p: Float[Tensor, "source"], *, rate: float) -> Bottleneck:
    """A random T of X with H(T) = rate, if H(X) is more, that keeps at least what the greedy one does.

    Near a deterministic mapping, on either side of its entropy, the best encoder differs from it in
    one cell. The mappings are the two of the greedy search between which the rate lies; where the
    rate is not near, more than one cell may move.

    Args:
        p: (n,) law of X.
        rate: R in bits, from 0 on.

    Raises:
        InputError: p is no law.
        OptionError: rate is below 0.

    Example:
        >>> law = torch.tensor([0.7, 0.2, 0.1])
        >>> greedy, refined = greedy_bottleneck(law, rate=1.0), refined_bottleneck(law, rate=1.0)
        >>> round(greedy.information, 3), round(refined.information, 3), round(refined.rate, 3)
        (0.881, 0.921, 1.0)

    Reference: Ebrahimi, Chen, Khisti, NeurIPS 2024, Theorem 3.
    """
    law = check_law(p, "p")
    below, above = _around(law, rate)
    found = _bottleneck(_split(_joint(law, below), rate))
    if above is not None:
        other = _bottleneck(_poured(_joint(law, above), rate))
        if other.information > found.information + SLACK:  # else rounding would choose
            return other
    return found


def uniform_bottleneck(p: Float[Tensor, "source"], *, rate: float) -> Bottleneck:
    """The paper's baseline: floor(2^R) cells of as many consecutive symbols, whatever their law.

    Args:
        p: (n,) law of X.
        rate: R in bits, from 0 on.

    Raises:
        InputError: p is no law.
        OptionError: rate is below 0.

    Example:
        >>> uniform_bottleneck(torch.tensor([0.5, 0.25, 0.125, 0.125]), rate=1.5).joint.sum(0)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    in_range(0, rate=rate)
    law = check_law(p, "p")
    size = math.ceil(len(law) / math.floor(2 ** min(rate, 64)))
    cells = [list(range(at, min(at + size, len(law)))) for at in range(0, len(law), size)]
    return _bottleneck(_joint(law, [(0.0, cell) for cell in cells]))


Group = tuple[float, list[int]]
"""Mass and places of the symbols that share a code."""


def _around(law: Tensor, rate: float) -> tuple[list[Group], list[Group] | None]:
    """The greedy search's first mapping with H(T) <= rate, and the one it was merged from.

    What is merged stays the largest: a mapping is the number of the largest symbols that share a code.
    """
    in_range(0, rate=rate)
    groups = sorted(
        ((mass, [place]) for place, mass in enumerate(_floats(law)) if mass > 0),
        key=_largest_first,
    )
    left, merged, head = entropy_bits(law), 1, groups[0][0]
    while left > rate + SLACK and merged < len(groups):
        two = len(groups) - merged == 1
        second = head if two else groups[-2][0]
        if left - _lost(groups[-1][0], second) <= rate + SLACK:
            before = _headed(groups, merged)
            return [*before[:-2], _merged(*before[-2:])], before
        left -= _lost(head, groups[merged][0])
        head += groups[merged][0]
        merged += 1
    return _headed(groups, merged), _headed(groups, merged - 1) if merged > 1 else None


def _headed(groups: list[Group], merged: int) -> list[Group]:
    """The mapping that gives the first `merged` symbols one code."""
    head = sum(mass for mass, _ in groups[:merged])
    return [(head, [place for _, (place,) in groups[:merged]]), *groups[merged:]]


def _joint(law: Tensor, groups: list[Group]) -> Tensor:
    joint = law.new_zeros(len(law), len(groups))
    for code, (_, places) in enumerate(groups):
        joint[places, code] = law[places]
    return joint


def _bottleneck(joint: Tensor) -> Bottleneck:
    codes = joint.sum(0)
    if not bool((codes > 0).all()):
        joint, codes = joint[:, codes > 0], codes[codes > 0]
    rate = entropy_bits(codes)
    kept = entropy_bits(joint.sum(1)) + rate - entropy_bits(joint)
    return Bottleneck(joint, max(rate, 0.0), max(kept, 0.0))


def _split(joint: Tensor, rate: float) -> Tensor:
    """Cells with the smallest share of their column go to a new one while H(T) <= rate."""
    while True:
        codes = joint.sum(0)
        shares = torch.where((joint > 0) & (joint < codes), joint / codes, math.inf)
        row, column = divmod(int(shares.argmin()), len(codes))
        room = rate - entropy_bits(codes)
        if room <= SLACK or not bool(shares.isfinite().any()):
            return joint
        joint = torch.cat([joint, torch.zeros_like(joint[:, :1])], 1)
        _move(joint, row, column, len(codes), room)


def _poured(joint: Tensor, rate: float) -> Tensor:
    """The smallest cells of the lightest column go to the heaviest until H(T) <= rate."""
    while (room := rate - entropy_bits(codes := joint.sum(0))) < -SLACK and len(codes) > 1:
        order = codes.argsort()
        column, heaviest = int(order[0]), int(order[-1])
        row = int(torch.where(joint[:, column] > 0, joint[:, column], math.inf).argmin())
        _move(joint, row, column, heaviest, room)
        joint = joint[:, joint.sum(0) > 0]
    return joint


def _move(joint: Tensor, row: int, source: int, target: int, room: float) -> None:
    """Moves as much of a cell as changes the entropy of the columns by `room`, at most all of it."""
    whole, giver, taker = (
        float(each) for each in (joint[row, source], *joint.sum(0)[[source, target]])
    )

    def gained(mass: float) -> float:
        return sum(map(_bits, (giver - mass, taker + mass))) - _bits(giver) - _bits(taker)

    low, high = 0.0, whole  # the entropy rises, or falls, all the way between
    if abs(gained(whole)) > abs(room):
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if abs(gained(middle)) < abs(room) else (low, middle)
    joint[row, source] = 0.0 if high == whole else joint[row, source] - high
    joint[row, target] += high


def _bits(mass: float) -> float:
    return -mass * math.log2(mass) if mass > 0 else 0.0


def _floats(law: Tensor) -> list[float]:
    return [float(law[place]) for place in range(len(law))]


def _largest_first(group: Group) -> float:
    return -group[0]


def _lost(p: float, q: float) -> float:
    """Entropy that is lost by merging masses p and q."""
    return p * math.log2(1 + q / p) + q * math.log2(1 + p / q)


def _merged(one: Group, other: Group) -> Group:
    return one[0] + other[0], one[1] + other[1]


def coupling_with_bottleneck(
    p: Float[Tensor, "rows"],
    q: Float[Tensor, "columns"],
    *,
    rate: float,
    encoder: Callable[..., Bottleneck] = greedy_bottleneck,
) -> Float[Tensor, "rows columns"]:
    """A joint law of X and Y, Y of law q, through a code of at most `rate` bits: X - T - Y.

        I(X; Y) >= I(X; T) + I(T; Y) - H(T)

    Args:
        p: (n,) law of X.
        q: (m,) law of Y.
        rate: R in bits.
        encoder: of X; `greedy_bottleneck`, the paper's.

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
    joint = encoder(p, rate=rate).joint
    codes = joint.sum(0)
    told = (joint / codes).to_sparse()  # a symbol has few codes
    return told @ greedy_coupling(codes, q)


def check_law(law: Tensor, name: str) -> Float[Tensor, "symbols"]:
    """The law of finitely many symbols in float64, with the sum 1 in that precision; without graph.

    Raises:
        InputError: another shape than (n,), entries below 0 or not finite, or a sum other than 1
            within 1e-6.
    """
    check_tensors(**{name: law})
    if law.is_complex():
        raise InputError(f"{name} is {law.dtype}; expected probabilities (n,), real numbers.")
    law = law.detach()
    good = law.dim() == 1 and law.is_floating_point() and bool((law >= 0).all())
    if not good or abs(float(law.double().sum()) - 1) > 1e-6:
        raise InputError(
            f"{name} is of shape {tuple(law.shape)} and type {law.dtype} with the sum "
            f"{float(law.double().sum()):.6g}; expected probabilities (n,), from 0 on, with sum 1. "
            "Where rounding moved it, give p.double() / p.double().sum()."
        )
    return law.double() / law.double().sum()
