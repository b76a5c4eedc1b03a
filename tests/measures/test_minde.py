import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from testtime._core.errors import InputError, OptionError
from testtime.measures.information import minde as file
from testtime.measures.information import noise as schedule
from testtime.measures.information import noise_network
from testtime.measures.information.consistency import self_consistency
from testtime.measures.information.estimate import Estimate
from testtime.measures.information.laws import gaussian
from testtime.measures.information.minde import diffusion_information, minde, sampled_times


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rate(t):
    t = max(t, 1e-3)
    return (0.1 + 19.9 * t) / (1 - math.exp(-(0.1 * t + 9.95 * t**2)))


def test_times_have_the_density_of_the_rate():
    total = integrate.quad(rate, 0, 1, points=[1e-3])[0]
    assert schedule.rate_integral() == pytest.approx(total, rel=1e-6)
    times = sampled_times(2000, generator()).numpy()

    def below(t):
        return np.array([integrate.quad(rate, 0, u, points=[1e-3])[0] / total for u in t])

    assert stats.kstest(times[:400], below).pvalue > 1e-3
    assert 0 <= times.min() <= times.max() <= 1


@pytest.mark.parametrize("difference", ["inside", "outside"])
def test_uniform_times_weigh_the_difference_of_scores_by_beta(difference):
    """Against the integral of beta |score difference|^2 / 2, for predictions 0 and z, by hand."""
    times = sampled_times(2000, generator(), importance=False).numpy()
    assert stats.kstest(times, "uniform", (1e-5, 1 - 1e-5)).pvalue > 1e-3

    def noise(z, tau):  # z where x is alone, 0 where y is given
        return z * (tau[:, 1:] == 1)

    x = torch.randn(1, 1, generator=generator(3), dtype=torch.float64)
    terms = diffusion_information(
        noise, x, x, kind="c", difference=difference, importance=False,
        draws=3, generator=generator(4),
    )  # fmt: skip
    random, by_hand = generator(4), 0.0
    for _ in range(3):
        t = 1e-5 + (1 - 1e-5) * float(torch.rand(1, generator=random, dtype=torch.float64))
        e = float(torch.randn(1, 2, generator=random, dtype=torch.float64)[0, 0])
        beta, grown = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
        m, s = math.exp(-grown / 2), math.sqrt(1 - math.exp(-grown))
        z = m * float(x) + s * e
        alone, given, normal = -z / s, 0.0, -s * z / s
        if difference == "inside":
            by_hand += beta / 2 * (alone - given) ** 2
        else:
            by_hand += beta / 2 * ((given - normal) ** 2 - (alone - normal) ** 2)
    assert float(terms) == pytest.approx(by_hand / 3, rel=1e-9)


def exact(rho, dims):
    """The best predictions for correlated Gaussians: s Sigma_t^-1 (z - mean), by conditioning."""

    def noise(z, tau):
        a, b = tau.double().T
        x, y = z.double()[:, :dims], z.double()[:, dims:]

        def alone(v, t):  # variance 1 stays 1
            return schedule.signal_and_noise(t)[1][:, None] * v

        def given(v, clean, t):
            m, s = (f[:, None] for f in schedule.signal_and_noise(t))
            return s * (v - m * rho * clean) / (m**2 * (1 - rho**2) + s**2)

        if bool((b == 1).all()):
            return torch.cat([alone(x, a), torch.zeros_like(y)], 1)
        if bool((b == 0).all()):
            return torch.cat([given(x, y, a), torch.zeros_like(y)], 1)
        if bool((a == 0).all()):
            return torch.cat([torch.zeros_like(x), given(y, x, b)], 1)
        m, s = (f[:, None] for f in schedule.signal_and_noise(a))
        c = m**2 * rho
        return torch.cat([s * (x - c * y), s * (y - c * x)], 1) / torch.cat(
            [1 - c**2] * 2 * dims, 1
        )

    return noise


