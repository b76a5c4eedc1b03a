import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import monitors as reference
from testtime._core.errors import InputError, OptionError, StateError
from testtime.guard.betting import Grapa, Mixture, OnlineNewton, Starting
from testtime.guard.independence import Independence
from testtime.guard.monitor import Monitor


def draw(seed, n=40, d=2, beta=0.0):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=chance, dtype=torch.float64)
    return x, beta * x[:, :1] + torch.randn(n, 1, generator=chance, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(0, 2), memory=st.sampled_from([4, 10, 100]))
def test_wealth_equals_that_of_the_paper(seed, beta, memory):
    x, y = draw(seed, beta=beta)
    test = Independence(gamma_x=0.3, gamma_y=0.2, memory=memory)
    alarm = Monitor(test).update(x, y)
    expected = reference.independence(x.numpy(), y.numpy(), 0.3, 0.2, memory)
    assert alarm.log_wealth.item() == pytest.approx(expected[-1], abs=1e-8)
    assert bool(alarm) == (max(expected) >= math.log(20))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=12))
@pytest.mark.parametrize("bets", [OnlineNewton(), Grapa(), Mixture(), Starting()])
def test_batches_and_saving_change_nothing(cuts, bets):
    x, y = draw(3, n=sum(cuts), beta=1.0)
    test = Independence(gamma_x=0.3, gamma_y=0.2, bets=bets, memory=12)
    whole = Monitor(test).update(x, y)
    monitor = Monitor(test)
    for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
        state, monitor = monitor.state_dict(), Monitor(test)
        monitor.load_state_dict(state)
        alarm = monitor.update(a, b)
    torch.testing.assert_close(alarm.log_wealth, whole.log_wealth, rtol=1e-9, atol=1e-9)


def test_streams_side_by_side_are_tested_as_alone():
    pairs = [draw(seed, beta=seed / 2) for seed in range(3)]
    x, y = (torch.stack(side, 1) for side in zip(*pairs, strict=True))
    test = Independence(gamma_x=0.3, gamma_y=0.2)
    parts = Monitor(test).update(x, y).parts
    for part, pair in zip(parts, pairs, strict=True):
        torch.testing.assert_close(part, Monitor(test).update(*pair).log_wealth)


def test_a_constant_wins_nothing_and_memory_is_bounded():
    x, y = draw(0, n=300)
    test = Independence(gamma_x=0.3, gamma_y=0.2, memory=20)
    monitor = Monitor(test)
    assert monitor.update(torch.ones(300, 2), y).log_wealth == 0
    monitor.reset()
    for a, b in zip(x.split(10), y.split(10), strict=True):
        monitor.update(a, b)
    assert len(monitor.state_dict()["x"]) == 20


def test_input_stays_as_it_was_and_bad_input_changes_nothing():
    x, y = draw(0, beta=1.0)
    kept = x.clone(), y.clone()
    monitor = Monitor(Independence.fit(x[:10], y[:10]))
    monitor.update(x, y)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    before = monitor.state_dict()
    for bad, said in (
        ((x, y[:-1]), "same n"),
        ((x[:, 0], y[:, 0]), "expected"),
        ((x[:, :1], y), "those before"),
        ((x * math.nan, y), "NaN"),
        ((x[:0], y[:0]), "empty"),
    ):
        with pytest.raises(InputError, match=said):
            monitor.update(*bad)
    for name, value in monitor.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_bad_options_and_states_are_refused():
    x, y = draw(0)
    with pytest.raises(InputError, match="constant"):
        Independence.fit(torch.ones(10, 1), y)
    with pytest.raises(InputError, match="at least 2"):
        Independence.fit(x[:1], y[:1])
    for bad in ({"memory": 3}, {"memory": 0}, {"alpha": 0.0}, {"gamma_x": -1.0}):
        with pytest.raises(OptionError):
            Independence(**({"gamma_x": 1.0, "gamma_y": 1.0} | bad))
    state = Monitor(Independence(gamma_x=1.0, gamma_y=1.0)).state_dict()
    with pytest.raises(StateError, match="expects"):
        Monitor(Independence(gamma_x=1.0, gamma_y=1.0, bets=Mixture())).load_state_dict(state)
