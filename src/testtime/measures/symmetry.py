"""Divergences of laws that a finite group of isometries leaves as they are, from fewer samples.

    W1_S     optimal transport with the cost min_g |x - g y|
    D_a^S    Lipschitz-regularised alpha-divergence with the same cost
    MMD_S    with the kernel mean_g k(g x, y)
    T_0(x)   the point of the orbit of x in a fundamental domain

If both laws are invariant, these tell the same as the plain divergences of the laws, and of samples
they err less: W1 and D_a as if there were |S| times as many. A group is its matrices (|S|, d, d).
"""

import itertools
import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import check_tensors, magnitude
from testtime._core.errors import InputError, MissingExtra, OptionError
from testtime._core.options import in_range, whole
from testtime.measures.lipschitz import lipschitz_divergence

LARGEST = 50_000
"""Elements of a group at most."""
AT_ONCE = 2**22
"""Products of a sample and an element of the group that are held at one time."""


def sign_flips(dims: int) -> Float[Tensor, "group dims dims"]:
    """The 2^d changes of sign of the coordinates.

    Example:
        >>> sign_flips(3).shape
        torch.Size([8, 3, 3])
    """
    whole(1, dims=dims)
    _check_size(2 ** min(dims, 16), f"2^{dims}")
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=dims)), device="cpu")
    return torch.diag_embed(signs)


def permutations(dims: int) -> Float[Tensor, "group dims dims"]:
    """The d! orders of the coordinates.

    Example:
        >>> permutations(2).tolist()
        [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]
    """
    whole(1, dims=dims)
    _check_size(math.factorial(min(dims, 9)), f"{dims}!")
    return torch.eye(dims, device="cpu")[
        torch.tensor(list(itertools.permutations(range(dims))), device="cpu")
    ]


def rotations(order: int) -> Float[Tensor, "group 2 2"]:
    """The turns of the plane by multiples of 360 / order degrees.

    Example:
        >>> rotations(4).shape
        torch.Size([4, 2, 2])
    """
    whole(1, order=order)
    _check_size(order, str(order))
    angle = torch.arange(order, dtype=torch.double, device="cpu") * (2 * math.pi / order)
    rows = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
    return torch.stack(rows, -1).view(order, 2, 2)


def _check_size(count: int, said: str) -> None:
    if count > LARGEST:
        raise InputError(f"the group has {said} elements; expected at most {LARGEST}.")


