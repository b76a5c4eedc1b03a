import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from elsewhere import DEVICE, There, elsewhere
from reference import monitors as reference
from testtime._core.errors import InputError, OptionError
from testtime._core.seeds import generator
from testtime.guard.densities import RIDGE, DeepDensity, Gaussian
from testtime.guard.feature_shift import SeriesShift, feature_shift
from testtime.guard.monitor import Monitor
from testtime.guard.shift_statistics import (
    DeepScore,
    GaussianScore,
    KnnKS,
    ModelKS,
    ks_distance,
)


def draw(seed, n=200, d=4, correlation=0.5):
    chance = torch.Generator().manual_seed(seed)
    own = torch.randn(n, d, generator=chance, dtype=torch.float64)
    shared = torch.randn(n, 1, generator=chance, dtype=torch.float64)
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own


def attack(x, j, seed=9):
    x = x.clone()
    x[:, j] = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)), j]
    return x


def test_the_gaussian_score_is_the_gradient_of_its_log_density():
    x = draw(0)
    density = Gaussian.fit(x)
    covariance = torch.tensor(np.cov(x.T.numpy())) + RIDGE * torch.eye(4)
    law = torch.distributions.MultivariateNormal(x.mean(0), covariance)
    z = draw(1).requires_grad_()
    (expected,) = torch.autograd.grad(law.log_prob(z).sum(), z)
    torch.testing.assert_close(density.score(z.detach()), expected, rtol=0, atol=1e-6)
    drawn = density.sample(200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(Gaussian.fit(drawn).covariance, covariance, rtol=0, atol=0.02)


def test_conditionals_are_those_of_the_partitioned_gaussian():
    x, z = draw(0), draw(1, n=3)
    density = Gaussian.fit(x)
    mean, std = density.conditionals(z)
    law = density.mean[0].numpy(), density.covariance.numpy()
    for j in range(4):
        expected, spread = reference.gaussian_conditional(*law, z.numpy(), j)
        np.testing.assert_allclose(mean[:, j], expected)
        assert std[j] == pytest.approx(spread)


def test_the_deep_density_is_one_and_its_samples_follow_it():
    chance = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 1, generator=chance, dtype=torch.float64) ** 3
    density = DeepDensity.fit(x)
    grid = torch.linspace(-2, 3, 40_001, dtype=torch.float64)[:, None]
    probs = density.log_prob(grid).exp()
    assert float(torch.trapezoid(probs, grid[:, 0])) == pytest.approx(1, abs=2e-3)
    drawn = density.sample(20_000, chance)
    inside = float(torch.trapezoid(probs[grid[:, 0] <= 0.3], grid[grid[:, 0] <= 0.3][:, 0]))
    assert float((drawn <= 0.3).double().mean()) == pytest.approx(inside, abs=0.02)
    at = torch.tensor([[0.21], [0.83]], dtype=torch.float64)
    slope = (density.log_prob(at + 1e-6) - density.log_prob(at - 1e-6)) / 2e-6
    torch.testing.assert_close(density.score(at)[:, 0], slope, rtol=1e-4, atol=1e-4)


def test_a_deep_density_of_several_features_is_one_and_its_samples_follow_it():
    chance = torch.Generator().manual_seed(0)
    x = draw(0, n=3000, d=3, correlation=0.8) * torch.tensor([0.5, 2.0, 1.0])
    x = x + torch.tensor([1.0, -2.0, 0.0])
    grid = torch.linspace(-9, 9, 401, dtype=torch.float64)
    probs = DeepDensity.fit(x[:, :2]).log_prob(torch.cartesian_prod(grid, grid)).exp()
    assert float(probs.sum()) * 0.045**2 == pytest.approx(1, abs=0.01)
    drawn = DeepDensity.fit(x).sample(20_000, chance)
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.T.cov(), x.T.cov(), rtol=0.05, atol=0)


def test_a_constant_feature_has_a_deep_density():
    x = draw(0, n=60, d=2) * torch.tensor([1.0, 0.0])
    density = DeepDensity.fit(x)
    assert bool(density.log_prob(x).isfinite().all() & density.score(x).isfinite().all())
    assert bool(density.sample(5, torch.Generator().manual_seed(0)).isfinite().all())


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_series_tells_when_its_spread_changed(factor):
    series = draw(0, n=1400)
    series[1300:, 1] *= factor
    found = Monitor(SeriesShift.fit(series[:1000], window=200)).update(series[1200:])
    assert found.features == (1,)
    assert found.change_point == pytest.approx(300 - 200, abs=15)


