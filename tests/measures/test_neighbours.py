import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reference import neighbours as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.information import neighbours
from testtime.measures.information.estimate import normal_scores, standardised
from testtime.measures.information.neighbours import kozachenko_leonenko, ksg


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(seed, n, d, rho):
    x = normal(seed, n, d)
    return x, rho * x + math.sqrt(1 - rho**2) * normal(seed + 1000, n, d)


pairs = st.builds(
    pair, st.integers(0, 99), st.integers(8, 40), st.integers(1, 3), st.floats(-0.99, 0.99)
)


@settings(max_examples=40)
@given(pairs, st.integers(1, 6), st.sampled_from([1, 2]))
def test_the_definitions(xy, k, variant):
    x, y = xy
    found = ksg(x, y, k=k, variant=variant)
    assert found.value == pytest.approx(reference.ksg(x.numpy(), y.numpy(), k, variant), abs=1e-9)
    assert found.standard_error >= 0  # 0 where all samples tell the same
    error = reference.ksg_error(x.numpy(), y.numpy(), k, variant)
    assert found.standard_error == pytest.approx(error, abs=1e-6)
    entropy = kozachenko_leonenko(x, k=k)
    assert entropy.value == pytest.approx(reference.entropy(x.numpy(), k), abs=1e-9)
    assert entropy.standard_error == pytest.approx(reference.entropy_error(x.numpy(), k), abs=1e-6)


@settings(max_examples=30)
@given(pairs, st.sampled_from([1, 2]), st.integers(0, 9), st.floats(-9, 9))
def test_moves_and_turns_change_no_information_and_scale_shifts_entropy(xy, variant, seed, shift):
    x, y = xy
    d = x.shape[1]
    turned = x @ torch.linalg.qr(normal(seed, d, d))[0] + shift
    assert ksg(turned, y, variant=variant).value == pytest.approx(
        ksg(x, y, variant=variant).value, abs=1e-6
    )
    assert ksg(y, x, variant=variant) == ksg(x, y, variant=variant)
    assert ksg(2 * x, 2 * y, variant=variant) == ksg(x, y, variant=variant)
    entropy = kozachenko_leonenko(x).value
    assert kozachenko_leonenko(turned).value == pytest.approx(entropy, abs=1e-6)
    assert kozachenko_leonenko(2 * x).value == pytest.approx(entropy + d * math.log(2), abs=1e-9)


def test_pieces_of_the_distances_make_no_difference(monkeypatch):
    x, y = pair(0, 50, 2, 0.7)
    whole = [ksg(x, y), ksg(x, y, variant=2), kozachenko_leonenko(x)]
    monkeypatch.setattr(neighbours, "ENTRIES", 7 * 50)
    assert whole == [ksg(x, y), ksg(x, y, variant=2), kozachenko_leonenko(x)]


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
def test_the_truth_of_a_gaussian_within_four_standard_errors(variant, rho):
    x, y = pair(3, 1500, 1, rho)
    found = ksg(x, y, variant=variant)
    truth = -math.log(1 - rho**2) / 2
    assert abs(found.value - truth) < 4 * found.standard_error < 0.15
    again = ksg(x.exp(), y**3, variant=variant)  # invertible marginals
    assert abs(again.value - truth) < 4 * again.standard_error


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_discrete_variable_and_a_continuous_one(variant, k):
    """Three classes, each a normal of its own: H(y) - H(y | x) by a sum over a grid."""
    x = torch.randint(3, (2000,), generator=torch.Generator().manual_seed(2)).double()
    y = x + 0.7 * normal(3, 2000)
    grid = torch.linspace(-5, 7, 12001, dtype=torch.float64)
    density = (-((grid[:, None] - torch.arange(3)) ** 2) / 0.98).exp().mean(1)
    density = density / (0.7 * math.sqrt(2 * math.pi))
    truth = 0.001 * float(torch.special.entr(density).sum())
    truth -= 0.5 * math.log(2 * math.pi * math.e * 0.49)
    for found in (ksg(x, y, k=k, variant=variant), ksg(y, x, k=k, variant=variant)):
        assert found.value == pytest.approx(truth, abs=4 * found.standard_error)