@pytest.mark.parametrize("kind", ["c", "j"])
@pytest.mark.parametrize("difference", ["inside", "outside"])
@pytest.mark.parametrize("importance", [True, False])
@pytest.mark.parametrize("information", [0.2, 1.0, 2.0])
def test_the_exact_noise_gives_the_exact_information(kind, difference, importance, information):
    dims = 2
    rho = math.sqrt(1 - math.exp(-2 * information / dims))
    x, y, _ = gaussian(8000, dims=dims, information=information, generator=generator())
    terms = diffusion_information(
        exact(rho, dims), x, y,
        kind=kind, difference=difference, importance=importance, draws=4, generator=generator(1),
    )  # fmt: skip
    error = float(terms.std()) / len(terms) ** 0.5
    assert float(terms.mean()) == pytest.approx(information, abs=4 * error)
    assert error < 0.05 * information


@pytest.mark.parametrize("kind", ["c", "j"])
def test_it_repeats_and_leaves_the_caller_alone(kind):
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    before = torch.random.get_rng_state()
    found = minde(x, y, kind=kind, steps=3, width=8)
    with torch.inference_mode():
        assert minde(x * 1, y * 1, kind=kind, steps=3, width=8) == found
    assert minde(x, y, kind=kind, steps=3, width=8, seed=1) != found
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.value >= 0
    assert len(minde(x, y, kind=kind, steps=3, width=8, trace=True).trace) == 3
    moved = minde(3 * x + 1, y, kind=kind, steps=3, width=8)
    assert moved.value == pytest.approx(found.value, abs=1e-4)


def test_bad_input():
    x = torch.rand(40, 2)
    assert minde(x, torch.ones(40)) == Estimate(0.0, 0.0)
    assert math.isfinite(minde(torch.rand(40, 60), x, steps=2, width=8).value)
    with pytest.raises(InputError, match="NaN"):
        minde(x * math.nan, x)
    with pytest.raises(InputError, match="41 samples"):
        minde(torch.rand(41), x)
    for options in (
        {"kind": "x"},
        {"difference": "x"},
        {"width": 12},
        {"steps": 0},
        {"draws": 0},
        {"decay": 2},
    ):
        with pytest.raises(OptionError, match=next(iter(options))):
            minde(x, x, **options)


def test_uniform_times_are_those_of_the_training_too():
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    seen, drawn = [], file.sampled_times

    def spy(n, generator, *, importance=True):
        seen.append(importance)
        return drawn(n, generator, importance=importance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "sampled_times", spy)
        found = minde(x, y, steps=3, draws=2, width=8, importance=False)
    assert seen == [False] * 5
    assert math.isfinite(found.value)
    assert found != minde(x, y, steps=3, draws=2, width=8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c", "j"])
def test_it_learns_what_a_gaussian_tells(kind):
    x, y, truth = gaussian(4000, dims=2, information=1.0, generator=generator())
    found = minde(x, y, kind=kind, steps=800)
    assert abs(found.value - truth) < 0.2
    longer = 1600 if kind == "j" else 400  # j finds two networks in one, which takes longer
    assert minde(x, y.flip(0), kind=kind, steps=longer).value < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("dims", "rho"), [(2, 0.8), (5, 0.6)])
def test_both_kinds_agree_within_a_fifth_on_the_bench(dims, rho, seed):
    truth = -dims / 2 * math.log(1 - rho**2)
    x, y, _ = gaussian(5000, dims=dims, information=truth, generator=generator(seed))
    c, j = (minde(x, y, kind=kind, seed=seed).value for kind in ("c", "j"))
    assert c == pytest.approx(truth, rel=0.15)
    assert j == pytest.approx(c, rel=0.2)


@pytest.mark.parametrize("mask", ["x", "x|y", "y|x", "xy"])
def test_an_untrained_network_predicts_what_is_right_for_independent_normals(mask):
    x, y, _ = gaussian(9, dims=2, information=0.0, generator=generator())
    both, t = torch.cat([x, y[:, :1]], 1), sampled_times(9, generator(1))
    z = schedule.diffused(both, schedule.normal_like(both, generator(2)), t)
    found = file.around_normal(lambda z, tau: 0 * z, 2)(*file._fed(both, z, t, 2, mask))
    s = schedule.signal_and_noise(t)[1][:, None]
    moves = torch.tensor([mask in ("x", "x|y", "xy")] * 2 + [mask in ("y|x", "xy")])
    torch.testing.assert_close(found, s * z * moves)


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["inside", "outside"])
def test_it_learns_with_uniform_times(difference):
    x, y, truth = gaussian(4000, dims=2, information=1.0, generator=generator())
    uniform = partial(minde, difference=difference, importance=False, steps=800, draws=20)
    assert abs(uniform(x, y).value - truth) < 0.5  # early times, of much weight, are rare
    assert abs(uniform(x, y.flip(0)).value) < 0.3