def test_the_statistic_is_the_mean_squared_difference_of_scores():
    x, y = draw(0), draw(1)
    value = GaussianScore(samples=50)(x, y, torch.Generator().manual_seed(3))
    chance = torch.Generator().manual_seed(3)
    p, q = Gaussian.fit(x), Gaussian.fit(y)
    drawn = torch.cat([p.sample(50, chance), q.sample(50, chance)])
    expected = reference.score_shift(x.numpy(), y.numpy(), drawn.numpy(), RIDGE)
    np.testing.assert_allclose(value, expected)
    both = GaussianScore()(torch.stack([x, x]), torch.stack([x, y]), torch.Generator())
    assert both.shape == (2, 4)
    assert bool((both[0] < 1e-9).all())


def test_the_distance_equals_that_of_scipy():
    a, b = draw(0, n=30, d=2), draw(1, n=50, d=2)
    for j in range(2):
        expected = ks_2samp(a[:, j].numpy(), b[:, j].numpy()).statistic
        assert float(ks_distance(a, b)[j]) == pytest.approx(expected)


@pytest.mark.parametrize("statistic", [GaussianScore(), DeepScore(), ModelKS(samples=15), KnnKS()])
def test_each_statistic_names_the_feature_that_was_permuted(statistic):
    x, y = draw(0, n=600, correlation=0.8), draw(1, n=600, correlation=0.8)
    found = feature_shift(x, attack(y, 2), statistic=statistic, bootstrap=20)
    assert found.features == (2,)
    assert found.statistic[2] > found.threshold[2]


def test_inference_mode_changes_no_statistic():
    x, y = draw(0, n=60), draw(1, n=60)
    expected = feature_shift(x, y, statistic=DeepScore(), bootstrap=2)
    with torch.inference_mode():
        found = feature_shift(x * 1, y * 1, statistic=DeepScore(), bootstrap=2)
        slopes = DeepDensity.fit(x * 1).score(y * 1)
    assert torch.equal(found.statistic, expected.statistic)
    assert torch.equal(slopes, DeepDensity.fit(x).score(y))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_densities_of_half_precision_are_those_of_single(kind):
    x = draw(0, n=60).to(kind)
    for fit in (Gaussian.fit, DeepDensity.fit):
        densities = [fit(each) for each in (x, x.float())]
        scores = [density.score(x.float()) for density in densities]
        drawn = [density.sample(3, torch.Generator().manual_seed(0)) for density in densities]
        assert torch.equal(*scores)
        assert torch.equal(*drawn)
    assert torch.equal(densities[0].log_prob(x), densities[0].log_prob(x.float()))


@pytest.mark.parametrize("statistic", [GaussianScore(), DeepScore(), ModelKS(samples=5), KnnKS()])
def test_a_statistic_is_computed_where_its_samples_lie(statistic, monkeypatch):
    x, y = draw(0, n=60), draw(1, n=60)
    expected = statistic(x, y, generator(0, "statistic"))
    with elsewhere(monkeypatch):
        found = statistic(There(x), There(y), generator(0, "statistic", device=DEVICE))
    torch.testing.assert_close(found.held, expected)


def test_several_features_may_be_named_and_none_without_a_shift():
    x, y = draw(0, n=500, d=6), draw(1, n=500, d=6)
    shifted = feature_shift(x, attack(attack(y, 1), 4), compromised=2)
    assert set(shifted.features) == {1, 4}
    calm = feature_shift(x, y)
    assert not calm
    assert calm.features == ()


def test_p_values_count_the_rounds_that_are_as_large():
    def statistic(x, y, chance):
        rounds = torch.arange(9.0, dtype=torch.float64)[:, None].expand(9, 3)
        return rounds if x.dim() > 2 else torch.tensor([7.5, 0.0, 8.0], dtype=torch.float64)

    x = draw(0, n=20, d=3)
    found = feature_shift(x, x, statistic=statistic, bootstrap=9)
    assert found.p_value.tolist() == pytest.approx([0.2, 1.0, 0.2])
    y = attack(draw(1, n=600, correlation=0.8), 2)
    found = feature_shift(draw(0, n=600, correlation=0.8), y, bootstrap=99)
    assert found.p_value[2] == 0.01


