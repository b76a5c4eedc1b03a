import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import monitors as reference
from testtime._core.errors import OptionError
from testtime.guard.betting import Grapa, Mixture, OnlineNewton, Starting

ALL = [OnlineNewton(), Grapa(), Mixture(), Starting()]
payoffs = st.lists(st.floats(-1, 1), min_size=1, max_size=30)


def run(bets, values, streams=()):
    return bets.run(bets.init(torch.Size(streams)), torch.tensor(values, dtype=torch.float64))[1]


@settings(max_examples=40, deadline=None)
@given(values=payoffs)
def test_wealth_follows_its_definition(values):
    assert run(Grapa(), values)[-1] == pytest.approx(reference.grapa(values), abs=1e-9)
    for bets, definition in ((Mixture(), reference.mixture), (Starting(), reference.starting)):
        expected = definition(values, bets.fractions)
        assert run(bets, values)[-1] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(values=payoffs, cut=st.integers(0, 30))
@pytest.mark.parametrize("bets", ALL, ids=lambda b: type(b).__name__)
def test_batches_change_nothing(bets, values, cut):
    whole, state, path = run(bets, values), bets.init(torch.Size()), []
    for part in (values[:cut], values[cut:]):
        if part:
            state, wealth = bets.run(state, torch.tensor(part, dtype=torch.float64))
            path.append(wealth)
    torch.testing.assert_close(torch.cat(path), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bets", ALL, ids=lambda b: type(b).__name__)
def test_wealth_is_one_in_the_mean_for_fair_payoffs(bets):
    """All 2^10 streams of ten fair coins: the mean is exact."""
    coins = 2 * ((torch.arange(1024)[None] >> torch.arange(10)[:, None]) & 1).double() - 1
    _, path = bets.run(bets.init(torch.Size([1024])), coins)
    torch.testing.assert_close(path.exp().mean(1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("bets", ALL, ids=lambda b: type(b).__name__)
def test_wealth_grows_when_payoffs_are_good_and_never_ends(bets):
    assert run(bets, [0.5] * 200)[-1] > math.log(1000)
    assert run(bets, [-1.0] * 2000).isfinite().all()


def test_a_late_change_costs_starting_little():
    """After 10,000 losing bets 60 good ones are enough; who always bets has lost all."""
    values = [-0.5] * 10_000 + [0.9] * 60
    assert run(Starting(), values)[-1] > math.log(20)
    assert run(Mixture(), values)[-1] < -200


@pytest.mark.parametrize("bets", ALL, ids=lambda b: type(b).__name__)
def test_a_state_keeps_no_path(bets):
    state, _ = bets.run(bets.init(torch.Size()), torch.zeros(2000))
    assert sum(each.untyped_storage().nbytes() for each in state.values()) < 1000


def test_no_more_than_the_limit_is_bet_and_nothing_on_a_loser():
    for bets, first in ((OnlineNewton(limit=0.2), 0.0), (Grapa(limit=0.2), 1e-3)):
        expected = math.log1p(first) + 4 * math.log(1.2)
        assert run(bets, [1.0] * 5)[-1] == pytest.approx(expected)
        assert run(bets, [-1.0] * 5)[-1] == pytest.approx(math.log1p(-first))


def test_fractions_that_can_lose_all_are_refused():
    for bad in (
        lambda: Mixture(fractions=(1.0,)),
        lambda: Starting(fractions=()),
        lambda: OnlineNewton(limit=0.0),
        lambda: Grapa(limit=float("nan")),
    ):
        with pytest.raises(OptionError, match="between 0 and 1"):
            bad()
