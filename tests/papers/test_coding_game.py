"""The Markov coding game: its policy against a plain loop, and what its receiver learns."""

import math
import operator

import pytest
import torch

from testtime.measures.coupling import greedy_bottleneck, greedy_coupling
from testtime.papers.coding_game import START, WAYS, grid_world, play, soft_policy


def plain_policy(grid, beta, discount, iterations):
    q, worth, moves = [[0.0] * 4] * 64, grid.reward.tolist(), grid.moves.tolist()
    for _ in range(iterations):
        soft = [beta * math.log(sum(math.exp(v / beta) for v in row)) for row in q]
        ahead = [[sum(map(operator.mul, moves[s][a], soft)) for a in range(4)] for s in range(64)]
        q = [[r + discount * v for v in row] for r, row in zip(worth, ahead, strict=True)]
    rows = [[math.exp(v / beta) for v in row] for row in q]
    return torch.tensor([[v / sum(row) for v in row] for row in rows]).double()


def test_the_policy_is_that_of_soft_q_iteration():
    grid = grid_world()
    found = soft_policy(grid, beta=0.1, discount=0.9, iterations=5)
    torch.testing.assert_close(found, plain_policy(grid, 0.1, 0.9, 5), atol=1e-6, rtol=0)


def test_the_grid_is_the_papers():
    grid = grid_world(slip=0.1)
    assert torch.allclose(grid.moves.sum(2)[~grid.final], torch.ones(4).double())
    up = grid.moves[START, 0]  # (5, 4): up is (4, 4), an obstacle, and so is the right, (5, 5)
    assert up.nonzero().flatten().tolist() == [START - 1, START]
    assert float(up[START]) == pytest.approx(0.9)
    assert float(grid.moves[0, 3, 0]) == pytest.approx(0.9)  # walls to the left and above
    assert len(WAYS) == 4
    assert not bool(grid.moves[:, :, 9][~grid.final].any())  # nobody enters an obstacle


def test_at_rate_zero_nothing_is_told_and_at_full_rate_the_belief_is_bayes():
    grid = grid_world()
    policy = soft_policy(grid, beta=math.exp(-4))

    def game(rate):
        chance = torch.Generator().manual_seed(1)
        return play(
            grid, policy, message=2, messages=5, rate=rate, encoder=greedy_bottleneck, chance=chance
        )

    torch.testing.assert_close(game(0.0).belief, torch.full((5,), 0.2).double())
    told = game(3.0)
    assert int(told.belief.argmax()) == 2
    assert told.belief[2] > 0.9
    assert 0 < abs(told.reward) <= 0.95**told.steps + 1e-12
    first = greedy_coupling(torch.full((5,), 0.2).double(), policy[START])
    short = play(
        grid, policy, message=2, messages=5, rate=3.0, encoder=greedy_bottleneck,
        chance=torch.Generator().manual_seed(1), limit=1,
    ).belief  # fmt: skip
    assert any(torch.allclose(short, column / column.sum()) for column in first.T)
