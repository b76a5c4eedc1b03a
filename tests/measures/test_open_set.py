import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import measures as reference
from testtime._core.errors import InputError
from testtime.measures.detection import auroc
from testtime.measures.open_set import h_score, oscr

BOTH = [oscr, h_score]
few = st.integers(-3, 3).map(float)  # so few values that most of them tie
known = st.lists(st.tuples(few, st.booleans()), min_size=1, max_size=50)
strange = st.lists(st.tuples(few, st.booleans()), min_size=1, max_size=50)


def as_tensors(known, strange, dtype=torch.float64):
    scores, hit = zip(*known, *strange, strict=True)
    unknown = torch.arange(len(scores)) >= len(known)
    return torch.tensor(scores, dtype=dtype), torch.tensor(hit), unknown


@settings(max_examples=80, deadline=None)
@given(known, strange)
def test_both_equal_their_definitions_with_ties(known, strange):
    given = as_tensors(known, strange)
    arrays = [tensor.numpy() for tensor in given]
    assert oscr(*given).item() == pytest.approx(reference.oscr(*arrays), abs=1e-12)
    assert h_score(*given).item() == pytest.approx(reference.h_score(*arrays), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(known, strange, st.randoms(use_true_random=False))
def test_bounds_order_and_what_is_not_read(known, strange, chance):
    scores, hit, unknown = as_tensors(known, strange)
    accuracy = hit[~unknown].double().mean()
    order = list(range(len(scores)))
    chance.shuffle(order)
    for measure in BOTH:
        value = measure(scores, hit, unknown)
        assert 0 <= value <= 1
        torch.testing.assert_close(measure(scores[order], hit[order], unknown[order]), value)
        assert torch.equal(measure(scores, hit ^ unknown, unknown), value)  # hit of unknown ones
    assert oscr(scores, hit, unknown) <= accuracy + 1e-12
    torch.testing.assert_close(
        oscr(scores, torch.ones_like(hit), unknown), auroc(scores, unknown).double()
    )


def test_perfect_and_reversed_scores():
    hit = torch.tensor([True, True, True, False, False, False])
    unknown = torch.tensor([False] * 4 + [True] * 2)
    scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.8, 0.9], dtype=torch.float64)
    assert oscr(scores, hit, unknown) == 0.75
    assert h_score(scores, hit, unknown) == pytest.approx(2 * 0.75 / 1.75)
    assert oscr(-scores, hit, unknown) == 0
    assert h_score(-scores, hit, unknown) == 0


@pytest.mark.parametrize("measure", BOTH)
def test_without_unknown_samples_both_are_the_accuracy(measure):
    hit = torch.tensor([True, False, True, True])
    none = torch.zeros(4, dtype=torch.bool)
    assert measure(torch.tensor([1.0, 2.0, 3.0, 3.0]), hit, none) == 0.75
    assert measure(torch.zeros(4), ~hit & hit, none) == 0


@pytest.mark.parametrize("measure", BOTH)
def test_types_and_infinities(measure):
    scores = torch.tensor([math.inf, 0.5, 0.5, -math.inf], dtype=torch.float64)
    hit, unknown = torch.tensor([True, True, False, True]), torch.tensor([True, False, True, False])
    value = measure(scores, hit, unknown)
    assert value.dtype == torch.float64
    assert measure(scores.half(), hit, unknown).dtype == torch.float32
    assert measure(torch.tensor([3, 2, 2, 0]), hit, unknown) == value.float()


@pytest.mark.parametrize("measure", BOTH)
def test_bad_calls_are_refused(measure):
    flags = torch.tensor([True, False])
    for scores, hit, unknown, match in (
        (torch.zeros(2, 1), flags, flags, "expected .n,."),
        (torch.zeros(2), flags[:1], flags, "expected .n,."),
        (torch.zeros(2), flags.long(), flags, "hit is torch.int64; expected bool"),
        (torch.zeros(2), flags, flags.float(), "unknown is torch.float32; expected bool"),
        (torch.tensor([0.0, math.nan]), flags, flags, "1 of 2 scores are NaN"),
        (torch.zeros(2), flags, torch.ones(2, dtype=torch.bool), "none of 2 samples"),
        (torch.zeros(0), flags[:0], flags[:0], "none of 0 samples"),
    ):
        with pytest.raises(InputError, match=match):
            measure(scores, hit, unknown)
