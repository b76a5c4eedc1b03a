"""What cannot be used is refused by name, and nothing that can be used gives NaN."""

import math

import pytest
import torch
from torch import nn

from testtime._core.errors import InputError, StateError
from testtime.adaptation.never_worse import NeverWorse
from testtime.guard.betting import Mixture
from testtime.guard.collapse import Collapse
from testtime.guard.correctness import (
    CorrectnessCalibrator,
    balanced_correctness_loss,
    consistency_features,
    correctness_loss,
)
from testtime.guard.densities import DeepDensity, Gaussian
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.faults import BitFlips, Drift, Scaling, faulty_activations
from testtime.guard.feature_shift import SeriesShift, feature_shift
from testtime.guard.fingerprint import FaultMonitor, Fingerprint
from testtime.guard.independence import Independence
from testtime.guard.misclassification import MisclassificationNetwork
from testtime.guard.monitor import Monitor
from testtime.guard.predictive_uncertainty import predictive_uncertainty
from testtime.guard.rejection import Rejector, best_score, rejection_cost, rejection_loss
from testtime.guard.risk import Risk
from testtime.guard.scaling import TemperatureScaling, VectorScaling
from testtime.guard.shift_statistics import KnnKS, ks_distance
from testtime.guard.tarp import tarp, uniform_p_value

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
        lambda: consistency_features(X.tolist(), X[None]),
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
        lambda: tarp(X[None], X, references=X[:, :3]),
        lambda: tarp(X[None].double(), 1.7e308 * X.double().sign()),
        lambda: tarp(X[None].double(), X.double(), references=1e200 * X.double()),
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


def test_copies_of_a_feature_that_its_precision_cannot_part_are_named():
    density = Gaussian.fit(1e6 * X[:, :1].expand(6, 3))
    with pytest.raises(InputError, match="singular in their precision"):
        density.sample(3, torch.Generator())


def test_features_too_large_to_train_on_are_refused():
    with pytest.raises(InputError, match="training left the numbers"):
        Fingerprint.fit(nn.Linear(3, 2), [1e30 * torch.rand(40, 3) + 1e30], epochs=2)


def test_a_rejector_may_read_one_number_of_each_sample():
    x = torch.linspace(-1, 1, 200)
    kind = {"cost": 0.2, "alpha": 2.0, "steps": 3}
    flat, column = (Rejector.fit(each, x > 0, **kind) for each in (x, x[:, None]))
    assert torch.equal(flat.score(x), column.score(x[:, None]))


MONITORS = {
    "Exchangeability": (Exchangeability.fit(X), 1),
    "Risk": (Risk(bound=0.5), 1),
    "Independence": (Independence(gamma_x=1.0, gamma_y=1.0), 2),
    "Collapse": (Collapse(classes=4), 2),
    "FaultMonitor": (FaultMonitor(low=0.0, high=1.0), 1),
}


@pytest.mark.parametrize("bad", [[[0.5]], X.numpy(), None, X.to(torch.complex64)])
@pytest.mark.parametrize("name", MONITORS)
def test_what_is_no_tensor_of_real_numbers_is_refused_by_monitors(name, bad):
    detector, count = MONITORS[name]
    with pytest.raises(InputError, match="expected a tensor of real numbers"):
        Monitor(detector).update(*[bad] * count)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("log_peak", 1.0), ("log_peak", torch.tensor(math.nan, dtype=torch.float64)),
        ("log_peak", torch.tensor(0.0, dtype=torch.float64, device="meta")),
        ("gamblers", torch.full((5,), math.inf, dtype=torch.float64)), ("time", torch.tensor(-9)),
    ],
)  # fmt: skip
def test_a_state_that_could_never_alarm_is_refused(name, bad):
    monitor = Monitor(Risk(bound=0.5))
    with pytest.raises(StateError, match=name):
        monitor.load_state_dict(monitor.state_dict() | {name: bad})
    assert monitor.update(torch.ones(100))


def test_a_gate_of_several_signals_is_told_that_it_is_shown_one():
    with pytest.raises(InputError, match="A gate is shown one, entropies"):
        Monitor(Exchangeability.fit(X)).update(X[:, 0])


def test_a_state_of_a_detector_of_other_options_is_refused():
    wide, narrow = (Monitor(SeriesShift.fit(each, window=2, bootstrap=3)) for each in (X, X[:, :3]))
    wide.update(X)
    with pytest.raises(StateError, match=r"latest is \(2, 4\)"):
        narrow.load_state_dict(wide.state_dict())
    long, short = (Monitor(Collapse(classes=4, block=block)) for block in (64, 5))
    long.update(X, X)
    short.load_state_dict(long.state_dict())
    with pytest.raises(StateError, match="6 samples of a block, and block is 5"):
        short.update(X, X)  # it went on for ever
    short.reset()
    short.update(X, X)


