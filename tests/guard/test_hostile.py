"""What cannot be used is refused by name, and nothing that can be used gives NaN."""

import math

import pytest
import torch
from torch import nn

from testtime._core.errors import InputError
from testtime.adaptation.never_worse import NeverWorse
from testtime.guard.correctness import (
    balanced_correctness_loss,
    consistency_features,
    correctness_loss,
)
from testtime.guard.densities import Gaussian
from testtime.guard.feature_shift import feature_shift
from testtime.guard.fingerprint import Fingerprint
from testtime.guard.predictive_uncertainty import predictive_uncertainty
from testtime.guard.rejection import Rejector, best_score, rejection_cost, rejection_loss
from testtime.guard.scaling import VectorScaling
from testtime.guard.shift_statistics import KnnKS, ks_distance
from testtime.guard.tarp import uniform_p_value

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
GOOD = LABELS > 1
NAN = X.index_fill(0, torch.tensor(1), math.nan)
UNUSABLE = {"empty": X[:0], "flat": X[0], "complex": X.to(torch.complex64), "NaN": NAN}


@pytest.mark.parametrize("name", UNUSABLE)
def test_logits_that_no_loss_can_read_are_refused(name):
    for loss in (correctness_loss, balanced_correctness_loss):
        with pytest.raises(InputError):
            loss(UNUSABLE[name], LABELS)


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_score(torch.tensor([0.5, math.nan]), cost=0.2, alpha=4.0),
        lambda: best_score(torch.tensor([1.5]), cost=0.2, alpha=4.0),
        lambda: rejection_loss(NAN[:, 0], GOOD, cost=0.2),
        lambda: rejection_loss(X[:0, 0], GOOD[:0], cost=0.2),
        lambda: rejection_loss(LABELS, GOOD, cost=0.2),
        lambda: rejection_cost(X[:, 0], GOOD, cost=0.2),
        lambda: rejection_cost(GOOD[:3], GOOD, cost=0.2),
        lambda: rejection_cost(GOOD[:0], GOOD[:0], cost=0.2),
        lambda: consistency_features(X, LABELS.expand(2, 4, 6).mT),
        lambda: predictive_uncertainty(torch.full((2, 3), math.inf)),
        lambda: predictive_uncertainty(torch.full((2, 3), -math.inf)),
        lambda: uniform_p_value(X[:0, 0]),
        lambda: uniform_p_value(NAN[:, 0]),
        lambda: uniform_p_value(torch.tensor([0.5, 2.0])),
        lambda: ks_distance(X[:0], X),
        lambda: ks_distance(X[0], X),
        lambda: ks_distance(NAN, X),
        lambda: Gaussian.fit(X[:1]),
        lambda: Gaussian.fit(NAN),
        lambda: Gaussian.fit(X * 1e38),
        lambda: feature_shift(X.double() * 1e300, X.double() * 1e300),
        lambda: VectorScaling.fit(X.double() * 1e300, LABELS),
    ],
)
def test_what_cannot_be_judged_is_refused(call):
    with pytest.raises(InputError):
        call()


def test_a_guard_refuses_answers_that_it_cannot_compare_and_remembers_nothing_of_them():
    guard = NeverWorse(block=2)
    guard.update(X, X)
    before = str(guard.state_dict())
    for ours, theirs in ((X[:3], X), (X[:, :3], X), (X[0], X[0]), (X[:0], X[:0]), (X > 0, X > 0)):
        with pytest.raises(InputError, match="of the same shape"):
            guard.update(ours, theirs)
    assert str(guard.state_dict()) == before


def test_fewer_samples_than_features_and_constant_ones_are_no_error():
    few = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert bool(feature_shift(few, few).statistic.isfinite().all())
    assert bool(feature_shift(torch.ones(9, 3), torch.ones(9, 3)).statistic.isfinite().all())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kind):
    half = X.to(kind)
    assert correctness_loss(half, LABELS).dtype == torch.float32
    assert torch.equal(correctness_loss(half, LABELS), correctness_loss(half.float(), LABELS))
    assert rejection_loss((1e4 * half[:, 0]).to(kind), GOOD, cost=0.2).isfinite()


def test_huge_scores_cost_much_and_are_never_nan():
    assert rejection_loss(torch.tensor([-3e38, 3e38]), GOOD[1:3], cost=0.2) > 1e30


def test_a_feature_that_never_varies_is_not_the_one_that_shifted():
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 80, 3, generator=chance)
    x[:, 2] = y[:, 2] = 1
    y[:, 0] += 4
    found = feature_shift(x, y, statistic=KnnKS(samples=10, neighbours=20), bootstrap=20)
    assert found.features == (0,)
    assert found.excess[2] == 0


def test_features_too_large_to_train_on_are_refused():
    with pytest.raises(InputError, match="training left the numbers"):
        Fingerprint.fit(nn.Linear(3, 2), [1e30 * torch.rand(40, 3) + 1e30], epochs=2)


def test_a_rejector_may_read_one_number_of_each_sample():
    x = torch.linspace(-1, 1, 200)
    kind = {"cost": 0.2, "alpha": 2.0, "steps": 3}
    flat, column = (Rejector.fit(each, x > 0, **kind) for each in (x, x[:, None]))
    assert torch.equal(flat.score(x), column.score(x[:, None]))
