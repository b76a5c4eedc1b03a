import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from reference import measures as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.calibration import (
    adaptive_calibration_error,
    brier_score,
    calibration_error,
    classwise_calibration_error,
    negative_log_likelihood,
    reliability,
)

BINNED = [calibration_error, adaptive_calibration_error, reliability]


def draws(seed, samples=200, classes=5):
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=draw, dtype=torch.float64)
    return logits, torch.randint(classes, (samples,), generator=draw)


def answers(seed, samples=200):
    logits, labels = draws(seed, samples)
    confidence, answer = logits.softmax(-1).max(-1)
    return confidence, answer == labels


def gradient(f, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_equal_the_references(dtype, bins):
    confidence, hit = answers(0)
    a, b = confidence.numpy(), hit.numpy()
    logits, labels = draws(1)
    probs = logits.softmax(-1)
    for got, expected in (
        (calibration_error(confidence.to(dtype), hit, bins=bins),
         reference.calibration_error(a, b, bins)),
        (adaptive_calibration_error(confidence.to(dtype), hit, bins=bins),
         reference.adaptive_calibration_error(a, b, bins)),
        (classwise_calibration_error(probs.to(dtype), labels, bins=bins),
         reference.classwise_calibration_error(probs.numpy(), labels.numpy(), bins)),
    ):  # fmt: skip
        assert got.dtype == dtype
        assert got.item() == pytest.approx(expected, abs=1e-6)


def test_fifteen_bins_are_what_an_error_means_where_none_are_said():
    logits, labels = draws(1)
    for measure, known in (*((each, answers(0)) for each in BINNED),
                           (classwise_calibration_error, (logits.softmax(-1), labels))):  # fmt: skip
        assert str(measure(*known)) == str(measure(*known, bins=15))


def test_brier_and_likelihood_equal_scikit_learn_and_their_definitions():
    logits, labels = draws(2)
    probs = logits.softmax(-1)
    expected = metrics.log_loss(labels.numpy(), probs.numpy(), labels=range(5))
    assert negative_log_likelihood(logits, labels).item() == pytest.approx(expected)
    each = [
        sum((p - (c == y)) ** 2 for c, p in enumerate(row))
        for row, y in zip(probs.tolist(), labels.tolist(), strict=True)
    ]
    assert brier_score(probs, labels).item() == pytest.approx(sum(each) / len(each))
    assert brier_score(torch.eye(2), torch.tensor([1, 0])) == 2


def test_many_samples_are_summed_in_parts_without_a_trace():
    logits, labels = draws(3, samples=2500, classes=4)
    probs, one_hot = logits.softmax(-1), torch.eye(4, dtype=torch.float64)[labels]
    expected = reference.classwise_calibration_error(probs.numpy(), labels.numpy(), 15)
    assert classwise_calibration_error(probs, labels).item() == pytest.approx(expected, abs=1e-12)
    whole = (probs - one_hot).square().sum(1).mean()
    assert brier_score(probs, labels).item() == pytest.approx(whole.item(), abs=1e-12)
    slope = gradient(lambda p: brier_score(p, labels), probs)
    assert torch.allclose(slope, 2 * (probs - one_hot) / 2500, atol=1e-15)
    tilt = gradient(lambda p: classwise_calibration_error(p, labels), probs)
    assert torch.allclose(tilt.abs(), torch.full_like(tilt, 1 / (4 * 2500)))


def test_edges_belong_to_the_lower_bin_and_zero_to_the_first():
    edges = torch.arange(16) / 15
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        stated = (torch.arange(16, dtype=torch.float64) / 15).to(dtype)
        count = reliability(stated, torch.ones(16, dtype=torch.bool)).count
        assert count.tolist() == [2] + [1] * 14
    above = torch.nextafter(edges[1:2], torch.ones(1))
    assert reliability(above, torch.tensor([True])).count.argmax() == 1


def test_reliability_gives_back_the_calibration_error_and_zeros_in_empty_bins():
    confidence, hit = answers(3, samples=40)
    confidence = confidence / 2
    table = reliability(confidence, hit, bins=20)
    gap = (table.count * (table.accuracy - table.confidence).abs()).sum() / 40
    assert gap.item() == pytest.approx(calibration_error(confidence, hit, bins=20).item())
    assert table.count.sum() == 40
    empty = table.count == 0
    assert empty[10:].all()
    assert (table.confidence[empty] == 0).all()
    assert (table.accuracy[empty] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1))
def test_errors_are_bounded_and_blind_to_order_also_with_ties(rows):
    confidence = torch.tensor([c for c, _ in rows], dtype=torch.float64)
    hit = torch.tensor([h for _, h in rows])
    for error in (calibration_error, adaptive_calibration_error):
        value = error(confidence, hit, bins=4)
        assert 0 <= value <= 1
        assert error(confidence.flip(0), hit.flip(0), bins=4).item() == pytest.approx(value.item())
    overall = (confidence.mean() - hit.double().mean()).abs().item()
    assert calibration_error(confidence, hit, bins=1).item() == pytest.approx(overall)
    assert adaptive_calibration_error(confidence, hit, bins=1).item() == pytest.approx(overall)


def test_a_group_of_ties_counts_as_one_in_the_adaptive_error():
    confidence = torch.full((8,), 0.5)
    hit = torch.arange(8) < 4
    assert adaptive_calibration_error(confidence, hit, bins=4) == 0


