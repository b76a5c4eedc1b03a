import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import measures as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.entropy import (
    cross_entropy,
    entropy,
    entropy_of_probs,
    marginal_entropy,
    mutual_information,
    renyi_entropy,
    tsallis_entropy,
)

ADAPTED = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
ORIGINAL = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]])
ORDERS = [0, 0.01, 0.5, 0.9, 0.95, 1 - 1e-6, 1, 1 + 1e-6, 1.05, 1.1, 2, 7.5, 1e4, math.inf]
TSALLIS_ORDERS = [order for order in ORDERS if 0 < order < 1e4]


def probs(logits):
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def renyi(order):
    return lambda logits: renyi_entropy(logits, order=order)


def tsallis(order):
    return lambda logits: tsallis_entropy(logits, order=order)


MEASURES = {
    "shannon": entropy,
    "marginal": lambda logits: marginal_entropy(logits.unsqueeze(0)),
    "marginal over rows": marginal_entropy,
    "mutual information": mutual_information,
    "cross-entropy to a constant": lambda z: cross_entropy(torch.full_like(probs(z), 0.1), z),
    "cross-entropy to itself": lambda z: cross_entropy(probs(z), z),
    "of probabilities": lambda logits: entropy_of_probs(probs(logits)),
    **{f"renyi {order}": renyi(order) for order in ORDERS},
    **{f"tsallis {order}": tsallis(order) for order in TSALLIS_ORDERS},
}
SMOOTH = {name: f for name, f in MEASURES.items() if name not in ("renyi 0", "renyi inf")}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
smooth_measure = pytest.mark.parametrize("measure", SMOOTH.values(), ids=SMOOTH.keys())


def normal(seed, *shape, scale=3.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)


def hard_rows(dtype=torch.float32):
    """Rows that break careless formulas: huge, tiny, one-hot, masked, uniform."""
    inf = math.inf
    return torch.tensor(
        [
            [1e4, -1e4, 0, 3],
            [-1e4, -1e4, -1e4, -1e4],
            [1e4, 1e4, -1e4, -1e4],
            [0, 0, 0, 0],
            [0, -inf, -inf, -inf],
            [1, 2, -inf, -inf],
            [1e4, -inf, 9.9e3, -1e4],
            [3e38, -3e38, 0, 0],
            [90, 0, 0, 0],
            [1e-30, -1e-30, 0, 0],
        ],
        dtype=dtype,
    )


def gradient(measure, logits):
    logits = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(measure(logits).sum(), logits)[0]


def test_known_values():
    h = entropy(ADAPTED)
    assert torch.allclose(h, torch.tensor([0.665573, 1.020191, 0.366594, 1.095287]), atol=1e-6)
    assert h.mean().item() == pytest.approx(0.786911, abs=1e-6)
    slope = gradient(lambda z: entropy(z).mean(), ADAPTED)
    assert torch.allclose(slope[0], torch.tensor([-0.083820, 0.041910, 0.041910]), atol=1e-6)
    assert torch.allclose(slope[3], torch.tensor([-0.008568, 0.000553, 0.008015]), atol=1e-6)
    forwards = cross_entropy(ORIGINAL.softmax(-1), ADAPTED).mean().item()
    backwards = cross_entropy(ADAPTED.softmax(-1), ORIGINAL).mean().item()
    assert forwards == pytest.approx(1.034976, abs=1e-6)
    assert (forwards + backwards) / 2 == pytest.approx(0.977513, abs=1e-6)
    assert marginal_entropy(ADAPTED).item() == pytest.approx(1.021509, abs=1e-6)
    assert mutual_information(ADAPTED).item() == pytest.approx(1.021509 - 0.786911, abs=1e-5)
    assert (h.mean() - marginal_entropy(ADAPTED)).item() == pytest.approx(-0.234598, abs=1e-6)
    coefficients = (1.0 - h[[0, 2]]).exp()
    assert torch.allclose(coefficients, torch.tensor([1.397140, 1.884017]), atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_equal_the_references(dtype, scale):
    logits = normal(0, 5, 4, 6, scale=scale).to(dtype)
    z = logits.double().numpy()
    close = {"rtol": 1e-5, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}

    def same(got, expected):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.double().numpy(), expected, **close)

    same(entropy(logits), reference.entropy(z))
    same(entropy_of_probs(logits.softmax(-1)), reference.entropy(z))
    same(mutual_information(logits), reference.mutual_information(z))
    same(marginal_entropy(logits), reference.mutual_information(z) + reference.entropy(z).mean(0))
    for order in (0, 0.3, 0.95, 1, 1.02, 2, 5, math.inf):
        same(renyi_entropy(logits, order=order), reference.renyi(z, order))
    for order in (0.3, 0.95, 1, 1.02, 2, 5):
        same(tsallis_entropy(logits, order=order), reference.tsallis(z, order))
    targets = logits.flip(-1).softmax(-1)
    log_p = logits.double().log_softmax(-1)
    same(cross_entropy(targets, logits), -(targets.double() * log_p).sum(-1).numpy())