def invariant_distances(
    x: Float[Tensor, "m dims"], y: Float[Tensor, "n dims"], group: Float[Tensor, "group dims dims"]
) -> Float[Tensor, "m n"]:
    """min_g |x_i - g y_j|: distances between orbits. One group element is held at a time.

    Raises:
        InputError: samples that are not finite (m, d) and (n, d), or a group that is not made of
            orthogonal matrices of that d, or distances beyond float64.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> invariant_distances(x, -x, sign_flips(2))
        tensor([[0.]], dtype=torch.float64)
    """
    x, y, group = _checked(x, y, group)
    scale = magnitude(torch.maximum(x.abs().max(), y.abs().max()))
    x, y = x / scale, y / scale  # squares of huge and tiny samples are no numbers
    nearest = torch.full((len(x), len(y)), math.inf, dtype=x.dtype, device=x.device)
    for element in group:
        moved = torch.cdist(x, y @ element.mT, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = torch.minimum(nearest, moved)
    nearest = nearest * scale
    if not bool(nearest.isfinite().all()):
        raise InputError("samples are so far apart that distances overflow; scale them all down.")
    return nearest


def invariant_wasserstein(
    x: Float[Tensor, "m dims"], y: Float[Tensor, "n dims"], group: Float[Tensor, "group dims dims"]
) -> float:
    """W1 between samples of two invariant laws, by exact optimal transport between orbits.

    Never above the plain W1, which is that of the group with one element. Needs POT.

    Raises:
        InputError: as `invariant_distances`.
        MissingExtra: POT is not installed.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> invariant_wasserstein(x, -x, sign_flips(1)), invariant_wasserstein(x, -x, torch.eye(1)[None])
        (0.0, 4.0)

    Reference: Chen, Katsoulakis, Rey-Bellet, Zhu, Sample Complexity of Probability Divergences
        under Group Symmetry, ICML 2023.
    """
    try:
        import ot  # noqa: PLC0415  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise MissingExtra("POT", "transport") from error
    cost = invariant_distances(x, y, group).double().cpu()
    scale = magnitude(cost.max())  # to POT, costs that differ by some 1e-15 are equal
    found = cast(float, ot.emd2([], [], (cost / scale).numpy(), numItermax=10_000_000))  # pyright: ignore[reportUnknownMemberType]
    return found * float(scale)


def invariant_alpha_divergence(
    x: Float[Tensor, "m dims"],
    y: Float[Tensor, "n dims"],
    group: Float[Tensor, "group dims dims"],
    *,
    alpha: float = 2.0,
) -> float:
    """The Lipschitz-regularised alpha-divergence of samples of two invariant laws, of x from y.

    The supremum over functions that are 1-Lipschitz and invariant, as
    [`lipschitz_divergence`][testtime.measures.lipschitz.lipschitz_divergence] finds it between orbits.
    Never above the plain one, which is that of the group with one element, nor above W1. It is not
    symmetric in x and y.

    Raises:
        InputError: as `invariant_distances`.
        OptionError, WorkFailed: as `lipschitz_divergence`.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> round(invariant_alpha_divergence(x, -x, sign_flips(1)), 6)
        0.0
        >>> round(invariant_alpha_divergence(x, -x, torch.eye(1)[None]), 6)
        3.5

    Reference: Chen, Katsoulakis, Rey-Bellet, Zhu, Sample Complexity of Probability Divergences
        under Group Symmetry, ICML 2023.
    """
    return lipschitz_divergence(invariant_distances(x, y, group), alpha=alpha)


def fundamental_domain(
    x: Float[Tensor, "n dims"], group: Float[Tensor, "group dims dims"]
) -> Float[Tensor, "n dims"]:
    """Each sample moved by the element of the group that brings it nearest to (1, √2, √3, ...).

    The domain is what lies no nearer to an image of that point: under changes of sign the samples with
    no negative coordinate, under permutations those in ascending order. A plain divergence of the moved
    samples is one of the invariant laws too. Where reflections make the group, as they make these
    two, it is the invariant one; elsewhere, as of rotations, it may lie above, since two points on
    either side of the domain can have orbits that are close.

    Raises:
        InputError: as `invariant_distances`, and a group that leaves (1, √2, √3, ...) where it is by
            more than one element.

    Example:
        >>> fundamental_domain(torch.tensor([[3.0, -2.0]]), sign_flips(2))
        tensor([[3., 2.]], dtype=torch.float64)
        >>> fundamental_domain(torch.tensor([[3.0, -2.0]]), permutations(2))
        tensor([[-2.,  3.]], dtype=torch.float64)

    Reference: Chen, Katsoulakis, Rey-Bellet, Zhu, Sample Complexity of Probability Divergences
        under Group Symmetry, ICML 2023.
    """
    x, _, group = _checked(x, x, group)
    anchor = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device).sqrt()
    if torch.cdist(group @ anchor, anchor[None]).lt(1e-4).sum() > 1:
        raise InputError(
            "more than one element of the group leaves (1, √2, √3, ...) where it is; expected each "
            "element once, and a group that acts on every coordinate. Turn the samples and the group."
        )
    images, scale = (group.mT @ anchor).mT, magnitude(x.abs().max())
    size = max(1, AT_ONCE // len(group))
    parts = [
        torch.einsum("nij,nj->ni", group[(part / scale @ images).argmax(1)], part)
        for part in torch.split(x, size)
    ]
    return torch.cat(parts)


def invariant_mmd(
    x: Float[Tensor, "m dims"],
    y: Float[Tensor, "n dims"],
    group: Float[Tensor, "group dims dims"],
    *,
    bandwidth: float,
) -> float:
    """Maximum mean discrepancy (not squared) with a Gaussian kernel averaged over the group.

    Of all pairs, those of a sample with itself among them, so that it is never below 0.

    Args:
        x: (m, d).
        y: (n, d).
        group: (|S|, d, d).
        bandwidth: s in exp(-|a - b|^2 / (2 s^2)).

    Raises:
        InputError: as `invariant_distances`.
        OptionError: a bandwidth that is not above 0, or has no square in float64.

    Example:
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> invariant_mmd(x, -x, sign_flips(1), bandwidth=1.0)
        0.0

    Reference: Chen, Katsoulakis, Rey-Bellet, Zhu, Sample Complexity of Probability Divergences
        under Group Symmetry, ICML 2023.
    """
    in_range(0, bandwidth=bandwidth)
    if not 1e-150 < bandwidth < 1e150:
        raise OptionError(f"bandwidth is {bandwidth}; expected a number above 0, 1e-150 to 1e150.")
    x, y, group = _checked(x, y, group)

    def mean(a: Tensor, b: Tensor) -> float:
        total = 0.0
        for element in group:
            apart = torch.cdist(a, b @ element.mT, compute_mode="donot_use_mm_for_euclid_dist")
            total += float(apart.square().div(-2 * bandwidth**2).exp().mean())
        return total / len(group)

    return math.sqrt(max(mean(x, x) + mean(y, y) - 2 * mean(x, y), 0.0))


def _checked(x: Tensor, y: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in float64, once they fit."""
    check_tensors(x=x, y=y, group=group)
    for name, samples in (("x", x), ("y", y)):
        good = samples.dim() == 2 and samples.is_floating_point() and samples.numel() > 0
        if not good or not bool(samples.isfinite().all()) or samples.shape[1] != x.shape[-1]:
            raise InputError(
                f"{name} is of shape {tuple(samples.shape)} and type {samples.dtype}; expected "
                f"finite samples (n, {x.shape[-1] if x.dim() else 1})."
            )
    dims = x.shape[1]
    if group.is_complex():
        raise InputError(f"the group is {group.dtype}; expected real orthogonal matrices.")
    group = group.detach().to(x.device).double()
    square = group.dim() == 3 and len(group) > 0 and group.shape[1:] == (dims, dims)
    if not square or not torch.allclose(
        group @ group.mT, torch.eye(dims, dtype=torch.double, device=x.device), atol=1e-5
    ):
        raise InputError(
            f"the group is of shape {tuple(group.shape)}; expected orthogonal matrices (elements, "
            f"{dims}, {dims}), e.g. sign_flips({dims})."
        )
    return x.detach().double(), y.detach().double(), group