def test_the_entropy_of_known_laws():
    found = kozachenko_leonenko(normal(0, 2000, 3))
    assert abs(found.value - 1.5 * math.log(2 * math.pi * math.e)) < 4 * found.standard_error
    uniform = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0))
    assert abs(kozachenko_leonenko(uniform).value) < 0.1


def test_the_standard_error_is_the_spread_over_draws():
    found = [ksg(*pair(seed, 200, 1, 0.8)) for seed in range(40)]
    values = torch.tensor([each.value for each in found])
    errors = torch.tensor([each.standard_error for each in found])
    assert 0.7 < float(values.std() / errors.mean()) < 1.5


def test_constants_and_copies():
    x, y = pair(0, 40, 2, 0.7)
    assert ksg(torch.ones(40), y).value == 0
    assert ksg(x, torch.zeros(40, 3), variant=2).value == 0
    assert ksg(torch.cat([x, torch.ones(40, 1)], 1), y) == ksg(x, y)  # a constant feature
    assert math.isfinite(ksg(torch.cat([x, x]), torch.cat([y, y])).value)
    with pytest.raises(InputError, match=r"more than k = 1 samples of \(x, y\) are equal"):
        ksg(torch.cat([x, x]), torch.cat([y, y]), k=1)
    with pytest.raises(InputError, match="more than k = 3 samples of x are equal"):
        kozachenko_leonenko(torch.ones(9, 2))
    assert math.isfinite(ksg(normal(0, 8, 20), normal(1, 8, 20)).value)  # more coordinates


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.tensor([0.0, math.nan, 1.0, 2.0]), torch.ones(4), "NaN or infinity, first in sample 1"),
        (torch.rand(9), torch.rand(8), "9 samples on cpu and y 8"),
        (torch.rand(9, 2, 2), torch.rand(9), r"shape \(9, 2, 2\)"),
        (torch.rand(9, 0), torch.rand(9), r"shape \(9, 0\)"),
        (torch.rand(3), torch.rand(3), "x has 3 samples; this needs at least 4"),
        (torch.rand(9), torch.rand(9) * 1j, "complex"),
    ],
)  # fmt: skip
def test_bad_samples_are_refused(x, y, said):
    with pytest.raises(InputError, match=said):
        ksg(x, y)


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="variant is 3"):
        ksg(torch.rand(9), torch.rand(9), variant=3)
    with pytest.raises(OptionError, match="k is 0"):
        kozachenko_leonenko(torch.rand(9), k=0)


def test_nothing_of_the_caller_is_touched():
    x, y = pair(0, 30, 1, 0.5)
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        assert ksg(x * 1, y * 1) == ksg(x.requires_grad_(), y)
    assert torch.equal(before, torch.random.get_rng_state())


def test_standardising():
    x = standardised(torch.tensor([[1e9, 5.0, 0.0], [1e9 + 2, 5.0, 1e-9]], dtype=torch.float64))
    torch.testing.assert_close(x.abs(), 0.5**0.5 * torch.tensor([[1.0, 0, 1], [1, 0, 1]]))
    for n in range(2, 30):  # whose mean may be another number by rounding
        assert not standardised(torch.full((n, 1), 0.1, dtype=torch.float64)).any()


@given(st.integers(0, 99), st.integers(2, 30), st.integers(1, 3), st.sampled_from([1, 9, 1e300]))
def test_normal_scores_are_quantiles_of_mean_ranks(seed, n, d, scale):
    x = scale * (3 * normal(seed, n, d)).round()  # many are equal
    expected = stats.norm.ppf(stats.rankdata(x.numpy(), axis=0) / (n + 1))
    torch.testing.assert_close(normal_scores(x), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normal_scores(-x), -normal_scores(x), rtol=1e-9, atol=1e-9)
    assert torch.equal(normal_scores(x[:, 0]), normal_scores(x)[:, 0])


def test_what_has_no_normal_scores():
    assert torch.equal(normal_scores(torch.ones(5, 2)), torch.zeros(5, 2, dtype=torch.float64))
    assert normal_scores([3, 1, 2]).tolist() == pytest.approx([0.6745, -0.6745, 0.0], abs=1e-4)
    for bad in (torch.tensor([1.0, math.nan]), torch.ones(1, 2), torch.ones(2, 2, 2)):
        with pytest.raises(InputError, match=r"expected|at least 2"):
            normal_scores(bad)
