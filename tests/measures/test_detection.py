import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from reference import measures as reference
from reference import monitors
from testtime._core.errors import InputError
from testtime.measures.detection import aurc, auroc, average_precision, fpr_at_95_tpr

DETECTIONS = [auroc, fpr_at_95_tpr, average_precision]
few = st.integers(-3, 3).map(float)  # so few values that most of them tie
samples = st.tuples(st.lists(few, min_size=1, max_size=60), st.lists(few, min_size=1, max_size=60))


def as_tensors(positives, negatives, dtype=torch.float64):
    scores = torch.tensor(positives + negatives, dtype=dtype)
    return scores, torch.arange(len(scores)) < len(positives)


@settings(max_examples=60, deadline=None)
@given(samples)
def test_auroc_and_fpr_equal_their_definitions_with_ties(pair):
    scores, positive = as_tensors(*pair)
    a, b = scores.numpy(), positive.numpy()
    assert auroc(scores, positive).item() == pytest.approx(reference.auroc(a, b), abs=1e-12)
    expected = reference.fpr_at_95_tpr(a, b)
    assert fpr_at_95_tpr(scores, positive).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("distinct", [3, 10, 10**6])
def test_all_equal_scikit_learn(distinct):
    draw = torch.Generator().manual_seed(distinct)
    positive = torch.rand(500, generator=draw) < 0.2
    noise = torch.randn(500, generator=draw, dtype=torch.float64)
    scores = ((noise + positive) * distinct / 10).round()
    a, b = scores.numpy(), positive.numpy()
    assert auroc(scores, positive).item() == pytest.approx(metrics.roc_auc_score(b, a))
    expected = metrics.average_precision_score(b, a)
    assert average_precision(scores, positive).item() == pytest.approx(expected)
    false, true, _ = metrics.roc_curve(b, a, drop_intermediate=False)
    assert fpr_at_95_tpr(scores, positive).item() == pytest.approx(false[true >= 0.95][0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16])
def test_scores_of_any_type_are_ranked(dtype):
    scores, positive = (
        torch.tensor([0, 3, 1, 2, 2]),
        torch.tensor([False, True, False, True, False]),
    )
    for measure in (*DETECTIONS, aurc):
        torch.testing.assert_close(measure(scores.to(dtype), positive), measure(scores, positive))


@settings(max_examples=40, deadline=None)
@given(samples, st.randoms(use_true_random=False))
def test_order_and_monotone_maps_change_nothing(pair, chance):
    scores, positive = as_tensors(*pair)
    order = list(range(len(scores)))
    chance.shuffle(order)
    for measure in DETECTIONS:
        value = measure(scores, positive)
        assert torch.equal(measure(scores[order], positive[order]), value)
        assert torch.equal(measure(scores.exp(), positive), value)
    mirrored = auroc(-scores, positive)
    assert auroc(scores, positive).item() == pytest.approx(1 - mirrored.item())


def test_perfect_useless_and_reversed_scores():
    scores, positive = as_tensors([3.0, 2.0], [1.0, 0.0])
    assert [measure(scores, positive).item() for measure in DETECTIONS] == [1, 0, 1]
    assert [measure(-scores, positive).item() for measure in DETECTIONS[:2]] == [0, 1]
    same = torch.zeros(4)
    assert [measure(same, positive).item() for measure in DETECTIONS] == [0.5, 1, 0.5]


def test_exactly_19_of_20_positives_are_95_percent():
    scores, positive = as_tensors([1.0] * 19 + [-1.0], [0.0] * 10)
    assert fpr_at_95_tpr(scores, positive) == 0
    scores, positive = as_tensors([1.0] * 18 + [-1.0] * 2, [0.0] * 10)
    assert fpr_at_95_tpr(scores, positive) == 1


def test_auroc_of_many_pairs_keeps_the_digits_of_float64():
    scores = torch.arange(20_001, dtype=torch.float64)
    positive = torch.arange(20_001) % 3 == 0  # positive 3k beats 2k negatives
    expected = sum(2 * k for k in range(6667)) / (6667 * 13334)
    assert auroc(scores, positive).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("measure", DETECTIONS)
def test_types_and_infinities(measure):
    scores, positive = as_tensors([math.inf, 1.0], [1.0, -math.inf])
    value = measure(scores, positive)
    assert value.dtype == torch.float64
    assert value.isfinite()
    assert measure(scores.bfloat16(), positive).dtype == torch.float32
    assert measure(torch.tensor([2, 1, 1, 0]), positive) == value.float()
    assert measure(torch.tensor([2.0, 1, 1, 0]).requires_grad_(), positive) == value.float()


@pytest.mark.parametrize("measure", DETECTIONS)
def test_bad_calls_are_refused(measure):
    flags = torch.tensor([True, False])
    for scores, positive, match in (
        (torch.zeros(2, 1), flags, "expected .n,."),
        (torch.zeros(3), flags, "expected .n,."),
        (torch.zeros(2), flags.long(), "expected bool"),
        (torch.tensor([0.0, math.nan]), flags, "1 of 2 scores are NaN"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bool), "0 of 2 samples are positive"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), "0 of 0 samples are positive"),
    ):
        with pytest.raises(InputError, match=match):
            measure(scores, positive)


def test_only_positives_leave_precision_defined_and_nothing_else():
    flags = torch.ones(2, dtype=torch.bool)
    assert average_precision(torch.zeros(2), flags) == 1
    for measure in (auroc, fpr_at_95_tpr):
        with pytest.raises(InputError, match="2 of 2 samples are positive"):
            measure(torch.zeros(2), flags)


@settings(max_examples=30, deadline=None)
@given(
    scores=st.lists(st.integers(0, 6), min_size=2, max_size=30), seed=st.integers(0, 10**6)
)  # fmt: skip
def test_aurc_is_the_area_below_the_risks_of_all_thresholds(scores, seed):
    wrong = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)) < 0.4
    wrong[0] = True
    values = torch.tensor(scores).double() / 2
    expected = monitors.aurc(values.numpy(), wrong.numpy())
    assert aurc(values, wrong).item() == pytest.approx(expected, abs=1e-12)
    assert aurc(torch.tensor(scores), wrong).item() == pytest.approx(expected, abs=1e-6)


def test_aurc_needs_a_wrong_answer_and_prefers_the_better_order():
    wrong = torch.tensor([False, False, True, True])
    assert aurc(torch.arange(4.0), wrong) < aurc(-torch.arange(4.0), wrong)
    with pytest.raises(InputError, match="positive"):
        aurc(torch.arange(4.0), torch.zeros(4).bool())