@smooth_measure
def test_gradients_equal_finite_differences_in_float64(measure):
    assert torch.autograd.gradcheck(measure, normal(1, 3, 5).requires_grad_())


@every_measure
def test_gradients_in_float32_equal_those_in_float64(measure):
    logits = normal(2, 6, 7).float()
    logits[0, 3] = -math.inf
    logits[1, :3] = -math.inf
    expected = gradient(measure, logits.double())
    got = gradient(measure, logits)
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-6)


@every_measure
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_hard_logits_have_finite_values_and_gradients(measure, dtype):
    logits = hard_rows(dtype)
    value = measure(logits)
    assert value.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    bound = math.inf if measure is MEASURES["cross-entropy to a constant"] else 7.0
    assert (value >= -1e-6).all()
    assert (value <= bound).all()
    assert value.isfinite().all()
    assert gradient(measure, logits).isfinite().all()


@every_measure
@pytest.mark.parametrize("scale", [1e-8, 3.0, -3.0, 65536.0])
def test_gradients_of_weighted_losses_scale_and_stay_finite_on_hard_logits(measure, scale):
    logits = hard_rows()
    got = gradient(lambda z: scale * measure(z), logits)
    assert got.isfinite().all()
    assert torch.allclose(got / scale, gradient(measure, logits), rtol=1e-4, atol=1e-6)


@every_measure
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_softmax_are_nan_and_never_a_plausible_number(measure, bad):
    row = [-math.inf, -math.inf, bad] if bad < 0 else [0.0, 1.0, bad]
    assert measure(torch.tensor([row, row])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = normal(3, 4, 50).to(dtype)
    for measure in MEASURES.values():
        assert torch.equal(measure(logits), measure(logits.float()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-200, 200, width=32) | st.just(-math.inf), min_size=1, max_size=9))
def test_entropies_are_bounded_ordered_and_blind_to_shifts(row):
    logits = torch.tensor(row)
    if logits.isneginf().all():
        logits[0] = 0.0
    values = [renyi_entropy(logits, order=order) for order in ORDERS]
    assert all(-1e-6 <= value <= math.log(len(row)) + 1e-5 for value in values)
    assert all(a >= b - 1e-5 for a, b in itertools.pairwise(values))  # falls with order
    assert torch.allclose(entropy(logits.flip(0)), entropy(logits), atol=1e-5)
    assert torch.allclose(entropy(logits.double() + 1e3), entropy(logits.double()), atol=1e-9)
    assert gradient(entropy, logits).isfinite().all()
    masked = torch.cat([logits, torch.tensor([-math.inf])])
    for order, value in zip(ORDERS, values, strict=True):
        assert torch.allclose(renyi_entropy(masked, order=order), value, atol=1e-5)