@pytest.mark.slow
def test_the_information_of_an_independent_copy_adds_up():
    x, y, _ = gaussian(6000, dims=1, information=0.7, generator=generator())
    found = self_consistency(partial(minde, steps=700), x, y)
    assert found.additivity == pytest.approx(2, abs=0.2)
    assert abs(found.independent) < 0.05
    assert found.processing == pytest.approx(1, abs=0.15)


def test_the_value_is_of_running_means_of_weights_and_the_step_size_falls(monkeypatch):
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    options = {"steps": 5, "width": 8, "batch_size": 16, "lr": 0.05}
    latest, still = (minde(x, y, decay=decay, **options) for decay in (0.0, 1.0))
    assert still.value == 0 < latest.value  # the first network answers 0
    falls, plain = [], noise_network.adam

    def spy(network, *, lr, decay_over):
        falls.append((lr, decay_over))
        return plain(network, lr=lr, decay_over=decay_over)

    monkeypatch.setattr(noise_network, "adam", spy)
    minde(x, y, **options)
    assert falls == [(0.05, 5)]


def test_the_loss_weighs_a_mask_by_what_it_leaves_clean():
    """A network that answers 0 misses noise of 1, 2 | 3 by the squares of what a mask diffuses."""
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    size, traces = torch.tensor([1.0, 2.0, 3.0]), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "around_normal", lambda network, d: network)
        patch.setattr(file, "normal_like", lambda like, _: size.expand_as(like))
        for kind in ("c", "j"):
            found = minde(x, y[:, :1], kind=kind, steps=200, lr=0.0, width=8, batch_size=2, draws=1, trace=True)  # fmt: skip
            traces[kind] = torch.tensor(found.trace)
    of_x, of_y, both = 4 / 3 * 5 / 2, 5 / 3 * 9, 14 / 3
    torch.testing.assert_close(traces["c"], torch.full((200,), of_x))
    shares = [float((traces["j"] - each).abs().lt(1e-4).double().mean()) for each in (of_x, of_y, both)]  # fmt: skip
    assert sum(shares) == 1
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.12)


@pytest.mark.parametrize("kind", ["c", "j"])
def test_a_mask_shows_nothing_of_what_it_hides(kind):
    x, y, _ = gaussian(9, dims=2, information=1.0, generator=generator())
    seen = set()

    def noise(z, tau):
        told = []
        for own, clean, t in ((z[:, :2], x, tau[:, 0]), (z[:, 2:], y, tau[:, 1])):
            given, hidden = bool((t == 0).all()), bool((t == 1).all())
            assert not given or torch.equal(own, clean)
            assert not hidden or not own.any()
            told.append("given" if given else "hidden" if hidden else "diffused")
        seen.add(tuple(told))
        return torch.zeros_like(z)

    diffusion_information(noise, x, y, kind=kind, draws=2, generator=generator())
    alone = ("diffused", "hidden") if kind == "c" else ("diffused", "diffused")
    others = {("given", "diffused")} if kind == "j" else set()
    assert seen == {alone, ("diffused", "given")} | others


def test_the_value_is_of_pairs_that_no_step_has_seen(monkeypatch):
    seen, plain = [], file.diffused

    def spy(clean, noise, t):
        seen.append(clean)
        return plain(clean, noise, t)

    monkeypatch.setattr(file, "diffused", spy)
    minde(torch.arange(44.0), -torch.arange(44.0), steps=12, width=8, batch_size=8, draws=2)
    assert all(torch.equal(both[:, 0], -both[:, 1]) for both in seen)
    trained = {v for both in seen[:12] for v in both[:, 0].tolist()}
    held = [both[:, 0].tolist() for both in seen[12:]]
    assert held[0] == held[1]
    assert len(set(held[0])) == 11
    assert not trained & set(held[0])
