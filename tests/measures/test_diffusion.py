"""MINDE's entropy and divergence, with the exact predictions of Gaussians, and trained."""

import math
from functools import partial

import pytest
import torch

from testtime._core.errors import InputError, OptionError
from testtime.measures.information import diffusion
from testtime.measures.information.diffusion import (
    diffusion_gap,
    minde_divergence,
    minde_entropy,
)
from testtime.measures.information.noise import signal_and_noise


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(mean, deviation):
    """The mean of the noise given z, of a diffusion of independent normal coordinates."""

    def noise(z, t):
        m, s = (each[:, None] for each in signal_and_noise(t))
        return s * (z - m * mean) / (m**2 * deviation**2 + s**2)

    return noise


@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1.0, 1.0), (0.5, 0.6), (-0.3, 1.8)])
def test_the_exact_predictions_give_the_exact_divergence(mean, deviation, importance):
    x = mean + deviation * draw(0, 8000, 2)
    terms = diffusion_gap(
        exact(mean, deviation),
        exact(0.0, 1.0),
        x,
        importance=importance,
        draws=4,
        generator=torch.Generator().manual_seed(1),
    )
    truth = 2 * ((deviation**2 + mean**2 - 1) / 2 - math.log(deviation))
    error = float(terms.std()) / len(terms) ** 0.5
    assert float(terms.mean()) == pytest.approx(truth, abs=4 * error + 1e-12)
    assert error <= 0.05 * truth


SHORT = {"steps": 3, "width": 8, "batch_size": 16}


def test_units_move_the_entropy_by_their_logarithm_and_nothing_else():
    x = draw(0, 64, 3)
    before = torch.random.get_rng_state()
    found = minde_entropy(x, **SHORT, trace=True)
    with torch.inference_mode():
        moved = minde_entropy(1e60 * x + 1e58, **SHORT)
    assert moved.value == pytest.approx(found.value + 3 * 60 * math.log(10), abs=1e-3)
    assert len(found.trace) == 3
    assert torch.equal(before, torch.random.get_rng_state())
    assert minde_entropy(x, **SHORT).value == found.value
    apart = partial(minde_divergence, **SHORT)
    assert apart(x, x + 1).value == pytest.approx(apart(9 * x, 9 * x + 9).value, abs=1e-4)
    assert apart(x[:40], x + 1).value >= 0


def test_entropy_is_that_of_a_normal_law_less_the_gap(monkeypatch):
    x, held = 3 * draw(0, 64, 2), []

    def gap(one, other, samples, **_):
        held.append(samples.double())
        return torch.full((len(samples),), 0.25, dtype=torch.float64)

    monkeypatch.setattr(diffusion, "diffusion_gap", gap)
    normal = torch.distributions.Normal(x.mean(0), x.std(0))
    found = minde_entropy(x, **SHORT).value
    expected = -normal.log_prob(held[0] * x.std(0) + x.mean(0)).sum(1).mean() - 0.25
    assert found == pytest.approx(float(expected), abs=1e-5)


def test_bad_input():
    x = draw(0, 40, 2)
    for call, said in (
        (lambda: minde_entropy(x * math.nan), "NaN"),
        (lambda: minde_entropy(x[:31]), "31 samples"),
        (lambda: minde_entropy(x * torch.tensor([1.0, 0.0])), "constant"),
        (lambda: minde_divergence(x, x[:, :1]), "coordinates"),
        (lambda: minde_divergence(x, x[:9]), "9 samples"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    for options in ({"width": 12}, {"steps": 0}, {"draws": 0}, {"decay": 2}):
        with pytest.raises(OptionError, match=next(iter(options))):
            minde_entropy(x, **options)
        with pytest.raises(OptionError, match=next(iter(options))):
            minde_divergence(x, x, **options)


def test_uniform_times_are_those_of_the_training_too():
    x, seen, drawn = draw(0, 64, 2), [], diffusion.sampled_times

    def spy(n, generator, *, importance=True):
        seen.append(importance)
        return drawn(n, generator, importance=importance)

    for call in (minde_entropy, partial(minde_divergence, y=x + 1)):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(diffusion, "sampled_times", spy)
            found = call(x, importance=False, draws=2, **SHORT)
        assert seen == [False] * 5
        assert found != call(x, draws=2, **SHORT)


@pytest.mark.slow
def test_it_learns_with_uniform_times():
    x = 3 * draw(0, 4000, 2)
    truth = math.log(2 * math.pi * math.e) + 2 * math.log(3)
    uniform = {"importance": False, "steps": 800, "draws": 20}
    assert minde_entropy(x, **uniform).value == pytest.approx(truth, abs=0.15)
    found = minde_divergence(draw(1, 4000, 2), draw(2, 4000, 2) + 1, **uniform)
    assert found.value == pytest.approx(1.0, abs=0.6)  # early times, of much weight, are rare


@pytest.mark.slow
def test_it_learns_the_entropy_and_the_divergence_of_gaussians():
    mixing = torch.tensor([[1.0, 0.0], [0.8, 0.6]]).double()
    x = 3 * draw(0, 5000, 2) @ mixing.T
    truth = math.log(2 * math.pi * math.e) + math.log(0.6) + 2 * math.log(3)
    assert minde_entropy(x, steps=1000).value == pytest.approx(truth, abs=0.15)
    found = minde_divergence(draw(1, 5000, 2), draw(2, 5000, 2) + 1, steps=1000)
    assert found.value == pytest.approx(1.0, rel=0.15)
    point = torch.ones(400, 2)  # of two points apart the truth is infinite
    assert 10 < minde_divergence(point, point + 1).value < math.inf


def test_each_law_is_told_apart_and_the_value_is_of_the_first_and_held_out(monkeypatch):
    """Numbers of x lie above those of y, so that each says of which law it is."""
    x, clean, told = torch.arange(44.0), [], []
    plain, naming = diffusion.diffused, diffusion._told

    def spy(samples, noise, t):
        clean.append(samples[:, 0].tolist())
        return plain(samples, noise, t)

    def name(t, k):
        told.append(k)
        return naming(t, k)

    monkeypatch.setattr(diffusion, "diffused", spy)
    monkeypatch.setattr(diffusion, "_told", name)
    options = {"steps": 24, "width": 8, "batch_size": 8, "draws": 2}
    middle = float(torch.arange(88.0).mean() - 44) / float(torch.arange(88.0).std())
    for call, laws in (
        (partial(minde_divergence, y=x - 44), {0, 1}),
        (minde_entropy, {0}),
    ):
        clean.clear()
        told.clear()
        call(x, **options)
        assert set(told[:24]) == laws
        if laws == {0, 1}:
            for values, k in zip(clean[:24], told[:24], strict=True):
                assert all((v > middle) == (k == 0) for v in values)
            assert all(v > middle for v in clean[24])
        trained = {
            v for values, k in zip(clean[:24], told[:24], strict=True) for v in values if k == 0
        }
        assert clean[24] == clean[25]
        assert len(set(clean[24])) == 11
        assert not trained & set(clean[24])