def test_thresholds_are_quantiles_and_the_excess_ranks_the_features():
    null = torch.rand(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    null *= torch.tensor([1.0, 100.0, 1.0])
    value = torch.tensor([2.0, 150.0, 0.5], dtype=torch.float64)

    def statistic(x, y, chance):
        return null if x.dim() > 2 else value

    x = draw(0, n=20, d=3)
    found = feature_shift(x, x, statistic=statistic, bootstrap=40, alpha=0.3, compromised=2)
    np.testing.assert_allclose(found.threshold, np.quantile(null, 1 - 0.3 / 3, axis=0))
    np.testing.assert_allclose(found.excess, (value - null.mean(0)) / null.std(0))
    assert found.features == (0, 1)


def test_few_rounds_raise_the_rate_by_what_is_said():
    def statistic(x, y, chance):
        return torch.rand(*x.shape[:-2], 10, generator=chance, dtype=torch.float64)

    x = draw(0, n=2, d=10)
    looks = [
        feature_shift(x, x, statistic=statistic, bootstrap=19, alpha=0.5, seed=seed)
        for seed in range(400)
    ]
    rate = torch.stack([look.statistic > look.threshold for look in looks]).double().mean()
    assert float(rate) == pytest.approx((1 + 18 * 0.05) / 20, abs=0.018)  # four standard errors


def test_the_null_of_a_series_is_of_neighbouring_windows_of_clean_data():
    cuts = set()

    def statistic(x, y, chance):
        if x.dim() > 2:
            for a, b in zip(x[..., 0].long().tolist(), y[..., 0].long().tolist(), strict=True):
                assert [*a, *b] == list(range(a[0], a[0] + 6))
                cuts.add(b[0])
        return x.mean(-2)

    clean = torch.arange(10.0, dtype=torch.float64)[:, None]
    detector = SeriesShift.fit(clean, window=3, statistic=statistic)
    assert cuts == {3, 4, 5, 6, 7}
    assert detector.reference.tolist() == [[7.0], [8.0], [9.0]]
    assert len(detector.null) == 250
    early = Monitor(detector).update(clean[:2])
    assert not early
    assert early.p_value.tolist() == [1.0]
    np.testing.assert_allclose(early.threshold, np.quantile(detector.null, 0.95, axis=0))


def test_constants_are_finite_and_bad_input_is_refused():
    x, y = draw(0), draw(1)
    x[:, 0] = y[:, 0] = 1.0
    found = feature_shift(x, y, bootstrap=20)
    assert bool(found.statistic.isfinite().all() & found.excess.isfinite().all())
    for bad in ((x[:1], y), (x, y[:, :2]), (x * math.nan, y), (x[:, 0], y)):
        with pytest.raises(InputError):
            feature_shift(*bad, bootstrap=5)
    for bad in ({"bootstrap": 0}, {"alpha": 0.0}, {"compromised": 9}):
        with pytest.raises(OptionError):
            feature_shift(x, y, **bad)


def test_a_series_gives_the_feature_and_the_time():
    series = draw(0, n=2000)
    series[1250:] = attack(series[1250:], 3)
    monitor = Monitor(SeriesShift.fit(series[:1000], window=200))
    alarms = {}
    for start in range(1000, 1600, 50):
        state, monitor = monitor.state_dict(), Monitor(monitor.detector)
        monitor.load_state_dict(state)
        if found := monitor.update(series[start : start + 50]):
            alarms[start] = found
        assert (found.change_point is None) == (not found)
    assert min(alarms) >= 1250
    last = alarms[1400]
    assert last.features == (3,)
    assert last.change_point == pytest.approx(250, abs=25)
    assert len(monitor.state_dict()["latest"]) == 200
    with pytest.raises(InputError, match="two windows"):
        SeriesShift.fit(series[:300], window=200)
    with pytest.raises(InputError, match="features"):
        monitor.update(series[:5, :2])
