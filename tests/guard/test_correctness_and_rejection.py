"""Temperature, vector and correctness-aware calibration; the learned rejector."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from torch import nn
from torch.nn import functional as F

from testtime._core.errors import InputError, OptionError
from testtime.guard.correctness import (
    CorrectnessCalibrator,
    balanced_correctness_loss,
    consistency_features,
    correctness_loss,
    view_logits,
)
from testtime.guard.misclassification import MisclassificationNetwork
from testtime.guard.rejection import (
    Rejector,
    best_score,
    calibrated_beta,
    rejection_cost,
    rejection_loss,
)
from testtime.guard.relative_uncertainty import RelativeUncertainty
from testtime.guard.scaling import TemperatureScaling, VectorScaling


def draw(seed, *shape, scale=2.0):
    chance = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=chance, dtype=torch.float64)


LOGITS, LABELS = draw(0, 200, 4), torch.cat([draw(0, 200, 4).argmax(1)[:120], torch.arange(80) % 4])


def test_temperature_and_vector_scaling_minimise_the_likelihood():
    def nll(z):
        return float(F.cross_entropy(z, LABELS))

    best = minimize_scalar(lambda t: nll(LOGITS / t), bounds=(0.05, 50), method="bounded").x
    found = TemperatureScaling.fit(LOGITS, LABELS)
    assert found.temperature == pytest.approx(best, rel=1e-3)
    assert torch.equal(found.calibrate(LOGITS).argmax(1), LOGITS.argmax(1))
    vector = VectorScaling.fit(LOGITS, LABELS)
    other = minimize(lambda v: nll(torch.tensor(v[:4]) * LOGITS + torch.tensor(v[4:])),
                     [1.0] * 4 + [0.0] * 4, method="BFGS")  # fmt: skip
    assert nll(vector.calibrate(LOGITS)) == pytest.approx(other.fun, abs=1e-6)
    sure = TemperatureScaling.fit(LOGITS, LOGITS.argmax(1)).temperature
    assert 1e-3 <= sure < 0.1  # nothing is wrong: as sure as may be, and finite
    with pytest.raises(InputError):
        TemperatureScaling.fit(LOGITS, LABELS[:-1])


def test_cross_entropy_makes_a_narrowly_wrong_sample_surer_and_this_loss_does_not():
    logits = torch.tensor([[2.0, 1.9, 0.0, 0.0, 0.0, -1.0]], dtype=torch.float64)
    t, label = torch.ones((), dtype=torch.float64, requires_grad=True), torch.tensor([1])
    slopes = [
        float(torch.autograd.grad(loss(logits / t, label), t)[0])
        for loss in (F.cross_entropy, correctness_loss)
    ]
    assert slopes == pytest.approx([0.346, -0.160], abs=5e-4)


def test_the_losses_and_features_are_those_of_loops():
    probs, right = LOGITS.softmax(1), LOGITS.argmax(1) == LABELS
    accuracy = float(right.double().mean())
    plain = [(float(p.max()) - float(r)) ** 2 for p, r in zip(probs, right, strict=True)]
    weights = [1 - accuracy if r else accuracy for r in right]
    assert float(correctness_loss(LOGITS, LABELS)) == pytest.approx(sum(plain) / 200)
    weighted = sum(w * x for w, x in zip(weights, plain, strict=True)) / 200
    assert float(balanced_correctness_loss(LOGITS, LABELS)) == pytest.approx(weighted)
    views = draw(1, 3, 200, 4)
    features = consistency_features(LOGITS, views, top=3)
    for i in (0, 17):
        order = LOGITS[i].argsort(descending=True)[:3]
        expected = torch.cat([views[v, i].softmax(0)[order] for v in range(3)])
        torch.testing.assert_close(features[i], expected)
    assert consistency_features(LOGITS, views, top=9).shape == (200, 12)


def test_the_calibrator_keeps_answers_repeats_and_learns():
    chance = torch.Generator().manual_seed(0)
    right = torch.rand(600, generator=chance) < 0.6
    labels = torch.randint(5, (600,), generator=chance)
    answers = torch.where(right, labels, (labels + 1) % 5)
    logits = 3 * F.one_hot(answers, 5).float() + torch.randn(600, 5, generator=chance) / 2
    answers = logits.argmax(1)
    views = logits.expand(3, -1, -1) - 4 * (answers != labels)[:, None] * F.one_hot(answers, 5)
    args = {"lr": 1e-2, "epochs": 60, "batch_size": 200}
    before = torch.random.get_rng_state()
    one, again = (CorrectnessCalibrator.fit(logits, views, labels, **args) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    calibrated = one.calibrate(logits, views)
    assert torch.equal(calibrated, again.calibrate(logits, views))
    assert torch.equal(calibrated.argmax(1), answers)
    assert bool((one.temperature(logits, views) > 0.1).all())
    loss = float(correctness_loss(calibrated, labels))
    assert loss < 0.5 * float(correctness_loss(logits, labels))
    for bad in (views[:, :5], views[0], views * math.nan):
        with pytest.raises(InputError):
            one.calibrate(logits, bad)
    start = CorrectnessCalibrator.fit(logits, views, labels, lr=0.0, epochs=1)
    assert bool((start.temperature(logits, views) - 1).abs().max() < 0.8)


def test_views_leave_model_and_chance_alone_and_repeat():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).train(), torch.rand(5, 4)
    transforms = [lambda x: x + torch.randn_like(x), torch.neg]
    before = torch.random.get_rng_state()
    one, again = (view_logits(model, x, transforms) for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(before, torch.random.get_rng_state())
    assert model[1].training
    assert torch.equal(one[1], model.eval()(-x))
    with pytest.raises(InputError, match="transforms"):
        view_logits(model, x, [])


@settings(max_examples=40, deadline=None)
@given(eta=st.floats(0.02, 0.98), cost=st.floats(0.05, 0.95), alpha=st.floats(0.5, 5))
def test_the_best_score_minimises_the_surrogate_and_follows_bayes(eta, cost, alpha):
    def risk(r):
        scores = torch.tensor([r, r], dtype=torch.float64)
        good, bad = (
            float(rejection_loss(scores[:1], torch.tensor([flag]), cost=cost, alpha=alpha))
            for flag in (True, False)
        )
        return eta * good + (1 - eta) * bad

    best = float(best_score(torch.tensor(eta, dtype=torch.float64), cost=cost, alpha=alpha))
    found = minimize_scalar(risk, bracket=(best - 0.5, best + 0.5), tol=1e-12)
    assert found.x == pytest.approx(best, abs=1e-6)
    if abs(eta - (1 - cost)) > 1e-6:
        assert (best > 0) == (eta > 1 - cost)


def test_the_surrogate_is_its_formula_and_stays_finite_far_out():
    r, good = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([True, False])
    beta = calibrated_beta(cost=0.2, alpha=4.0)
    expected = (
        math.exp(2 * (0.3 - 1)) + 0.2 * math.exp(-0.3 * beta)
        + math.exp(2 * (-0.2 + 1)) + 0.2 * math.exp(0.2 * beta)
    ) / 2  # fmt: skip
    assert float(rejection_loss(r, good, cost=0.2)) == pytest.approx(expected)
    far = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = rejection_loss(far, good.flip(0), cost=0.2)
    loss.backward()
    assert loss.isfinite()
    assert bool(far.grad.isfinite().all() & (far.grad * far > 0).all())
    assert rejection_cost(torch.tensor([True, True]), good, cost=0.2) == 0.5


def test_the_rejector_takes_any_network_leaves_it_alone_and_repeats():
    x = draw(0, 400, 3, scale=1.0).float()
    good = x[:, 0] > 0.3
    own = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)).eval()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    one, again = (
        Rejector.fit(x, good, cost=0.3, network=own, alpha=2.0, lr=1e-2, steps=200) for _ in "ab"
    )
    for name, value in own.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not own.training
    assert all(p.requires_grad for p in own.parameters())
    assert torch.equal(one.score(x), again.score(x))
    cost = rejection_cost(one.accepts(x), good, cost=0.3)
    assert cost < 0.8 * rejection_cost(torch.zeros(400).bool(), good, cost=0.3)
    text = torch.randint(50, (400, 6))
    words = nn.Sequential(nn.EmbeddingBag(50, 8), nn.Linear(8, 1))
    Rejector.fit(text, text[:, 0] > 25, cost=0.3, network=words, steps=3)
    Rejector.fit(torch.ones(8, 2), torch.arange(8) > 3, cost=0.3, steps=3).score(torch.ones(2, 2))


def test_a_frozen_network_in_eval_mode_is_trained_as_a_copy():
    modes = []

    class Noting(nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    own = Noting(3, 1).requires_grad_(False).eval()
    x = draw(0, 40, 3).float()
    rejector = Rejector.fit(x, x[:, 0] > 0, cost=0.3, network=own, steps=2)
    assert not torch.equal(rejector.network.weight, own.weight)
    rejector.score(x)
    assert modes == [True, True, False]
    assert not own.weight.requires_grad


def test_units_of_features_do_not_matter_and_a_score_of_nought_rejects():
    x = draw(0, 60, 3, scale=1.0)
    good, moved = x[:, 0] > 0, torch.tensor([1e-6, 1.0, 1e6]) * x + torch.tensor([0.0, 9.0, 1e6])
    plain, other = (Rejector.fit(each, good, cost=0.3, steps=20).score(each) for each in (x, moved))
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)
    undecided = Rejector(network=nn.Flatten(), cost=0.3)
    assert undecided.accepts(torch.tensor([[-1.0], [0.0], [1.0]])).tolist() == [False, False, True]


def test_the_rejector_sees_all_samples_before_any_comes_again():
    seen = []

    class Noting(nn.Linear):
        def forward(self, x):
            seen.append(x[:, 0].tolist())
            return super().forward(x)

    x = torch.arange(10.0)[:, None]
    options = {"cost": 0.3, "network": Noting(1, 1), "steps": 6, "batch_size": 4, "lr": 0.0}
    Rejector.fit(x, x[:, 0] > 4, **options)
    assert [len(each) for each in seen] == [4, 4, 2] * 2
    first, second = ([x for part in half for x in part] for half in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == x[:, 0].tolist()
    assert first != second


def test_fitting_works_inside_inference_mode():
    with torch.inference_mode():
        logits, labels = LOGITS.clone(), LABELS.clone()
        views = logits.expand(2, -1, -1) + 0
        inside = [
            TemperatureScaling.fit(logits, labels).calibrate(logits),
            VectorScaling.fit(logits, labels).calibrate(logits),
            CorrectnessCalibrator.fit(logits, views, labels).calibrate(logits, views),
            Rejector.fit(logits, logits.argmax(1) == labels, cost=0.2, steps=3).score(logits),
        ]
    views = LOGITS.expand(2, -1, -1)
    outside = [
        TemperatureScaling.fit(LOGITS, LABELS).calibrate(LOGITS),
        VectorScaling.fit(LOGITS, LABELS).calibrate(LOGITS),
        CorrectnessCalibrator.fit(LOGITS, views, LABELS).calibrate(LOGITS, views),
        Rejector.fit(LOGITS, LOGITS.argmax(1) == LABELS, cost=0.2, steps=3).score(LOGITS),
    ]
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_answers_that_carry_a_graph_are_learned_from_and_leave_it_alone():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    logits, views, good = LOGITS * weight, LOGITS.expand(2, -1, -1) * weight, LOGITS[:, 0] > 0
    options = {"epochs": 2, "batch_size": 50}
    found, expected = (
        CorrectnessCalibrator.fit(*each, LABELS, **options).temperature(LOGITS, views.detach())
        for each in ((logits, views), (LOGITS, views.detach()))
    )
    assert torch.equal(found, expected)
    found, expected = (
        Rejector.fit(each, good, cost=0.2, steps=3).score(LOGITS) for each in (logits, LOGITS)
    )
    assert torch.equal(found, expected)
    assert weight.grad is None


def test_scores_are_read_in_the_precision_that_they_were_learned_in():
    views = LOGITS.expand(2, -1, -1).float()
    z = views[0]
    calibrator = CorrectnessCalibrator.fit(z, views, LABELS)
    readers = (
        lambda: calibrator.temperature(z, views), Rejector.fit(z, z[:, 0] > 0, cost=0.2, steps=2).score,
        MisclassificationNetwork.fit(z, LABELS, epochs=1).score, RelativeUncertainty.fit(z, LABELS).score,
    )  # fmt: skip
    for read in readers:
        given = (z,) if read is not readers[0] else ()
        expected = read(*given)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(read(*given), expected)


def test_the_rejector_refuses_bad_input():
    x, good = torch.rand(6, 2), torch.tensor([True, False] * 3)
    for bad in ((x[:5], good), (x, good.float()), (x * math.nan, good), (x, good | True)):
        with pytest.raises(InputError):
            Rejector.fit(*bad, cost=0.2)
    with pytest.raises(OptionError):
        Rejector.fit(x, good, cost=1.5)
    with pytest.raises(InputError, match="embeds"):
        Rejector.fit(torch.arange(12).reshape(6, 2), good, cost=0.2)
    with pytest.raises(InputError, match="answers"):
        Rejector.fit(x, good, cost=0.2, network=nn.Linear(2, 3), steps=1)
