import copy
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn

from reference import monitors as reference
from testtime._core.errors import InputError, OptionError, ScopeError
from testtime.guard.faults import (
    BitFlips,
    Drift,
    Scaling,
    StuckAt,
    faulty_activations,
    inject,
)
from testtime.guard.fingerprint import FaultMonitor, Fingerprint
from testtime.guard.monitor import Monitor
from testtime.guard.tarp import tarp, uniform_p_value


def posterior(seed, n=300, count=200, d=3, scale=1.0):
    chance = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, d, generator=chance, dtype=torch.float64)
    truth = mean + torch.randn(n, d, generator=chance, dtype=torch.float64)
    draws = torch.randn(count, n, d, generator=chance, dtype=torch.float64)
    return mean + scale * draws, truth


@pytest.mark.parametrize("metric", ["euclidean", "manhattan"])
def test_coverage_is_that_of_the_definition(metric):
    samples, truth = (each.numpy() for each in posterior(0, n=40, count=15))
    references = np.random.default_rng(0).normal(size=truth.shape)
    ranks, levels, expected = reference.coverage(samples, truth, references, metric, 4)
    found = tarp(*map(torch.tensor, (samples, truth)), references=torch.tensor(references),
                 metric=metric, bins=4)  # fmt: skip
    np.testing.assert_allclose(found.ranks, ranks)
    np.testing.assert_allclose(found.coverage, expected)
    np.testing.assert_allclose(found.levels, levels)
    assert bool((found.band[1:-1] > 0).all())


def test_units_change_nothing_and_the_band_is_that_of_shares():
    samples, truth = posterior(0, n=200, count=50, d=2)
    scale, shift = torch.tensor([1e3, 0.5]), torch.tensor([-7.0, 20.0])
    plain = tarp(samples, truth, bootstrap=400, seed=3)
    other = tarp(scale * samples + shift, scale * truth + shift, bootstrap=400, seed=3)
    torch.testing.assert_close(other.ranks, plain.ranks)
    share = plain.coverage[1:-1]
    expected = (share * (1 - share) / 200).sqrt()
    torch.testing.assert_close(plain.band[1:-1], expected, rtol=0.2, atol=0)
    assert len(plain.levels) == 21
    bent = plain.coverage - plain.levels
    assert plain.deviation == float(bent.abs().max())
    assert plain.area == pytest.approx(float(bent[11:].mean() - bent[:10].mean()))


def test_ranks_on_a_level_are_not_below_it():
    """0.29 * 100 is below 29; ranks here are 0, 1 / 100, ... 1."""
    samples = torch.arange(100.0)[:, None, None].expand(100, 101, 1) + 0.5
    truth = torch.arange(101.0)[:, None]
    found = tarp(samples, truth, references=torch.full_like(truth, -1.0), bins=100)
    assert found.ranks.tolist() == [k / 100 for k in range(101)]
    below = [level / 101 for level in range(100)] + [1.0]
    np.testing.assert_allclose(found.coverage, below, rtol=1e-12)
    assert found.coverage[-1] == 1


def test_faults_of_a_sampler_are_found_and_their_kind_is_told():
    exact, narrow, wide = (tarp(*posterior(1, scale=s)) for s in (1.0, 0.5, 2.0))
    assert exact.p_value > 0.01
    assert exact.deviation < 0.1
    assert narrow.p_value < 1e-4 > wide.p_value
    assert narrow.area < -0.05 < 0.05 < wide.area


def test_a_sampler_of_the_prior_passes_only_where_references_do_not_see_x():
    chance = torch.Generator().manual_seed(0)
    truth = torch.randn(400, 2, generator=chance, dtype=torch.float64)
    x = truth + 0.1 * torch.randn(400, 2, generator=chance, dtype=torch.float64)
    prior = torch.randn(300, 400, 2, generator=chance, dtype=torch.float64)
    assert tarp(prior, truth).p_value > 0.01
    assert tarp(prior, truth, references=x).p_value < 1e-6


def test_p_values_are_those_of_scipy_and_uniform():
    for n in (10, 60, 400):
        values = (
            torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) ** 1.2
        )
        assert uniform_p_value(values) == pytest.approx(
            kstest(values.numpy(), "uniform").pvalue, abs=0.02
        )
    assert uniform_p_value((torch.arange(10_000.0) + 0.5) / 10_000) == 1
    low = [
        tarp(*posterior(seed, n=60, count=4, d=1), seed=seed).p_value < 0.1 for seed in range(100)
    ]
    assert sum(low) <= 10 + 3 * 3


def test_few_simulations_need_references_that_know_nothing_of_truth():
    """An exact sampler of ten parameters, ten simulations: the box of truth holds its samples less often."""
    chance, found = torch.Generator().manual_seed(0), [0, 0]
    for seed in range(200):
        truth, own, *samples = torch.randn(42, 10, 10, generator=chance).unbind()
        for i, references in enumerate((2 * own, None)):
            told = tarp(torch.stack(samples), truth, references=references, seed=seed, bootstrap=2)
            found[i] += told.p_value < 0.05
    assert found[0] <= 20 < 40 <= found[1]


