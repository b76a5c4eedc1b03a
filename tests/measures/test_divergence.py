import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import measures as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.divergence import alpha_divergence, js_divergence, kl_divergence

ALPHAS = [-1.5, -1, -1e-6, 0, 1e-6, 0.05, 0.5, 0.95, 1 - 1e-6, 1, 1 + 1e-6, 1.5, 2]


def alpha(value):
    return lambda p, q: alpha_divergence(p, q, alpha=value)


DIVERGENCES = {
    "kl": kl_divergence,
    "js": js_divergence,
    **{f"alpha {value}": alpha(value) for value in ALPHAS},
}
every_divergence = pytest.mark.parametrize(
    "divergence", DIVERGENCES.values(), ids=DIVERGENCES.keys()
)
rows = st.lists(
    st.tuples(st.floats(-30, 30, width=32), st.floats(-30, 30, width=32)), min_size=1, max_size=8
)


def normal(seed, *shape, scale=2.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)


def hard_pairs(dtype):
    inf = math.inf
    rows = torch.tensor(
        [[1e4, -1e4, 0], [-1e4, 1e4, 0], [0, 0, 0], [0, -inf, -inf], [-inf, 0, 1], [1, 2, -inf],
         [3e38, -3e38, 0], [90, 0, 0], [-90, 0, 0]], dtype=dtype)  # fmt: skip
    return rows.repeat_interleave(len(rows), 0), rows.repeat(len(rows), 1)


def gradients(divergence, p, q):
    p, q = p.detach().clone().requires_grad_(), q.detach().clone().requires_grad_()
    return torch.autograd.grad(divergence(p, q).sum(), (p, q))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_equal_the_references(dtype, scale):
    p, q = normal(0, 4, 3, 6, scale=scale).to(dtype), normal(1, 4, 3, 6, scale=scale).to(dtype)
    rtol = 2e-5 if dtype == torch.float32 else 1e-8

    def same(got, expected):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=rtol, atol=rtol / 10)

    a, b = p.double().numpy(), q.double().numpy()
    same(kl_divergence(p, q), reference.kl(a, b))
    same(js_divergence(p, q), reference.js(a, b))
    for value in (-1.5, -1, 0, 0.05, 0.5, 0.95, 1, 1.5, 2):
        same(alpha_divergence(p, q, alpha=value), reference.alpha(a, b, value))


