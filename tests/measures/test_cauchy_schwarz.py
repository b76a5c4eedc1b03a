import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import cauchy_schwarz as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.cauchy_schwarz import (
    bottleneck_loss,
    conditional_divergence,
    normalised_information,
    quadratic_information,
)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


sizes = st.tuples(st.integers(0, 99), st.integers(2, 8), st.integers(1, 3), st.floats(0.3, 3))


@settings(max_examples=40)
@given(sizes, st.sampled_from(["paper", "code"]))
def test_the_formulas(size, mode):
    seed, n, d, s = size
    x, y, p, z = normal(seed, n, d), normal(seed + 1, n, 1), normal(seed + 2, n, 1), normal(seed + 3, n, 2)  # fmt: skip
    fit = reference.divergence(x.numpy(), y.numpy(), p.numpy(), s, mode)
    found = conditional_divergence(x, y, p, width=s, denominator=mode)
    assert float(found) == pytest.approx(fit, abs=1e-9)
    xn, zn = x.numpy(), z.numpy()
    expected = reference.information(xn, zn, s)
    assert float(quadratic_information(x, z, width=s)) == pytest.approx(float(expected), abs=1e-12)
    share = float(
        expected / (reference.information(xn, xn, s) * reference.information(zn, zn, s)).sqrt()
    )
    assert float(normalised_information(x, z, width=s)) == pytest.approx(share, abs=1e-9)
    loss = bottleneck_loss(x, y, z, p, beta=0.3, width=s, denominator=mode)
    assert float(loss) == pytest.approx(fit + 0.3 * share, abs=1e-9)


@settings(max_examples=40)
@given(sizes, st.floats(-5, 5))
def test_bounds_and_invariances(size, shift):
    seed, n, d, s = size
    x, y, p, z = normal(seed, n, d), normal(seed + 1, n, 1), normal(seed + 2, n, 1), normal(seed + 3, n, 2)  # fmt: skip
    assert float(conditional_divergence(x, y, y, width=s)) == pytest.approx(0, abs=1e-9)
    both = quadratic_information(x, z, width=s)
    assert float(quadratic_information(z, x, width=s)) == pytest.approx(float(both), abs=1e-9)
    turned = x @ torch.linalg.qr(normal(seed, d, d))[0] + shift
    assert float(quadratic_information(turned, z, width=s)) == pytest.approx(float(both), abs=1e-9)
    fit = conditional_divergence(x, y, p, width=s)
    moved = conditional_divergence(turned, y + shift, p + shift, width=s)
    assert float(moved) == pytest.approx(float(fit), abs=1e-9)


def test_an_estimate_can_be_below_nought():
    """Why no bound is asked above: the published formula has none, as this batch shows."""
    x, y, p = (normal(seed, 6, 1) for seed in (30, 31, 32))
    found = float(conditional_divergence(x, y, p, width=2.0))
    expected = reference.divergence(x.numpy(), y.numpy(), p.numpy(), 2.0, "paper")
    assert found == pytest.approx(expected, abs=1e-9)
    assert -0.01 < found < 0


def test_the_share_of_information_is_not_bound_by_one():
    x = torch.tensor([[0.0], [0.2], [0.15]], dtype=torch.float64)
    z = torch.tensor([[0.0], [-4.0], [-3.5]], dtype=torch.float64)
    own, other = (reference.information(v.numpy(), v.numpy(), 1.0) for v in (x, z))
    expected = reference.information(x.numpy(), z.numpy(), 1.0) / (own * other).sqrt()
    assert float(normalised_information(x, z)) == pytest.approx(float(expected), rel=1e-9)
    assert expected > 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4, 1e-8])
def test_samples_that_are_nearly_equal_keep_their_information(apart, dtype):
    """Of two samples: I = ln( 1 + (1 - k) (1 - q) / (1 + k) (1 + q) ), so that all are told."""
    x = torch.tensor([[0.0], [apart]], dtype=dtype, requires_grad=True)
    z = torch.tensor([[1.0], [0.0]], dtype=dtype, requires_grad=True)
    far = [-math.expm1(-(d**2) / 2) for d in (apart, 1.0)]
    expected = math.log1p(far[0] * far[1] / ((2 - far[0]) * (2 - far[1])))
    near = 8 * torch.finfo(dtype).eps
    assert float(quadratic_information(x, z).detach()) == pytest.approx(expected, rel=near, abs=0)
    same = normalised_information(x, x)
    assert float(same.detach()) == pytest.approx(1, rel=near)
    (slope,) = torch.autograd.grad(quadratic_information(x, z), x)
    assert float(slope[1]) == pytest.approx(-float(slope[0]), rel=near, abs=0) != 0


def test_it_grows_with_a_shift_and_with_correlation():
    x, noise = normal(0, 300, 1), normal(1, 300, 1)
    y = x + 0.1 * noise
    found = [float(conditional_divergence(x, y, y + shift)) for shift in (0, 0.1, 0.3, 1, 2)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0, abs=1e-9)
    assert found[-1] > 1
    told = [float(quadratic_information(x, r * x + math.sqrt(1 - r * r) * noise)) for r in (0, 0.3, 0.6, 0.9, 1)]  # fmt: skip
    assert told == sorted(told)
    assert told[-1] > 5 * told[0]


def test_far_predictions_have_finite_values_and_gradients():
    x, y = normal(0, 20, 2).float(), normal(1, 20, 1).float()
    predicted = (y + 1000).requires_grad_()
    found = conditional_divergence(x, y, predicted)
    assert math.isfinite(float(found.detach()))
    assert torch.autograd.grad(found, predicted)[0].isfinite().all()
    z = torch.ones(20, 2, requires_grad=True)
    share = normalised_information(x, z)
    assert float(share.detach()) == 0
    assert torch.autograd.grad(share, z)[0].isfinite().all()
    same = normalised_information(x.half(), x.half())
    assert (float(same), same.dtype) == (pytest.approx(1), torch.float32)


def test_bad_input():
    x, y = torch.rand(5, 2), torch.rand(5, 1)
    for call, said in {
        "length": (lambda: conditional_divergence(x, y, y[:4]), r"predicted \(4, 1\)"),
        "shape": (lambda: quadratic_information(x, y[:, 0]), r"z \(5,\)"),
        "dims": (lambda: conditional_divergence(x, y, x), "expected one shape"),
        "nan": (lambda: quadratic_information(x * math.nan, y), "x holds NaN"),
        "none": (lambda: quadratic_information(x[:0], y[:0]), "expected"),
    }.values():
        with pytest.raises(InputError, match=said):
            call()
    for options in ({"width": 0}, {"width": -1}, {"denominator": "other"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            conditional_divergence(x, y, y, **options)
    with pytest.raises(OptionError, match="beta is -1"):
        bottleneck_loss(x, y, x, y, beta=-1)
