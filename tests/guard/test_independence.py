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
from testtime.guard.witnesses import WITNESSES, incomplete_cholesky, kernel, leading_pair


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


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(0, 2), memory=st.sampled_from([10, 100]))
@pytest.mark.parametrize(("witness", "kappa"), [("coco", None), ("kcc", 0.1)])
def test_bets_on_the_leading_pair_equal_those_of_the_paper(witness, kappa, seed, beta, memory):
    x, y = draw(seed, beta=beta)
    test = Independence(
        gamma_x=0.3, gamma_y=0.2, memory=memory, witness=witness, bets=Mixture(fractions=(0.5,))
    )
    wealth = Monitor(test).update(x, y).log_wealth.item()
    payoffs = reference.correlated_independence(x.numpy(), y.numpy(), 0.3, 0.2, kappa, memory)
    assert wealth == pytest.approx(sum(math.log1p(f / 2) for f in payoffs), abs=1e-6)
    assert max(map(abs, payoffs)) <= 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.floats(0, 2), far=st.sampled_from([0.0, 1e4]))
def test_bets_of_the_linear_witness_are_those_of_the_moments(seed, beta, far):
    x, y = draw(seed, beta=beta)
    test = Independence(witness="linear", bets=Mixture(fractions=(0.5,)))
    wealth = Monitor(test).update(x + far, 1e6 * y - far).log_wealth.item()
    payoffs = reference.linear_independence(x.numpy(), y.numpy())
    assert wealth == pytest.approx(sum(math.log1p(f / 2) for f in payoffs), abs=1e-6)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), witness=st.sampled_from(["hsic", "coco", "kcc", "linear"]))
def test_the_payoff_changes_its_sign_where_the_y_are_exchanged(seed, witness):
    x, y = draw(seed, n=32, beta=1.0)
    other = y.clone()
    other[30], other[31] = y[31], y[30]
    test = Independence(gamma_x=0.3, gamma_y=0.2, witness=witness, bets=Mixture(fractions=(0.5,)))
    before, one, two = (
        Monitor(test).update(a, b).log_wealth for a, b in ((x[:30], y[:30]), (x, y), (x, other))
    )
    payoff, exchanged = (2 * (each - before).expm1() for each in (one, two))
    torch.testing.assert_close(exchanged, -payoff)
    assert payoff != 0


@pytest.mark.parametrize("witness", WITNESSES)
def test_the_mean_wealth_of_independent_streams_is_at_most_one(witness):
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, 100, 1, generator=chance, dtype=torch.float64)
    test = Independence(gamma_x=0.25, gamma_y=0.25, witness=witness)
    wealth = Monitor(test).update(x, y).parts.exp()
    assert float(wealth.mean()) <= 1 + 3 * float(wealth.std()) / 10
    assert float(wealth.std()) > 0.01


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_both_functions_of_the_leading_pair_have_a_norm_of_at_most_one(ridge):
    x, y = draw(0, n=60, beta=1.0)
    for points, weights in zip((x, y), leading_pair(x, y, (0.3, 0.2), ridge=ridge), strict=True):
        gamma = 0.3 if points is x else 0.2
        matrix = torch.stack([kernel(gamma, points, each) for each in points])
        factor, left = incomplete_cholesky(points, gamma, tolerance=0.06)
        rest = matrix - factor @ factor.T
        assert float(rest.trace()) == pytest.approx(float(left), abs=1e-9)
        assert 0 <= float(left) <= 0.06
        assert factor.shape[1] < 60
        assert 0.9 < float(weights @ matrix @ weights) <= 1 + 1e-9
        assert float(weights.sum()) == pytest.approx(0, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), min_size=1, max_size=12))
