"""A Markov coding game: an agent walks to a goal, and tells a message by the way it takes.

    policy   soft Q:  Q(s, a) = r(s) + γ Σ_s' P(s' | s, a) β ln Σ_a' e^( Q(s', a') / β )
             π(a | s) ∝ e^( Q(s, a) / β )
    begin    belief = the message's prior
    repeat   J = the coupling of belief and π(. | s), the message told in at most R bits
             a ~ J[message, :];  s ~ P(. | s, a);  belief ← J[:, a]              # both normalised
    until    s is final; the receiver, who saw the ways, answers the likeliest message

As π is a marginal of J, the agent's reward is on average that of π, whatever R is; what R and the
encoder change is how much of the message arrives. The grid is that of the paper's code: 8 x 8, goal
and trap in the last column, obstacles on the diagonal, a step aside with probability 0.1 each.

Reference: Ebrahimi, Chen, Khisti, Minimum Entropy Coupling with Bottleneck, NeurIPS 2024; the game:
Sokota et al., Communicating via Markov Decision Processes, ICML 2022.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from testtime.measures.coupling import Bottleneck, coupling_with_bottleneck

SIDE, START = 8, 5 * 8 + 4
WAYS = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Up, right, down, left."""


class Grid(NamedTuple):
    """Where steps lead and what places are worth.

    Attributes:
        moves: (cells, ways, cells) P(s' | s, a), 0 from final cells.
        reward: (cells,).
        final: (cells,) bool.
    """

    moves: Tensor
    reward: Tensor
    final: Tensor


class Episode(NamedTuple):
    """How a game ended.

    Attributes:
        reward: discounted.
        belief: (messages,) of the receiver.
        steps: taken.
    """

    reward: float
    belief: Tensor
    steps: int


def grid_world(*, slip: float = 0.1) -> Grid:
    """The grid of the paper's code.

    Args:
        slip: probability of a step to the left, and of one to the right, of the way taken.

    Example:
        >>> grid = grid_world()
        >>> grid.moves.shape, grid.reward.nonzero().flatten().tolist()
        (torch.Size([64, 4, 64]), [7, 15])
    """
    moves = torch.zeros(SIDE * SIDE, len(WAYS), SIDE * SIDE, dtype=torch.float64)
    reward = torch.zeros(SIDE * SIDE, dtype=torch.float64)
    reward[SIDE - 1], reward[2 * SIDE - 1] = 1.0, -1.0
    for cell in range(SIDE * SIDE):
        for way in range(len(WAYS)):
            for turn, chance in ((-1, slip), (0, 1 - 2 * slip), (1, slip)):
                moves[cell, way, _next(cell, (way + turn) % len(WAYS))] += chance
    final = reward != 0
    moves[final] = 0
    return Grid(moves, reward, final)


def _next(cell: int, way: int) -> int:
    down, across = WAYS[way]
    row, column = cell // SIDE + down, cell % SIDE + across
    wall = not (0 <= row < SIDE and 0 <= column < SIDE)
    return cell if wall or row == column > 0 else row * SIDE + column


def soft_policy(
    grid: Grid, *, beta: float, discount: float = 0.95, iterations: int = 100
) -> Tensor:
    """π (cells, ways), the more random the larger β is.

    Example:
        >>> soft_policy(grid_world(), beta=1e-3).shape
        torch.Size([64, 4])
    """
    q = torch.zeros(grid.moves.shape[:2], dtype=torch.float64)
    for _ in range(iterations):
        ahead = grid.moves @ (beta * (q / beta).logsumexp(1))
        q = grid.reward[:, None] + discount * ahead  # nothing lies ahead of a final cell
    return (q / beta).softmax(1)


def play(
    grid: Grid,
    policy: Tensor,
    *,
    message: int,
    messages: int,
    rate: float,
    encoder: Callable[..., Bottleneck],
    chance: torch.Generator,
    discount: float = 0.95,
    limit: int = 1000,
) -> Episode:
    """One game from the start of the paper's code, with a uniform prior.

    Args:
        grid: where it is played.
        policy: π (cells, ways).
        message: to be told, from 0 on.
        messages: how many there are.
        rate: R in bits, of each step.
        encoder: of the belief, e.g. `greedy_bottleneck`.
        chance: draws the ways and where they lead.
        discount: γ of the reward.
        limit: steps at most.

    Example:
        >>> from testtime.measures.coupling import greedy_bottleneck
        >>> grid = grid_world()
        >>> told = play(grid, soft_policy(grid, beta=0.05), message=3, messages=8, rate=3.0,
        ...             encoder=greedy_bottleneck, chance=torch.Generator().manual_seed(0))
        >>> int(told.belief.argmax())
        3
    """
    belief = torch.full((messages,), 1 / messages, dtype=torch.float64)
    cell, reward, step = START, 0.0, 0
    while step < limit and not bool(grid.final[cell]):
        step += 1
        joint = coupling_with_bottleneck(belief, policy[cell], rate=rate, encoder=encoder)
        way = int(torch.multinomial(joint[message], 1, generator=chance))
        belief = joint[:, way] / joint[:, way].sum()
        cell = int(torch.multinomial(grid.moves[cell, way], 1, generator=chance))
        reward += discount**step * float(grid.reward[cell])
    return Episode(reward, belief, step)
