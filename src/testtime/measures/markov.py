"""Markov chains from one path: the transition matrix, and what is lost by not knowing it.

    M_ij = (N_ij + b(N_ij)) / sum_j (N_ij + b(N_ij)),   N_ij: steps from i to j

With b = 1/2 and every transition at least delta, n pi_i E D_f(M_i || estimate_i) tends to
f''(1) (k - 1) / 2; f''(1) is 1 for KL, 2 for chi-squared, 1/4 for squared Hellinger. Without such a
floor a state that is seen a few times only keeps its error however long the path is.
"""

from contextlib import suppress
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError, unknown
from testtime._core.options import in_range, whole
from testtime._core.seeds import check_generator

Smoothing = float | Literal["braess-sauer"]
Divergence = Literal["kl", "chi-squared", "hellinger"]

BRAESS_SAUER = (0.5, 1.0, 0.75)
"""What is added to a count of 0, of 1, and of 2 or more (Braess and Sauer, 2004)."""


def transition_counts(
    path: Int[Tensor, "*batch steps"], *, states: int
) -> Int[Tensor, "*batch states states"]:
    """How often each step from state i (row) to state j (column) occurs along each path.

    Args:
        path: (..., n) states from 0 to `states` - 1; n >= 2.
        states: k.

    Raises:
        InputError: a path of fewer than two states, of other than whole numbers, or with a state
            out of range.

    Example:
        >>> transition_counts(torch.tensor([0, 1, 1, 0, 1]), states=2)
        tensor([[0, 2],
                [1, 1]])
    """
    whole(1, states=states)
    check_tensors(path=path)
    if path.is_floating_point() or path.is_complex() or not path.dim() or path.shape[-1] < 2:
        raise InputError(
            f"the path is of shape {tuple(path.shape)} and type {path.dtype}; expected whole numbers "
            "(..., n), two or more states in a row."
        )
    low, high = (int(path.min()), int(path.max())) if path.numel() else (0, 0)
    if low < 0 or high >= states:
        raise InputError(f"the path has states from {low} to {high}; expected 0 to {states - 1}.")
    steps = path[..., :-1].long() * states + path[..., 1:].long()
    counts = torch.zeros(*path.shape[:-1], states * states, dtype=torch.long, device=path.device)
    counts.scatter_add_(-1, steps, torch.ones_like(steps))
    return counts.view(*path.shape[:-1], states, states)


def transition_matrix(
    counts: Int[Tensor, "*batch states states"], *, smoothing: Smoothing = 0.5
) -> Float[Tensor, "*batch states states"]:
    """The transition matrix that counts tell of; rows are positive and sum to 1, float64.

    A row that was never left is uniform, unless nothing is added: then it is an error.

    Args:
        counts: (..., k, k), from `transition_counts`.
        smoothing: what is added to each count: 1/2 (Krichevsky and Trofimov), 1 (Laplace), any
            other number from 0 on, or "braess-sauer", 1/2, 1 or 3/4 by the count, which has the
            smallest worst loss of all that add constants.

    Raises:
        InputError: counts that are no square of whole numbers from 0 on; a row without any where
            nothing is added.
        OptionError: smoothing below 0, or so large that rows have no finite sum.
        UnknownName: smoothing of another name.

    Example:
        >>> transition_matrix(torch.tensor([[0, 2], [1, 1]]))
        tensor([[0.1667, 0.8333],
                [0.5000, 0.5000]], dtype=torch.float64)

    Reference: Hao, Orlitsky, Pichapati, On Learning Markov Chains, NeurIPS 2018.
    """
    check_tensors(counts=counts)
    square = counts.dim() > 1 and counts.shape[-1] == counts.shape[-2] > 0
    if not square or counts.is_floating_point() or counts.is_complex() or bool((counts < 0).any()):
        raise InputError(
            f"the counts are of shape {tuple(counts.shape)} and type {counts.dtype}; expected whole "
            "numbers from 0 on, (..., states, states), as transition_counts gives them."
        )
    added = counts.double() + _added(counts, smoothing)
    total = added.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise InputError("a state was never left and nothing is added; give smoothing above 0.")
    if not bool(total.isfinite().all()):
        raise OptionError(f"smoothing is {smoothing}; expected less, the rows have no finite sum.")
    return added / total


