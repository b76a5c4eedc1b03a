"""Exchangeability, Risk, TwoSample; and all monitors on a million samples."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from reference import monitors as reference
from testtime._core.errors import InputError, OptionError
from testtime.guard.betting import Mixture, Starting
from testtime.guard.collapse import Collapse
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.feature_shift import SeriesShift
from testtime.guard.fingerprint import FaultMonitor
from testtime.guard.independence import Independence
from testtime.guard.monitor import Monitor
from testtime.guard.risk import Risk, upper_bound
from testtime.guard.two_sample import TwoSample


def draw(seed, *shape):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=chance, dtype=torch.float64)


def test_bins_of_a_stream_are_an_urn_whatever_the_order():
    """All 5040 orders of seven values: bins of the last four are as probable as the urn says."""
    found = Counter()
    for order in itertools.permutations(range(7)):
        values = torch.tensor(order, dtype=torch.float64)[:, None]
        test = Exchangeability.fit(values[:3], bins=3)
        assert test.gaps.tolist() == [1, 1, 2]
        found[tuple((values[3:] > test.edges[:, 0]).sum(1).tolist())] += 1
    for bins, count in found.items():
        counts, probability = [1, 1, 2], 1.0
        for b in bins:
            probability *= counts[b] / sum(counts)
            counts[b] += 1
        assert count / math.factorial(7) == pytest.approx(probability)


def test_p_values_equal_those_of_all_values_kept():
    reference_values, stream = draw(0, 20, 1), draw(1, 60, 1)
    test = Exchangeability.fit(reference_values, bins=21)
    state = test.init()
    chance = torch.Generator()
    chance.set_state(state["chance"])
    blur = torch.rand(2, 60, 1, generator=chance, dtype=torch.float64)[1, :, 0]
    _, p = test.p_values(state, stream)
    gap = (stream > reference_values.sort(0).values.T).sum(1)
    for t in range(60):
        counts = [1 + int((gap[:t] == j).sum()) for j in range(21)]
        expected = (sum(counts[gap[t] + 1 :]) + blur[t] * counts[gap[t]]) / (21 + t)
        assert p[t, 0] == pytest.approx(float(expected))


def test_exchangeability_bets_on_place_and_width_of_the_p_values():
    test = Exchangeability.fit(draw(0, 20, 2), bets=Mixture(fractions=(0.5,)))
    stream = draw(1, 30, 2) + 1
    p = test.p_values(test.init(), stream)[1]
    f, g = 1 - 2 * p, 4 * (p - 0.5).abs() - 1
    wealth = torch.stack([1 + each / 2 for each in (f, -f, g, -g)]).cumprod(1).mean(0)
    state, alarm = test.step(test.init(), stream)
    torch.testing.assert_close(alarm.parts.exp(), wealth[-1])
    torch.testing.assert_close(alarm.log_wealth.exp(), wealth[-1].mean())
    torch.testing.assert_close(state["log_peak"].exp(), wealth.mean(1).max().clamp(min=1))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 90), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_counts_do_not_depend_on_batches_and_ties_are_broken_evenly(cuts, seed):
    stream = draw(seed, sum(cuts), 2).round()
    monitor = Monitor(Exchangeability.fit(draw(seed + 1, 30, 2).round()))
    for part in stream.split(cuts):
        monitor.update(part)
    counts = monitor.state_dict()["counts"]
    assert counts.sum(0).tolist() == [31 + len(stream)] * 2


def test_saving_in_mid_stream_changes_nothing():
    test, stream = Exchangeability.fit(draw(0, 100, 3)), draw(1, 90, 3)
    whole, monitor = Monitor(test), Monitor(test)
    whole.update(stream[:40])
    monitor.load_state_dict(whole.state_dict())
    one, other = whole.update(stream[40:]), monitor.update(stream[40:])
    assert torch.equal(one.parts, other.parts)


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1, lambda x: x - 1, lambda x: 4 * x, lambda x: x / 4],
    ids=["up", "down", "wider", "narrower"],
)
def test_a_late_change_is_found_and_no_change_is_not(change):
    monitor = Monitor(Exchangeability.fit(draw(0, 500, 2)))
    assert not monitor.update(draw(1, 5000, 2))
    later = draw(2, 300, 2)
    later[:, 1] = change(later[:, 1])
    alarm = monitor.update(later)
    assert alarm
    assert alarm.parts[1] > alarm.parts[0]
    assert monitor.update(draw(3, 10, 2))  # it stays raised
    monitor.reset()
    assert not monitor.update(draw(4, 10, 2))


def test_constants_never_alarm_and_one_reference_value_is_enough():
    monitor = Monitor(Exchangeability.fit(torch.ones(50, 1)))
    assert not monitor.update(torch.ones(3000, 1))
    assert monitor.update(torch.full((300, 1), 2.0))
    assert not Monitor(Exchangeability.fit(torch.zeros(1, 1))).update(draw(0, 50, 1))


def test_false_alarms_of_streams_side_by_side_are_at_most_alpha():
    """400 streams as 400 signals, watched one by one; 0.05 and three standard errors."""
    test = Exchangeability.fit(draw(0, 100, 400), bins=20)
    state, peak = test.init(), torch.zeros(400)
    for part in draw(1, 500, 400).split(5):
        state, alarm = test.step(state, part)
        peak = torch.maximum(peak, alarm.parts)
    assert (peak >= math.log(20)).double().mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@settings(max_examples=30, deadline=None)
@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=30), bound=st.floats(0.01, 0.99))
def test_risk_bets_on_the_ratio_to_its_bound(scores, bound):
    alarm = Monitor(Risk(bound=bound, bets=Starting(fractions=(0.3,)))).update(torch.tensor(scores))
    payoffs = [score / bound - 1 for score in torch.tensor(scores).double().tolist()]
    expected = reference.starting(payoffs, (0.3,))
    assert alarm.log_wealth.item() == pytest.approx(expected, abs=1e-6)


def test_the_upper_bound_covers_the_mean_and_tightens():
    coins = (torch.rand(100, 400, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    bounds = torch.tensor([upper_bound(row, alpha=0.05) for row in coins])
    assert (bounds < 0.3).double().mean() <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)
    assert 0.33 < bounds.mean() < 0.42
    assert upper_bound(coins.flatten()[:10000], alpha=0.05) < 0.325
    payoffs = (0.35 - coins[0]) / 0.65
    below = reference.mixture(payoffs.tolist(), Mixture().fractions) < math.log(20)
    assert below == (upper_bound(coins[0], alpha=0.05) > 0.35)


def test_the_source_and_the_stream_share_alpha():
    scores = draw(0, 300).sigmoid()
    risk = Risk.fit(scores, tolerance=0.1, alpha=0.2)
    assert risk.alpha == 0.1
    assert risk.bound == pytest.approx(upper_bound(scores, alpha=0.1) + 0.1)


def test_an_alarm_is_not_missed_where_wealth_has_fallen_again_within_a_batch():
    scores = torch.cat([torch.ones(20), torch.zeros(100)])
    said = Monitor(Risk(bound=0.5, bets=Mixture(fractions=(0.5,)))).update(scores)
    x = draw(0, 120, 1)
    y = torch.cat([x[:60], -x[60:]])
    bets = Mixture(fractions=(0.5,))
    also = Monitor(Independence(witness="linear", bets=bets)).update(x, y)
    values, bets = draw(1, 64, 1), Mixture(fractions=(0.9,))
    values[:8] = 9
    third = Monitor(Exchangeability.fit(draw(0, 500, 1), bets=bets)).update(values)
    source = torch.arange(1280) % 10
    adapted = torch.cat([torch.zeros(128).long(), source[128:]])
    test = Collapse(classes=10, block=8, bets=Mixture(fractions=(0.5,)))
    last = Monitor(test).update(*(one_hot(each, 10).double() for each in (adapted, source)))
    for alarm in (said, also, third, last):
        assert alarm.log_wealth < 1
        assert alarm


def test_one_score_says_little_of_a_mean():
    """Fractions are 1/2 in the mean: 1 + (m - 0.5) / (1 - m) / 2 = 20."""
    assert upper_bound(torch.tensor([0.5]), alpha=0.05) == pytest.approx(1 - 0.5 / 39)


def test_wealth_is_one_before_the_first_bet():
    few = draw(0, 2, 4)
    for test in (Collapse(classes=4), Independence(gamma_x=1.0, gamma_y=1.0)):
        alarm = Monitor(test).update(few, few)
        assert alarm.log_wealth == 0
        assert not alarm


def test_nothing_of_a_large_batch_is_kept():
    large = draw(0, 20_001, 4)
    for test, batch in (
        (Exchangeability.fit(large[:9]), (large,)), (Risk(bound=0.5), (large[:, 0].sigmoid(),)),
        (Collapse(classes=4), (large, large)),
        (Independence(witness="linear"), (large[:4001], large[:4001])),
        (TwoSample(gamma=1.0, memory=4), (large[:101], large[:101])),
    ):  # fmt: skip
        state, _ = test.step(test.init(), *batch)
        assert sum(each.untyped_storage().nbytes() for each in state.values()) < 10_000


def test_options_of_a_fit_are_those_of_the_test():
    x, y = draw(0, 9, 1), draw(1, 9, 1)
    options = {"alpha": 0.1, "bets": Mixture(), "memory": 8}
    pair = Independence.fit(x, y, witness="kcc", **options)
    assert pair.witness == "kcc"
    for test in (pair, TwoSample.fit(x, **options)):
        assert {name: getattr(test, name) for name in options} == options
    risk = Risk.fit(x.sigmoid()[:, 0], bets=Mixture())
    fitted = Exchangeability.fit(x, alpha=0.1, bets=Mixture())
    assert fitted.bets == risk.bets == Mixture()
    assert fitted.alpha == 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: Exchangeability.fit(draw(0, 9, 1), bins=1),
        lambda: Exchangeability.fit(draw(0, 9, 1), alpha=0.0),
        lambda: Risk(bound=0.5, alpha=0.0),
        lambda: Risk.fit(torch.zeros(99), tolerance=-0.1),
        lambda: upper_bound(torch.zeros(9), alpha=0.0),
        lambda: Collapse(classes=1),
        *[
            lambda name=name, bad=bad: Collapse(classes=3, **{name: bad})
            for name, bad in (
                ("block", 0), ("share", 1.0), ("narrowness", -0.1), ("disagreement", 1.0),
                ("alpha", 0.0),
            )
        ],
    ],
)  # fmt: skip
def test_options_under_which_a_test_says_nothing_are_refused(call):
    with pytest.raises(OptionError):
        call()


def test_risk_asks_for_scores_in_the_unit_interval_and_for_enough_of_them():
    for bad, said in (
        (torch.tensor([2.0]), "Divide"), (torch.tensor([math.nan]), "NaN"),
        (torch.zeros(0), "empty"), (torch.zeros(2, 2), "expected"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            Monitor(Risk(bound=0.5)).update(bad)
    with pytest.raises(InputError, match="more scores"):
        Risk.fit(torch.ones(3))
    with pytest.raises(OptionError):
        Risk(bound=0.0)


def test_two_samples_are_told_apart_and_side_by_side_as_alone():
    reference_points, new = draw(0, 200, 2, 3), draw(1, 200, 2, 3)
    new[:, 1] += 1
    test = TwoSample.fit(draw(2, 50, 3))
    alarm = Monitor(test).update(reference_points, new)
    assert alarm.parts[1] > math.log(20) > alarm.parts[0]
    alone = Monitor(test).update(reference_points[:, 1], new[:, 1])
    torch.testing.assert_close(alarm.parts[1], alone.log_wealth)
    with pytest.raises(InputError, match="same for both"):
        Monitor(test).update(reference_points, new[:5])


def test_two_samples_bet_on_the_normed_difference_of_mean_kernels():
    x, y = draw(0, 4, 1), draw(1, 4, 1) + 0.5
    gamma, test = 0.7, TwoSample(gamma=0.7, bets=Mixture(fractions=(0.5,)))

    def kernel(a, b):
        return (-gamma * (a - b.T) ** 2).exp()

    wealth = 1.0
    for t in range(1, 4):
        past_x, past_y = x[:t], y[:t]
        norm = kernel(past_x, past_x).mean() + kernel(past_y, past_y).mean()
        norm = (norm - 2 * kernel(past_x, past_y).mean()).sqrt()

        def g(z, px=past_x, py=past_y, norm=norm):
            return (kernel(z, py).mean() - kernel(z, px).mean()) / norm

        wealth *= 1 + 0.5 * (g(y[t : t + 1]) - g(x[t : t + 1])) / math.sqrt(2)
    alarm = Monitor(test).update(x, y)
    assert alarm.log_wealth.exp().item() == pytest.approx(float(wealth))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Exchangeability", "Risk", "Collapse", "FaultMonitor"])
def test_a_million_samples_take_no_more_memory_than_a_few_and_raise_no_alarm(name):
    detector, read = {
        "Exchangeability": (Exchangeability.fit(draw(1, 1000, 4)), lambda x: (x,)),
        "Risk": (Risk(bound=0.25), lambda x: (x.softmax(1)[:, 0],)),
        "Collapse": (Collapse(classes=4), lambda x: (x, x)),
        "FaultMonitor": (FaultMonitor(low=-2.0, high=2.0, limit=0.6), lambda x: (x[:, 0],)),
    }[name]
    monitor, chance, sizes = Monitor(detector), torch.Generator().manual_seed(0), set()
    for _ in range(1000):
        x = torch.randn(1000, 4, generator=chance, dtype=torch.float64)
        alarm = monitor.update(*read(x))
        sizes.add(sum(value.nbytes for value in monitor.state_dict().values()))
    assert not alarm
    assert math.isfinite(getattr(alarm, "log_wealth", 0.0))
    assert len(sizes) == 1
    assert max(sizes) < 10_000


@pytest.mark.slow
def test_a_window_of_a_series_takes_no_more_memory_however_long_it_is():
    monitor = Monitor(SeriesShift.fit(draw(1, 2000, 3), window=100))
    chance, sizes = torch.Generator().manual_seed(0), set()
    for _ in range(1000):
        found = monitor.update(torch.randn(1000, 3, generator=chance, dtype=torch.float64))
        sizes.add(sum(value.nbytes for value in monitor.state_dict().values()))
    assert bool(found.statistic.isfinite().all())
    assert sizes == {8 + 100 * 3 * 8}


@pytest.mark.slow
@pytest.mark.parametrize("test", [Independence, TwoSample])
def test_points_that_witnesses_read_take_no_more_memory_however_many_there_were(test):
    known = (draw(1, 500, 2), draw(2, 500, 2)) if test is Independence else (draw(1, 500, 2),)
    monitor = Monitor(test.fit(*known, memory=100))  # with 1000, a million take minutes
    chance, sizes = torch.Generator().manual_seed(0), set()
    for _ in range(50):
        x, y = torch.randn(2, 1000, 2, generator=chance, dtype=torch.float64)
        alarm = monitor.update(x, y)
        sizes.add(sum(value.nbytes for value in monitor.state_dict().values()))
    assert not alarm
    assert len(sizes) == 1
    assert max(sizes) < 10_000