def test_constants_pass_through_and_bad_input_is_refused():
    samples, truth = posterior(0, n=20)
    truth[:, 0] = samples[:, :, 0] = 1.0
    assert math.isfinite(tarp(samples, truth).p_value)
    for bad in ((samples[:, :5], truth), (samples[0], truth), (samples * math.nan, truth),
                (samples[:, :1], truth[:1])):  # fmt: skip
        with pytest.raises(InputError):
            tarp(*bad)
    with pytest.raises(OptionError, match="metric"):
        tarp(samples, truth, metric="cosine")
    with pytest.raises(InputError, match="references"):
        tarp(samples, truth, references=truth[:3])
    with pytest.raises(OptionError):
        tarp(samples, truth, bins=1)


def chance():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bit_of_each_value_is_flipped(dtype):
    values = torch.linspace(-2, 2, 64, dtype=dtype)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    changed = BitFlips(rate=1.0)(values, chance())
    differ = (changed.view(kind) ^ values.view(kind)).tolist()
    bits = 8 * values.element_size()
    assert all(bin(word % 2**bits).count("1") == 1 for word in differ)
    again = BitFlips(rate=1.0)(changed, chance())
    assert torch.equal(again.view(kind), values.view(kind))
    part = BitFlips(rate=0.3)(values.repeat(50), chance()).view(kind) != values.repeat(50).view(
        kind
    )
    assert float(part.double().mean()) == pytest.approx(0.3, abs=0.03)


def test_faults_do_what_they_are_named():
    values = torch.linspace(-1, 1, 255)
    rounded = BitFlips(rate=0.0, memory="int8")(values, chance())
    torch.testing.assert_close(rounded, values, rtol=0, atol=0.5 / 127)
    words = (BitFlips(rate=1.0, memory="int8")(values, chance()) * 127).round().to(torch.int8)
    differ = words ^ (values * 127).round().to(torch.int8)
    assert all(bin(word % 256).count("1") == 1 for word in differ.tolist())
    stuck = StuckAt(bit=1, rate=1.0)(values, chance())
    assert torch.equal(
        StuckAt(bit=1, rate=1.0)(stuck, chance()).view(torch.int32), stuck.view(torch.int32)
    )
    low = StuckAt(bit=0, rate=1.0)(stuck, chance()).view(torch.int32)
    assert all(
        bin(a ^ b).count("1") == 1
        for a, b in zip(low.tolist(), stuck.view(torch.int32).tolist(), strict=True)
    )
    assert torch.equal(Scaling(rate=1.0, factor=4.0)(values, chance()), 4 * values)
    noisy = Drift(additive=0.1)(torch.randn(20_000, generator=chance()), chance())
    clean = torch.randn(20_000, generator=chance())
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.03)
    for bad in (lambda: BitFlips(rate=2.0), lambda: StuckAt(bit=2, rate=0.1),
                lambda: BitFlips(rate=0.1, memory="int4"), lambda: Drift(additive=-1.0)):  # fmt: skip
        with pytest.raises(OptionError):
            bad()


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)
        ).train()


def test_injection_leaves_the_model_alone_and_repeats():
    model, x = network(), torch.randn(30, 8)
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    one, again = (
        inject(model, [BitFlips(rate=0.2), Drift(multiplicative=0.1)], seed=1) for _ in "ab"
    )
    assert torch.equal(random, torch.random.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for a, b, c in zip(one.parameters(), again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))
        assert not torch.equal(a, c)
    model.eval()
    plain = model(x)
    with faulty_activations(model, Scaling(rate=0.5)):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    with faulty_activations(model, Scaling(rate=0.0)):
        assert torch.equal(model(x), plain)
    nested = nn.Sequential(nn.Sequential(nn.Linear(8, 3)))
    expected = -nested(x)  # once, not at each level
    with faulty_activations(nested, Scaling(rate=1.0)):
        assert torch.equal(nested(x), expected)


def test_a_fingerprint_notices_faults_and_changes_nothing():
    model = network()
    x = torch.randn(600, 8, generator=chance())
    model(x)
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    fingerprint, again = (Fingerprint.fit(model, x[:400].split(100), epochs=30) for _ in "ab")
    output, f = fingerprint.read(model, x[400:])
    assert torch.equal(f, again.read(model, x[400:]).fingerprint)
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    assert torch.equal(output, model(x[400:]))
    monitor = Monitor(FaultMonitor(low=fingerprint.low, high=fingerprint.high))
    assert not monitor.update(f)
    faulty = inject(model, Scaling(rate=0.3, factor=4.0))
    assert monitor.update(fingerprint.read(faulty, x[400:440]).fingerprint)
    monitor.reset()
    broken = inject(model, lambda values, _: values * math.nan)
    assert monitor.update(fingerprint.read(broken, x[400:440]).fingerprint)
    with pytest.raises(ScopeError):
        Fingerprint.fit(nn.ReLU(), [x])
    with pytest.raises(InputError):
        Fingerprint.fit(model, [x[:1]])
    with pytest.raises(InputError):
        Fingerprint.fit(broken, [x])