def _added(counts: Tensor, smoothing: Smoothing) -> Tensor | float:
    if isinstance(smoothing, str):
        if smoothing != "braess-sauer":
            raise unknown("smoothing", smoothing, ["braess-sauer"])
        none, one, more = BRAESS_SAUER
        return torch.where(counts == 0, none, torch.where(counts == 1, one, more))
    in_range(0, smoothing=smoothing)
    return smoothing


def stationary_law(
    transitions: Float[Tensor, "*batch states states"],
) -> Float[Tensor, "*batch states"]:
    """The law pi = pi M of a chain with one closed class; states that are left for good have 0.

    By elimination of state after state without a subtraction (Grassmann, Taksar and Heyman, 1985), so
    that the rarest of states has as many digits as the others.

    Raises:
        InputError: rows that are no distributions, a chain with more than one such law, or one whose
            steps are too rare for double precision.

    Example:
        >>> stationary_law(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    matrix = check_rows(transitions, "transitions")
    count = matrix.shape[-1]
    closed = _reached(matrix).all(-2)
    if not bool(closed.any(-1).all()):
        raise InputError("the chain falls apart; expected one stationary law, so one closed class.")
    # eliminated from the last to the second; all of them lead to the first
    order = (~closed).to(torch.int8).argsort(dim=-1, stable=True)
    left = matrix.gather(-2, order[..., :, None].expand_as(matrix))
    left = left.gather(-1, order[..., None, :].expand_as(matrix))
    into: list[Tensor] = []
    for state in range(count - 1, 0, -1):
        out = left[..., state, :state]
        into.append(left[..., :state, state] / out.sum(-1, keepdim=True))
        left = left[..., :state, :state] + into[-1][..., None] * out[..., None, :]
    law = torch.ones_like(matrix[..., :1, 0])
    for rates in reversed(into):
        law = torch.cat([law, (law * rates).sum(-1, keepdim=True)], -1)
        law = law / law.amax(-1, keepdim=True)
    law = law / law.sum(-1, keepdim=True)
    if not bool(law.isfinite().all()):
        raise InputError("steps are so rare that their products are 0; expected more of each.")
    return law.gather(-1, order.argsort(-1))


def _reached(matrix: Tensor) -> Tensor:
    """Which states (columns) can be reached from which, in any number of steps, none among them."""
    count = matrix.shape[-1]
    reached = ((matrix > 0) | torch.eye(count, dtype=torch.bool, device=matrix.device)).float()
    for _ in range(max(count - 1, 1).bit_length()):
        reached = (reached @ reached > 0).float()
    return reached > 0


def row_divergence(
    truth: Float[Tensor, "*batch states states"],
    estimate: Float[Tensor, "*batch states states"],
    *,
    kind: Divergence = "kl",
) -> Float[Tensor, "*batch states"]:
    """D_f(M_i || estimate_i) of each row, in nats for "kl"; infinite where the estimate misses mass.

    "kl" is sum p ln(p / q), "chi-squared" sum (p - q)^2 / q, "hellinger" half of
    sum (sqrt p - sqrt q)^2. The loss of a prediction from a path that ends in state i is that of
    row i; the loss of an estimate is the largest.

    Raises:
        InputError: rows that are no distributions, or shapes that do not go together.
        UnknownName: another kind.

    Example:
        >>> truth = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
        >>> row_divergence(truth, truth.flip(0), kind="chi-squared")
        tensor([0.3333, 0.2500], dtype=torch.float64)

    Reference: Hao, Orlitsky, Pichapati, On Learning Markov Chains, NeurIPS 2018.
    """
    p, q = check_rows(truth, "truth"), check_rows(estimate, "estimate")
    together: torch.Size | None = None
    with suppress(RuntimeError):
        together = cast(torch.Size, torch.broadcast_shapes(p.shape, q.shape))  # pyright: ignore[reportUnknownMemberType]
    if together is None or p.shape[-1] != q.shape[-1]:
        raise InputError(
            f"truth is of shape {tuple(truth.shape)}, the estimate of {tuple(estimate.shape)}; "
            "expected the same states, and batches that go together."
        )
    p, q = p.expand(together), q.expand(together)
    # what is equal, or not there, adds nothing, and has no gradient that is NaN
    none = p == 0 if kind == "kl" else p == q
    p, q = torch.where(none, 1.0, p), torch.where(none, 1.0, q)
    if kind == "kl":
        terms = p * (p.log() - q.log())
    elif kind == "chi-squared":
        terms = (p - q).square() / q
    elif kind == "hellinger":
        terms = 0.5 * (p.sqrt() - q.sqrt()).square()
    else:
        raise unknown("divergence", kind, ["kl", "chi-squared", "hellinger"])
    return torch.where(none, 0.0, terms).sum(-1)


def check_rows(matrix: Tensor, name: str) -> Tensor:
    """The matrix in float64; refuses what is no square of rows that are distributions.

    Raises:
        InputError: another shape, complex numbers, an entry below 0 or not finite, or a row that does
            not sum to 1 within 1e-6.
    """
    check_tensors(**{name: matrix})
    if matrix.is_complex():
        raise InputError(f"{name} is {matrix.dtype}; expected real numbers.")
    matrix = matrix.double()
    square = matrix.dim() > 1 and matrix.shape[-1] == matrix.shape[-2] > 0
    if square and bool((matrix >= 0).all() & ((matrix.sum(-1) - 1).abs() < 1e-6).all()):
        return matrix
    sums = matrix.detach().sum(-1) if matrix.dim() else matrix
    raise InputError(
        f"{name} is of shape {tuple(matrix.shape)} with rows that sum to {sums}; expected "
        "(..., states, states), entries from 0 on, each row with the sum 1."
    )


def sample_path(
    transitions: Float[Tensor, "states states"],
    *,
    steps: int,
    paths: int,
    generator: torch.Generator,
    start: Float[Tensor, "states"] | None = None,
) -> Int[Tensor, "paths steps"]:
    """Paths of a chain that begin in its stationary law, or in the one that is given.

    Args:
        transitions: (k, k).
        steps: states of each path, n.
        paths: how many.
        generator: of the draws.
        start: law of the first state.

    Raises:
        InputError: as `stationary_law`; a start that is no law of the states.

    Example:
        >>> flip = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> sample_path(flip, steps=4, paths=1, generator=torch.Generator().manual_seed(0)).diff()
        tensor([[-1,  1, -1]])
    """
    whole(1, steps=steps, paths=paths)
    matrix = check_rows(transitions, "transitions")
    if matrix.dim() != 2:
        raise InputError(f"transitions are {tuple(matrix.shape)}; expected one chain (k, k).")
    check_generator(generator)
    if start is not None:
        check_tensors(start=start)
        if start.is_complex():
            raise InputError(f"start is {start.dtype}; expected real numbers.")
    law = stationary_law(matrix) if start is None else start.double()
    if law.shape != transitions.shape[:1] or not bool(
        (law >= 0).all() & ((law.sum() - 1).abs() < 1e-6)
    ):
        raise InputError(f"start is {law}; expected a law of {len(transitions)} states.")
    # ends in 1 to the last digit, which no chance reaches; below 1 it leads to states of probability 0
    borders, first = (each / each[..., -1:] for each in (matrix.cumsum(-1), law.cumsum(0)))
    chance = torch.rand(
        steps, paths, generator=generator, dtype=torch.double, device=generator.device
    ).to(law.device)
    now = torch.searchsorted(first, chance[0], right=True)
    path = [now]
    for draw in chance[1:]:
        now = (borders[now] <= draw[:, None]).sum(-1)
        path.append(now)
    return torch.stack(path, 1)