@pytest.mark.parametrize(
    ("bets", "witness"),
    [(OnlineNewton(), "hsic"), (Grapa(), "linear"), (Mixture(), "kcc"), (Starting(), "coco")],
)
def test_batches_and_saving_change_nothing(cuts, bets, witness):
    x, y = draw(3, n=sum(cuts), beta=1.0)
    test = Independence(gamma_x=0.3, gamma_y=0.2, bets=bets, memory=12, witness=witness)
    whole = Monitor(test).update(x, y)
    monitor = Monitor(test)
    for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
        state, monitor = monitor.state_dict(), Monitor(test)
        monitor.load_state_dict(state)
        alarm = monitor.update(a, b)
    torch.testing.assert_close(alarm.log_wealth, whole.log_wealth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("witness", WITNESSES)
def test_streams_side_by_side_are_tested_as_alone(witness):
    pairs = [draw(seed, beta=seed / 2) for seed in range(3)]
    x, y = (torch.stack(side, 1) for side in zip(*pairs, strict=True))
    test = Independence(gamma_x=0.3, gamma_y=0.2, witness=witness)
    parts = Monitor(test).update(x, y).parts
    for part, pair in zip(parts, pairs, strict=True):
        torch.testing.assert_close(part, Monitor(test).update(*pair).log_wealth)


@pytest.mark.parametrize("witness", WITNESSES)
def test_a_constant_wins_nothing_and_memory_is_bounded(witness):
    x, y = draw(0, n=300)
    test = Independence(gamma_x=0.3, gamma_y=0.2, memory=20, witness=witness)
    monitor = Monitor(test)
    assert monitor.update(torch.ones(300, 2), y).log_wealth == 0
    monitor.reset()
    for a, b in zip(x.split(10), y.split(10), strict=True):
        monitor.update(a, b)
    state = monitor.state_dict()
    assert witness == "linear" or len(state["x"]) == 20
    assert max(value.numel() for value in state.values()) <= 40


@pytest.mark.parametrize("witness", WITNESSES)
def test_numbers_whose_squares_overflow_are_never_nan(witness):
    x, y = draw(0, n=40, beta=1.0)
    test = Independence(gamma_x=0.3, gamma_y=0.2, witness=witness)
    for size in (1e80, 1e200, 1e-200):
        assert bool(Monitor(test).update(size * x, size * y).log_wealth.isfinite())


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


def test_only_witnesses_with_kernels_need_their_widths():
    x, y = draw(0, beta=1.0)
    linear = Independence(witness="linear")
    assert Independence.fit(x, y, witness="linear") == linear
    found, given = (
        Monitor(test).update(x, y).log_wealth
        for test in (linear, Independence(gamma_x=0.3, gamma_y=0.2, witness="linear"))
    )
    assert torch.equal(found, given)
    for witness in ("hsic", "coco", "kcc"):
        for name, other in (("gamma_x", "gamma_y"), ("gamma_y", "gamma_x")):
            with pytest.raises(OptionError, match=f"{name} is None.*{witness}.*fit"):
                Independence(**{other: 1.0}, witness=witness)
    for bad in (0.0, math.nan, "wide"):
        with pytest.raises(OptionError, match="gamma_y"):
            Independence(gamma_y=bad, witness="linear")


def test_bad_options_and_states_are_refused():
    x, y = draw(0)
    with pytest.raises(InputError, match="constant"):
        Independence.fit(torch.ones(10, 1), y)
    with pytest.raises(InputError, match="at least 2"):
        Independence.fit(x[:1], y[:1])
    for bad in (
        {"memory": 3},
        {"memory": 0},
        {"alpha": 0.0},
        {"gamma_x": -1.0},
        {"witness": "cca"},
    ):
        with pytest.raises(OptionError):
            Independence(**({"gamma_x": 1.0, "gamma_y": 1.0} | bad))
    state = Monitor(Independence(gamma_x=1.0, gamma_y=1.0)).state_dict()
    with pytest.raises(StateError, match="expects"):
        Monitor(Independence(gamma_x=1.0, gamma_y=1.0, bets=Mixture())).load_state_dict(state)