def test_features_of_other_types_are_read_in_single_and_other_counts_are_refused():
    model, x = network().double(), torch.randn(60, 8, generator=chance(), dtype=torch.float64)
    fingerprint = Fingerprint.fit(model, [x], epochs=2)
    plain = Fingerprint.fit(network(), [x.float()], epochs=2)
    found, expected = fingerprint.read(model, x), plain.read(network(), x.float())
    assert found.output.dtype == torch.float64
    torch.testing.assert_close(found.fingerprint, expected.fingerprint)
    rows = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 5), nn.Unflatten(0, (30, 2)))
    with pytest.raises(ScopeError, match="name another"):
        Fingerprint.fit(rows, [x.float().view(30, 2, 8)])


def test_a_fingerprint_asks_nothing_of_what_the_network_returns():
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x):
            return {"boxes": self.body(x).unflatten(1, (-1, 1)), "count": len(x)}

    x = torch.randn(60, 8, generator=chance())
    fingerprint, plain = (Fingerprint.fit(each, [x], epochs=2) for each in (Boxes(), network()))
    output, f = fingerprint.read(Boxes(), x)
    assert torch.equal(f, plain.read(network(), x).fingerprint)
    assert (output["count"], output["boxes"].dim()) == (60, 3)


def test_the_two_bands_are_those_of_the_same_fingerprints():
    model, x = network(), torch.randn(300, 8, generator=chance())
    bands = [
        Fingerprint.fit(model, x.split(100), epochs=3, band=band)
        for band in ("quantiles", "deviations")
    ]
    known = [each.read(model, x).fingerprint.double().numpy() for each in bands]
    np.testing.assert_array_equal(*known)
    np.testing.assert_allclose(
        (bands[0].low, bands[0].high), np.quantile(known[0], [0.005, 0.995]), rtol=1e-6
    )
    mean = known[0].sum() / 300
    std = math.sqrt(((known[0] - mean) ** 2).sum() / 299)
    np.testing.assert_allclose(
        (bands[1].low, bands[1].high), (mean - 3 * std, mean + 3 * std), rtol=1e-6
    )
    for option, value in (("band", "mean"), ("outside", 1.5), ("outside", -0.1)):
        with pytest.raises(OptionError, match=option):
            Fingerprint.fit(model, [x], **{option: value})


def test_the_fault_monitor_counts_the_latest_window():
    detector = FaultMonitor(low=0.9, high=1.1, window=4, limit=0.5)
    good, bad = torch.tensor([1.0]), torch.tensor([2.0])
    monitor = Monitor(detector)
    told = [bool(monitor.update(each)) for each in (bad, bad, good, bad, good, good)]
    assert told == [False, False, False, True, True, True]
    whole = Monitor(detector).update(torch.cat([bad, bad, good, bad, good, good]))
    assert whole
    assert whole.flagged.tolist() == [True, True, False, True, False, False]
    assert whole.share == 0.25
    assert not Monitor(detector).update(torch.cat([bad, bad, good, good]))  # no more than the limit
    with pytest.raises(InputError):
        monitor.update(torch.zeros(2, 2))
    with pytest.raises(OptionError):
        FaultMonitor(low=2.0, high=1.0)


def test_drift_is_relative_to_each_value_and_to_the_spread_of_all():
    values = 3 + 5 * torch.randn(20_000, generator=chance(), dtype=torch.float64)
    factor = Drift(multiplicative=0.2)(values, chance()) / values - 1
    shift = Drift(additive=0.1)(values, chance()) - values
    assert float(factor.std()) == pytest.approx(0.2, rel=0.03)
    assert float(shift.std()) == pytest.approx(0.5, rel=0.03)
    both = Drift(additive=0.1, multiplicative=0.2)(values, chance())
    torch.testing.assert_close(both, values * (1 + factor) + shift)
    assert abs(float(torch.corrcoef(torch.stack([factor, shift]))[0, 1])) < 0.03


@pytest.mark.parametrize("bit", [0, 1])
def test_bits_of_an_int8_memory_are_stuck_one_of_each_value(bit):
    values = torch.arange(-127.0, 128.0).repeat(4)
    stuck = StuckAt(bit=bit, rate=1.0, memory="int8")(values, chance()).round().to(torch.int8)
    changed = set()
    for old, new in zip(values.to(torch.int8).tolist(), stuck.tolist(), strict=True):
        assert (old | new if bit else old & new) == new  # bits are set, or cleared, alone
        changed.add((old ^ new) % 256)
    assert changed == {0, *(1 << place for place in range(8))}
    assert not StuckAt(bit=0, rate=1.0, memory="int8")(torch.zeros(3), chance()).any()
