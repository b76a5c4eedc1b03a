"""Scores, calibrators, rejectors and faults: what they cannot read is an error with a reason, or has a stated value."""

import math

import pytest
import torch
from torch import nn

from testtime._core.errors import InputError, OptionError
from testtime.guard.betting import Grapa, Mixture, OnlineNewton, Starting
from testtime.guard.collapse import Collapse
from testtime.guard.correctness import CorrectnessCalibrator, consistency_features
from testtime.guard.faults import BitFlips, Drift, Scaling, StuckAt
from testtime.guard.feature_shift import SeriesShift, feature_shift
from testtime.guard.independence import Independence
from testtime.guard.misclassification import (
    MisclassificationNetwork,
    doctor,
    odin,
    perturbed_score,
)
from testtime.guard.monitor import Monitor
from testtime.guard.rejection import Rejector, best_score, rejection_loss
from testtime.guard.relative_uncertainty import RelativeUncertainty
from testtime.guard.risk import Risk
from testtime.guard.shift_statistics import DeepScore, GaussianScore, KnnKS, ModelKS
from testtime.guard.two_sample import TwoSample

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
GOOD = LABELS > 0
REJECTOR = Rejector.fit(X, GOOD, cost=0.2, alpha=2.0, steps=3)
FAULTS = [
    BitFlips(rate=1.0), BitFlips(rate=1.0, memory="int8"), StuckAt(bit=1, rate=1.0), Scaling(rate=1.0),
    Drift(additive=0.1),
]  # fmt: skip


@pytest.mark.parametrize("score", [odin, doctor])
def test_a_prediction_of_no_class_has_no_score(score):
    with pytest.raises(InputError, match="at least one class"):
        score(X[:, :0])


@pytest.mark.parametrize("huge", [1e39, 1e300])
def test_logits_beyond_the_precision_of_a_network_are_refused(huge):
    network = MisclassificationNetwork.fit(X, LABELS, epochs=1)
    with pytest.raises(InputError, match=r"beyond torch\.float32"):
        network.score(huge * X.double())
    assert bool(network.score(1e30 * X.double()).isfinite().all())


@pytest.mark.parametrize("x", [X.long(), X > 0, X.tolist(), None])
def test_a_step_of_what_is_not_in_floating_point_is_refused(x):
    scores = RelativeUncertainty.fit(X, LABELS)
    for call in (
        lambda: perturbed_score(nn.Identity(), x, doctor, epsilon=0.1),
        lambda: scores.score_perturbed(nn.Identity(), x, epsilon=0.1),
    ):
        with pytest.raises(InputError, match="expected"):
            call()


def test_a_calibrator_refuses_nan_and_lets_masked_classes_be():
    views = X.expand(3, -1, -1)
    calibrator = CorrectnessCalibrator.fit(X, views, LABELS)
    logits = X.clone()
    logits[2, 1] = math.nan
    for call in (calibrator.calibrate, calibrator.temperature, consistency_features):
        with pytest.raises(InputError, match="NaN"):
            call(logits, views)
    logits[2, 1] = -math.inf
    found = calibrator.calibrate(logits, views)
    assert found[2, 1] == -math.inf
    assert bool(found[:, 0].isfinite().all())


def test_a_sample_that_is_nan_is_not_accepted_and_no_other_minds():
    x = X.clone()
    x[1, 0] = math.nan
    assert REJECTOR.score(x).isnan().tolist() == [False, True, False, False, False, False]
    assert not bool(REJECTOR.accepts(x)[1])
    assert torch.equal(REJECTOR.score(x)[2:], REJECTOR.score(X)[2:])


@pytest.mark.parametrize(
    "x", [X[:, :2], X[:, 0], X[None], X[:, :0], X.to(torch.complex64), torch.tensor(1.0)]
)
def test_a_rejector_says_of_which_size_its_inputs_are(x):
    with pytest.raises(InputError, match="expected"):
        REJECTOR.score(x)


def test_a_rejector_is_asked_nothing():
    assert REJECTOR.accepts(X[:0]).shape == (0,)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("values", [LABELS, GOOD, X.to(torch.complex64), X.tolist(), None])