def test_calibrated_and_overconfident_answers():
    hit = torch.arange(10) < 7
    assert calibration_error(torch.full((10,), 0.7), hit).item() == pytest.approx(0, abs=1e-6)
    assert calibration_error(torch.ones(10), hit).item() == pytest.approx(0.3)


def test_gradients_equal_finite_differences_and_those_in_float64():
    confidence, hit = answers(4, samples=20)
    logits, labels = draws(5, samples=20, classes=3)
    probs = logits.softmax(-1)
    for f, x in (
        (lambda c: calibration_error(c, hit), confidence),
        (lambda c: adaptive_calibration_error(c, hit), confidence),
        (lambda z: classwise_calibration_error(z.softmax(-1), labels), logits),
        (lambda z: brier_score(z.softmax(-1), labels), logits),
        (lambda z: negative_log_likelihood(z, labels), logits),
    ):
        assert torch.autograd.gradcheck(f, x.clone().requires_grad_())
        exact = gradient(f, x.float().double())
        assert torch.allclose(gradient(f, x.float()).double(), exact, rtol=1e-4, atol=1e-7)
    assert gradient(lambda p: brier_score(p, labels), probs).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likelihood_of_hard_logits(dtype):
    logits = torch.tensor([[1e4, -1e4, 0], [0, 0, -math.inf], [3e38, 0, 0]], dtype=dtype)

    def nll(z):
        return negative_log_likelihood(z, torch.tensor([1, 0, 0]))

    value = nll(logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx((2e4 + math.log(2)) / 3, rel=5e-3)
    assert gradient(nll, logits).isfinite().all()
    masked = logits[1:2]
    assert negative_log_likelihood(masked, torch.tensor([2])) == math.inf
    slope = gradient(lambda z: negative_log_likelihood(z, torch.tensor([2])), masked)
    assert slope.isfinite().all()


def test_half_precision_is_answered_in_float32():
    logits, labels = draws(6)
    probs = logits.softmax(-1).bfloat16()
    confidence, hit = probs.amax(-1), probs.argmax(-1) == labels
    for value in (
        calibration_error(confidence, hit),
        adaptive_calibration_error(confidence, hit),
        reliability(confidence, hit).accuracy,
        classwise_calibration_error(probs, labels),
        brier_score(probs, labels),
    ):
        assert value.dtype == torch.float32
    assert torch.equal(brier_score(probs, labels), brier_score(probs.float(), labels))


@pytest.mark.parametrize("measure", BINNED)
def test_bad_confidences_are_refused(measure):
    hit = torch.tensor([True, False])
    for confidence, flags, match in (
        (torch.tensor([0.5, 1.5]), hit, "between 0.5 and 1.5"),
        (torch.tensor([-0.1, 0.5]), hit, "between -0.1 and 0.5"),
        (torch.tensor([math.nan, 0.5]), hit, "without NaN"),
        (torch.tensor([1, 0]), hit, "floating point"),
        (torch.tensor([0.5]), hit, "expected .n,."),
        (torch.full((2, 1), 0.5), hit[:, None], "expected .n,."),
        (torch.zeros(0), hit[:0], "at least one sample"),
        (torch.tensor([0.5, 0.5]), hit.long(), "expected bool"),
    ):
        with pytest.raises(InputError, match=match):
            measure(confidence, flags)
    for bins in (0, -1, 1.5, math.nan):
        with pytest.raises(OptionError, match="bins is"):
            measure(torch.tensor([0.5, 0.5]), hit, bins=bins)


def test_rounding_just_above_one_is_allowed():
    assert calibration_error(torch.tensor([1 + 1e-6]), torch.tensor([True])) < 1e-5


@pytest.mark.parametrize("measure", [brier_score, classwise_calibration_error])
def test_bad_probabilities_are_refused(measure):
    labels = torch.tensor([0, 1])
    for probs, match in (
        (torch.tensor([[2.0, -1.0], [0.5, 0.5]]), "Pass probabilities"),
        (torch.tensor([[0.5, 0.1], [0.5, 0.5]]), "misses a sum of 1 by 0.4"),
        (torch.tensor([[math.nan, 0.5], [0.5, 0.5]]), "without NaN"),
        (torch.tensor([0.5, 0.5]), "expected .n, classes."),
    ):
        with pytest.raises(InputError, match=match):
            measure(probs, labels)


@pytest.mark.parametrize(
    "measure", [brier_score, classwise_calibration_error, negative_log_likelihood]
)
def test_bad_labels_are_refused(measure):
    scores = torch.full((2, 2), 0.5)
    for labels, match in (
        (torch.tensor([0, 2]), "between 0 and 2; expected 0 to 1"),
        (torch.tensor([-1, 0]), "between -1 and 0"),
        (torch.tensor([0.0, 1.0]), "expected whole numbers"),
        (torch.tensor([True, False]), "expected whole numbers"),
        (torch.tensor([0]), "expected .n, classes."),
    ):
        with pytest.raises(InputError, match=match):
            measure(scores, labels)
    with pytest.raises(InputError, match="at least one sample"):
        measure(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("row", [[math.nan, 0], [math.inf, 0], [-math.inf, -math.inf]])
def test_logits_without_a_softmax_have_no_likelihood(row):
    logits = torch.tensor([[0.0, 1.0], row])
    with pytest.raises(InputError, match="1 of 2 rows of logits"):
        negative_log_likelihood(logits, torch.tensor([0, 1]))