@every_divergence
def test_gradients_equal_finite_differences_in_float64(divergence):
    pair = normal(2, 3, 5).requires_grad_(), normal(3, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(divergence, pair)


@every_divergence
def test_gradients_in_float32_equal_those_in_float64(divergence):
    p, q = normal(4, 6, 5).float(), normal(5, 6, 5).float()
    p[0, 1] = q[0, 1] = -math.inf
    q[1] = p[1]
    expected = gradients(divergence, p.double(), q.double())
    for got, exact in zip(gradients(divergence, p, q), expected, strict=True):
        scale = exact.abs().amax(-1, keepdim=True)
        assert ((got.double() - exact).abs() <= 2e-5 * scale + 1e-6).all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hard_logits_are_never_nan_and_have_finite_gradients(divergence, dtype):
    p, q = hard_pairs(dtype)
    value = divergence(p, q)
    assert value.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert (value >= -1e-6).all()
    assert all(slope.isfinite().all() for slope in gradients(divergence, p, q))


@pytest.mark.parametrize("scale", [-3.0, 65536.0])
@pytest.mark.parametrize("name", ["kl", "js", "alpha 0", "alpha 0.05", "alpha 0.5", "alpha 1"])
def test_gradients_of_weighted_losses_stay_finite_on_hard_logits(name, scale):
    slopes = gradients(lambda p, q: scale * DIVERGENCES[name](p, q), *hard_pairs(torch.float32))
    assert all(slope.isfinite().all() for slope in slopes)


@every_divergence
def test_rows_without_a_softmax_are_nan(divergence):
    good, bad = torch.tensor([0.0, 1.0]), torch.tensor([0.0, math.nan])
    assert divergence(good, bad).isnan()
    assert divergence(bad, good).isnan()


@pytest.mark.parametrize("value", [0.05, 0.5, 0.95])
def test_inside_the_unit_interval_no_alpha_divergence_is_infinite(value):
    got = alpha_divergence(*hard_pairs(torch.float32), alpha=value)
    assert (got <= 1 / (value * (1 - value)) + 1e-4).all()


def test_exclusion_of_a_class_is_infinite_only_where_it_must_be():
    wide, narrow = torch.tensor([0.0, 0.0]), torch.tensor([0.0, -math.inf])
    assert kl_divergence(wide, narrow) == math.inf
    assert kl_divergence(narrow, wide).item() == pytest.approx(math.log(2))
    assert kl_divergence(narrow, narrow) == 0
    assert alpha_divergence(narrow, wide, alpha=-1) == math.inf
    assert alpha_divergence(wide, narrow, alpha=2) == math.inf
    assert alpha_divergence(narrow, wide, alpha=2).item() == pytest.approx((2 - 1) / 2)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_divergences_are_positive_and_jensen_shannon_is_symmetric_and_bounded(row):
    p, q = torch.tensor(row).T
    js = js_divergence(p, q)
    assert -1e-9 <= js <= math.log(2) + 1e-6
    assert torch.allclose(js, js_divergence(q, p), atol=1e-7)
    for value in ALPHAS:
        assert alpha_divergence(p, q, alpha=value) >= -1e-6
        assert alpha_divergence(p, p, alpha=value) == 0
        assert torch.allclose(
            alpha_divergence(p, q, alpha=value),
            alpha_divergence(q, p, alpha=1 - value),
            rtol=1e-4,
            atol=1e-5,
        )


@settings(max_examples=60, deadline=None)
@given(rows, st.lists(st.integers(0, 3), min_size=8, max_size=8), st.integers(0, 99))
def test_processing_brings_predictions_no_farther_apart(row, groups, seed):
    """Merging classes, and any channel from class to class, loses: all of these are f-divergences."""
    p, q = torch.tensor(row, dtype=torch.float64).T.log_softmax(-1)
    index = torch.tensor(groups[: len(row)])
    merging = torch.where(index[:, None] == torch.arange(4), 0.0, -math.inf).double()
    channel = normal(seed, len(row), 5).log_softmax(-1)
    for step in (merging, channel):
        a, b = ((law[:, None] + step).logsumexp(0) for law in (p, q))
        for divergence in DIVERGENCES.values():
            before, after = float(divergence(p, q)), float(divergence(a, b))
            assert after <= before + 1e-9 * (1 + abs(before))


def test_disjoint_predictions_reach_ln_2():
    p, q = torch.tensor([1e4, 0.0]), torch.tensor([0.0, 1e4])
    assert js_divergence(p, q).item() == pytest.approx(math.log(2), abs=1e-6)


def test_limits_and_special_cases_of_alpha():
    p, q = normal(6, 50, 8).float(), normal(7, 50, 8).float()
    near = {"rtol": 1e-4, "atol": 1e-6}
    for step in (1e-7, -1e-7, 1e-12):
        assert torch.allclose(alpha_divergence(p, q, alpha=1 + step), kl_divergence(p, q), **near)
        assert torch.allclose(alpha_divergence(p, q, alpha=step), kl_divergence(q, p), **near)
    a, b = p.softmax(-1), q.softmax(-1)
    hellinger = (a.sqrt() - b.sqrt()).square().sum(-1) / 2
    assert torch.allclose(alpha_divergence(p, q, alpha=0.5), 4 * hellinger, **near)
    pearson = ((a - b).square() / b).sum(-1)
    assert torch.allclose(alpha_divergence(p, q, alpha=2), pearson / 2, **near)


@every_divergence
def test_small_divergences_keep_their_digits(divergence):
    p = normal(8, 20, 6).float()
    q = (p.double() + 1e-3 * normal(9, 20, 6)).float()
    exact = divergence(p.double(), q.double())
    assert torch.allclose(divergence(p, q).double(), exact, rtol=5e-3)


def test_half_precision_is_computed_in_float32():
    p, q = normal(10, 4, 20).bfloat16(), normal(11, 4, 20).bfloat16()
    for divergence in DIVERGENCES.values():
        assert torch.equal(divergence(p, q), divergence(p.float(), q.float()))


def test_bad_calls_are_refused():
    for divergence in DIVERGENCES.values():
        with pytest.raises(InputError, match=r"\(2, 3\) and \(3,\)"):
            divergence(torch.zeros(2, 3), torch.zeros(3))
    for value in (math.nan, math.inf):
        with pytest.raises(OptionError, match="alpha is"):
            alpha_divergence(torch.zeros(3), torch.zeros(3), alpha=value)