def test_only_floating_point_numbers_are_faulty(fault, values):
    with pytest.raises(InputError, match="expected"):
        fault(values, torch.Generator())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_needs_chance_of_its_own(fault):
    with pytest.raises(InputError, match="generator is None"):
        fault(X, None)


@pytest.mark.parametrize("bad", [0, -1, 2.5, math.nan, None, "1"])
@pytest.mark.parametrize(
    ("statistic", "option"),
    [
        (GaussianScore, "samples"), (DeepScore, "samples"), (DeepScore, "layers"), (DeepScore, "bins"),
        (ModelKS, "samples"), (ModelKS, "draws"), (KnnKS, "samples"), (KnnKS, "neighbours"),
    ],
)  # fmt: skip
def test_a_statistic_of_nothing_is_refused(statistic, option, bad):
    """Of no samples it was NaN, and no shift was ever detected."""
    with pytest.raises(OptionError, match=option):
        statistic(**{option: bad})


def test_a_statistic_that_is_nan_detects_nothing_and_says_so():
    with pytest.raises(InputError, match="the statistic is"):
        feature_shift(X, X, statistic=lambda x, y, _: x.mean(-2) * math.nan, bootstrap=5)


@pytest.mark.parametrize("alpha", [101.0, 200.0, 1e300, math.nan])
def test_a_surrogate_that_is_too_steep_for_its_precision_is_refused(alpha):
    """From 200 on it was NaN where a score is 0."""
    for call in (
        lambda: rejection_loss(X[:, 0], GOOD, cost=0.2, alpha=alpha),
        lambda: best_score(torch.tensor([0.5]), cost=0.2, alpha=alpha),
        lambda: Rejector.fit(X, GOOD, cost=0.2, alpha=alpha),
    ):
        with pytest.raises(OptionError, match="alpha"):
            call()
    scores = torch.tensor([0.0, 1.0, -1.0, 0.1, -0.1, 0.0])
    assert rejection_loss(scores, GOOD, cost=1e-6, alpha=100.0).isfinite()


@pytest.mark.parametrize(
    ("detector", "given", "reads"),
    [
        (Independence(gamma_x=1.0, gamma_y=1.0), 1, "x, y"), (TwoSample(gamma=1.0), 1, "reference, new"),
        (Collapse(classes=3), 3, "adapted, source"), (Risk(bound=0.5), 0, "scores"),
    ],
)  # fmt: skip
def test_a_monitor_says_which_tensors_it_reads(detector, given, reads):
    monitor = Monitor(detector)
    before = monitor.state_dict()
    with pytest.raises(InputError, match=rf"given {given} tensors; expected {reads}\. A gate"):
        monitor.update(*[X] * given)
    after = monitor.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_series_of_one_feature_may_come_without_its_dimension():
    detector = SeriesShift.fit(torch.arange(20.0)[:, None] % 4, window=4, bootstrap=5)
    flat, column = Monitor(detector), Monitor(detector)
    for part in (X[:, 0], X[:, 1]):
        one, other = flat.update(part), column.update(part[:, None])
        assert torch.equal(one.statistic, other.statistic)
    with pytest.raises(InputError, match="expected"):
        Monitor(SeriesShift.fit(X, window=2, bootstrap=5)).update(X[:, 0])


@pytest.mark.parametrize("bad", ["1", None, (), [1], math.nan, 1.0, (0.5, "x")])
def test_fractions_are_numbers(bad):
    for call in (
        lambda: OnlineNewton(limit=bad), lambda: Grapa(limit=bad), lambda: Mixture(fractions=bad),
        lambda: Starting(fractions=bad),
    ):  # fmt: skip
        with pytest.raises(OptionError, match="between 0 and 1"):
            call()


@pytest.mark.parametrize("bad", ["1", None, math.nan, 0, 2])
def test_options_of_another_type_are_named(bad):
    with pytest.raises(OptionError, match="alpha"):
        Risk.fit(torch.zeros(50), alpha=bad)
    if bad != 2:
        with pytest.raises(OptionError, match="top"):
            consistency_features(X, X[None], top=bad)