def test_a_state_that_was_given_or_taken_is_a_copy():
    monitor = Monitor(Risk(bound=0.5))
    taken = monitor.state_dict()
    monitor.load_state_dict(taken)
    for state in (taken, monitor.state_dict()):
        state["log_peak"].fill_(100.0)
    assert not monitor.update(torch.zeros(3))


def test_an_alarm_is_raised_where_wealth_is_just_enough():
    assert Monitor(Risk(bound=1 / 3, alpha=0.5, bets=Mixture(fractions=(0.5,)))).update(
        torch.ones(1)
    )


def test_a_state_with_a_larger_memory_shrinks_to_the_own():
    points, few = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(0))
    large, small = (Monitor(Independence(gamma_x=1.0, gamma_y=1.0, memory=m)) for m in (30, 4))
    large.update(points, few)
    small.load_state_dict(large.state_dict())
    small.update(points[:2], few[:2])
    assert len(small.state_dict()["x"]) == 4
    assert small.state_dict()["trace"] == pytest.approx(_trace(small.state_dict()))


def _trace(state):
    k, l = ((-((each - each.mT) ** 2)).exp() for each in (state["x"], state["y"]))
    return float((k * l).sum())


def test_distances_that_overflow_are_named():
    huge = 1e200 * X.double()
    with pytest.raises(InputError, match="x overflow"):
        Independence.fit(huge, X)


def test_an_exact_sampler_of_whole_numbers_passes():
    chance = torch.Generator().manual_seed(0)
    draws = torch.randint(4, (51, 300, 1), generator=chance)
    assert tarp(draws[1:], draws[0]).p_value > 0.01
    assert tarp(draws[1:] // 2, draws[0]).p_value < 1e-6


def test_calibration_in_half_precision_changes_no_answer():
    chance = torch.Generator().manual_seed(0)
    logits, views = torch.randn(5000, 10, generator=chance).bfloat16(), X.new_zeros(1, 5000, 10)
    calibrator = CorrectnessCalibrator.fit(logits, views, torch.arange(5000) % 10, lr=0.1)
    scaling = TemperatureScaling(temperature=1.3)
    for told in (scaling.calibrate(logits), calibrator.calibrate(logits, views)):
        assert torch.equal(told.argmax(1), logits.argmax(1))


def test_a_rejector_learns_from_half_precision():
    x = torch.linspace(-1, 1, 200).half()[:, None]
    rejector = Rejector.fit(x, x[:, 0] > 0, cost=0.2, alpha=2.0, steps=200)
    assert rejector.accepts(x[[0, -1]]).tolist() == [False, True]


def test_activations_in_tuples_and_empty_weights_may_be_faulty(recwarn):
    model = nn.LSTM(3, 4)
    with torch.no_grad(), faulty_activations(model, Scaling(rate=1.0)):
        spoilt, (hidden, _) = model(X[:, :3])
    output, (plain, _) = model(X[:, :3])
    torch.testing.assert_close((spoilt, hidden), (-output, -plain))
    for fault in (BitFlips(rate=0.5), Drift(additive=1)):
        assert fault(X[:0], torch.Generator()).shape == (0, 4)
    assert not recwarn.list


VIEWS = torch.stack([X, -X])
MODEL = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
TOLD = {
    "fingerprint": lambda: Fingerprint.fit(MODEL, [X], epochs=2).read(MODEL, X).fingerprint,
    "calibrator": lambda: CorrectnessCalibrator.fit(X, VIEWS, LABELS).calibrate(X, VIEWS),
    "network": lambda: MisclassificationNetwork.fit(X, LABELS, epochs=2).score(X),
    "rejector": lambda: Rejector.fit(X, GOOD, cost=0.2, steps=2).score(X),
    "flips": lambda: BitFlips(rate=0.01)(torch.ones(9999, dtype=torch.float32), seeded()),
    "drift": lambda: Drift(additive=1, multiplicative=1)(X, seeded()),
    "shift": lambda: feature_shift(X, X + 1, bootstrap=9).p_value,
    "density": lambda: DeepDensity.fit(X.double()).log_prob(X.double()),
}


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TOLD)
def test_a_default_type_changes_no_number(name, kind):
    expected = TOLD[name]()
    torch.set_default_dtype(kind)
    try:
        found = TOLD[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