@pytest.mark.parametrize("order", [1 - 1e-7, 1 + 1e-7, 1 - 1e-12, 1 + 1e-12])
def test_orders_near_one_tend_to_shannon_in_float32(order):
    logits = normal(4, 20, 10).float()
    for measure in (renyi_entropy, tsallis_entropy):
        assert torch.allclose(measure(logits, order=order), entropy(logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("edge", [0.9, 1.1])
def test_the_two_formulas_meet_where_they_change(edge):
    logits = normal(5, 20, 10)
    for measure in (renyi_entropy, tsallis_entropy):
        inside = measure(logits, order=edge + (1e-9 if edge < 1 else -1e-9))
        outside = measure(logits, order=edge - (1e-9 if edge < 1 else -1e-9))
        assert torch.allclose(inside, outside, atol=1e-7)


@pytest.mark.parametrize("order", [0.01, 0.2, 0.95, 3.0])
def test_impossible_classes_count_nothing_in_any_order(order):
    logits = normal(6, 20, 4).float()
    masked = torch.cat([logits, torch.full((20, 3), -math.inf)], 1)
    for measure in (renyi_entropy, tsallis_entropy):
        torch.testing.assert_close(measure(masked, order=order), measure(logits, order=order))


def test_limits_of_the_orders():
    logits = torch.tensor([2.0, 1.0, -1e4, -math.inf])
    assert renyi_entropy(logits, order=0).item() == pytest.approx(math.log(3))
    assert renyi_entropy(logits, order=math.inf).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert tsallis_entropy(torch.zeros(4), order=2).item() == pytest.approx(0.75)


def test_zero_probabilities_count_nothing_and_have_a_finite_gradient():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert torch.allclose(entropy_of_probs(probs), torch.tensor([math.log(2), 0.0]))
    slope = gradient(entropy_of_probs, probs)
    assert slope.isfinite().all()
    assert torch.allclose(slope[0, :2], torch.full((2,), math.log(2) - 1))
    inside = normal(6, 3, 4).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(entropy_of_probs, inside)
    half = inside.detach().bfloat16()
    assert torch.equal(entropy_of_probs(half), entropy_of_probs(half.float()))


def test_cross_entropy_has_gradients_to_both_sides_and_ignores_excluded_classes():
    targets, logits = normal(7, 3, 4).softmax(-1), normal(8, 3, 4)
    assert torch.autograd.gradcheck(
        cross_entropy, (targets.requires_grad_(), logits.requires_grad_())
    )
    masked = torch.tensor([0.0, 0.0, -math.inf])
    assert cross_entropy(torch.tensor([1.0, 0, 0]), masked).item() == pytest.approx(math.log(2))
    contradiction = torch.tensor([0.5, 0.0, 0.5])
    assert cross_entropy(contradiction, masked).item() == pytest.approx(5e19)
    batch = cross_entropy(contradiction.expand(64, 3), masked.expand(64, 3))
    assert batch.mean().item() == pytest.approx(5e19)
    assert gradient(lambda z: cross_entropy(contradiction, z), masked).isfinite().all()
    assert gradient(lambda t: cross_entropy(t, masked), contradiction).isfinite().all()


def test_gradient_of_entropy_is_that_of_the_published_form_to_the_bit():
    logits = normal(9, 20, 10).float()
    published = gradient(lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1).mean(), logits)
    assert torch.equal(gradient(lambda z: entropy(z).mean(), logits), published)


def test_mutual_information_keeps_its_digits_where_predictions_agree():
    logits = normal(10, 1, 3, 8) + 1e-3 * normal(11, 6, 3, 8)
    exact = reference.mutual_information(logits.numpy())
    got = mutual_information(logits.float()).double().numpy()
    np.testing.assert_allclose(got, exact, rtol=5e-3)
    assert (got > 0).all()


@pytest.mark.parametrize("measure", [renyi_entropy, tsallis_entropy])
@pytest.mark.parametrize("order", [-1.0, math.nan])
def test_orders_that_do_not_exist_are_refused(measure, order):
    with pytest.raises(OptionError, match="order is"):
        measure(torch.zeros(3), order=order)
    with pytest.raises(OptionError, match="order is 0"):
        tsallis_entropy(torch.zeros(3), order=0)


def test_shapes_without_a_softmax_or_a_mean_are_refused():
    for logits in (torch.tensor(1.0), torch.zeros(3, 0)):
        with pytest.raises(InputError, match="classes"):
            entropy(logits)
        with pytest.raises(InputError, match="classes"):
            entropy_of_probs(logits)
    for logits in (torch.zeros(3), torch.zeros(0, 3)):
        for measure in (marginal_entropy, mutual_information):
            with pytest.raises(InputError, match="samples"):
                measure(logits)


def test_a_cross_entropy_of_two_shapes_is_refused():
    for targets in (torch.full((5, 1), 0.5), torch.full((3,), 0.3), torch.zeros(4, 3)):
        with pytest.raises(InputError, match="expected one shape"):
            cross_entropy(targets, torch.zeros(5, 3))


def test_an_empty_batch_has_no_entropies():
    assert entropy(torch.zeros(0, 3)).shape == (0,)
