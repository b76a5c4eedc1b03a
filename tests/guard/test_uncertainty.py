"""Rel-U, and the expected pairwise measure with its samplers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference import monitors as reference
from testtime._core.errors import InputError, OptionError, ScopeError
from testtime.guard.predictive_uncertainty import (
    dropout_logits,
    ensemble_logits,
    predictive_uncertainty,
    uncertainty_cell,
)
from testtime.guard.relative_uncertainty import RelativeUncertainty


def draw(seed, *shape, scale=2.0):
    chance = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=chance, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), weight=st.floats(0, 1))
def test_rel_u_equals_its_definition(seed, classes, weight):
    logits, labels = draw(seed, 30, classes), torch.arange(30) % classes
    rel_u = RelativeUncertainty.fit(logits, labels, weight=weight, temperature=1.5)
    new = draw(seed + 1, 10, classes)
    tune, probs = ((z / 1.5).softmax(1).numpy() for z in (logits, new))
    expected = reference.relative_uncertainty(tune, labels.numpy(), probs, weight)
    np.testing.assert_allclose(rel_u.score(new).numpy(), expected, rtol=1e-10, atol=1e-14)
    d = rel_u.distances
    assert torch.equal(d, d.T)
    assert bool((d >= 0).all() & (d.diag() == 0).all())
    assert float(d.norm()) == pytest.approx(1)


def test_without_wrong_samples_rel_u_ranks_as_gini():
    logits = draw(0, 50, 5)
    for rel_u in (
        RelativeUncertainty.fit(logits, logits.argmax(1)),
        RelativeUncertainty.fit(logits, torch.zeros(50).long(), weight=0.0),
    ):
        gini = 1 - logits.softmax(1).square().sum(1)
        assert torch.equal(rel_u.score(logits).argsort(), gini.argsort())


def test_a_perturbed_input_scores_higher_and_the_model_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    x = torch.randn(40, 4)
    rel_u = RelativeUncertainty.fit(model(x).detach(), torch.arange(40) % 3)
    chance = torch.random.get_rng_state()
    plain, moved = (rel_u.score_perturbed(model, x, epsilon=e) for e in (0.0, 0.01))
    assert bool((moved > plain).all())
    assert torch.equal(chance, torch.random.get_rng_state())
    assert model[2].training
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    with torch.inference_mode():
        assert torch.equal(rel_u.score_perturbed(model, x, epsilon=0.01), moved)


def small_inputs(seed, n=60):
    """A linear model whose answers a step of 0.004 moves, and inputs of which some are misjudged."""
    chance = torch.Generator().manual_seed(seed)
    model = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(100 * torch.randn(4, 3, generator=chance, dtype=torch.float64))
    x = 0.02 * torch.randn(n, 3, generator=chance, dtype=torch.float64)
    answers, other = model(x).argmax(1), torch.randint(4, (n,), generator=chance)
    labels = torch.where(torch.rand(n, generator=chance) < 0.4, other, answers)
    return model, x, labels


def test_the_search_finds_what_the_definition_finds():
    chosen = set()
    for seed in range(4):
        model, x, labels = small_inputs(seed)
        tuning = [(x[:30], labels[:30])]
        held = list(zip(x[30:].split(7), labels[30:].split(7), strict=True))
        found = RelativeUncertainty.search(model.train(), tuning, held)
        arrays = (model.weight.detach().T, x[:30], labels[:30], x[30:], labels[30:])
        expected = reference.searched_relative_uncertainty(*(each.numpy() for each in arrays))
        got = found.detector.temperature, found.epsilon, found.fpr
        assert got == pytest.approx(expected)
        chosen.add(got[:2])
        fitted = RelativeUncertainty.fit(
            model(x[:30]).detach(), labels[:30], temperature=found.detector.temperature
        )
        assert torch.equal(found.detector.distances, fitted.distances)
        assert model.training
        assert model.weight.grad is None
    assert len(chosen) > 1
    assert any(epsilon for _, epsilon in chosen)


def test_a_batch_of_the_search_costs_what_is_said():
    model, x, labels = small_inputs(0)
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    RelativeUncertainty.search(model, [(x[:30], labels[:30])], [(x[30:], labels[30:])])
    assert len(forwards) == 1 + 100


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_learned_from_in_full(kind):
    logits, labels = draw(0, 60, 4).to(kind), torch.arange(60) % 4
    found, expected = (
        RelativeUncertainty.fit(each, labels, temperature=0.3) for each in (logits, logits.float())
    )
    assert torch.equal(found.distances, expected.distances)
    assert torch.equal(found.score(logits), expected.score(logits.float()))


def test_the_search_refuses_data_that_tell_nothing():
    model, x, labels = small_inputs(0)
    batch = [(x, labels)]
    for tuning, held, said in (
        ([], batch, "tuning"),
        (batch, [], "held"),
        (batch, [(x, model(x).argmax(1))], "one of each kind"),
        (batch, [(x, labels + 4)], "labels"),
        ([(x[:20], labels[:40]), (x[20:], labels[40:])], batch, "labels"),  # 60 of each in all
    ):
        with pytest.raises(InputError, match=said):
            RelativeUncertainty.search(model, tuning, held)
    with pytest.raises(OptionError, match="weight"):
        RelativeUncertainty.search(model, batch, batch, weight=2.0)


def test_rel_u_refuses_bad_input():
    logits, labels = draw(0, 6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    for bad in (
        (logits, labels[:5]), (logits, labels + 1), (logits, labels.double()),
        (logits[:0], labels[:0]), (logits[:, :1], labels * 0), (logits * math.nan, labels),
    ):  # fmt: skip
        with pytest.raises(InputError):
            RelativeUncertainty.fit(*bad)
    with pytest.raises(OptionError):
        RelativeUncertainty.fit(logits, labels, weight=2.0)
    rel_u = RelativeUncertainty.fit(logits, labels)
    for bad in (logits[:, :2], logits * math.nan):
        with pytest.raises(InputError):
            rel_u.score(bad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), members=st.integers(2, 5), classes=st.integers(2, 5))
def test_uncertainty_is_the_mean_over_pairs(seed, members, classes):
    logits = draw(seed, members, 3, classes)
    found = predictive_uncertainty(logits)
    other = predictive_uncertainty(logits, pairs="different")
    probs = logits.softmax(-1).numpy()
    for i in range(3):
        for value, different in ((found, False), (other, True)):
            expected = reference.pairwise_uncertainty(probs[:, i], different)
            got = [float(part[i]) for part in (value.total, value.aleatoric, value.epistemic)]
            assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(found.entropy, found.aleatoric + found.mutual_information)
    assert bool((found.total >= found.entropy - 1e-12).all())
    turned = predictive_uncertainty(logits.flip(0))
    torch.testing.assert_close(turned.total, found.total)


MODELS = "single", "average", "expected"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), members=st.integers(1, 5), classes=st.integers(2, 5))
@pytest.mark.parametrize("predicting", MODELS)
@pytest.mark.parametrize("truth", MODELS)
def test_the_nine_measures_are_those_of_their_models(predicting, truth, seed, members, classes):
    logits = draw(seed, members, 2, classes)
    found = uncertainty_cell(logits, predicting=predicting, truth=truth)
    probs = logits.softmax(-1).numpy()
    for i in range(2):
        total, epistemic = reference.uncertainty_cell(probs[:, i], predicting, truth)
        assert float(found.total[i]) == pytest.approx(total, rel=1e-9)
        assert float(found.epistemic[i]) == pytest.approx(epistemic, abs=1e-9)
    torch.testing.assert_close(found.total, found.aleatoric + found.epistemic)
    other = predictive_uncertainty(logits)
    if (predicting, truth) == ("expected", "average"):
        torch.testing.assert_close(found.epistemic, other.mutual_information)
    with pytest.raises(OptionError, match="expected 'single'"):
        uncertainty_cell(logits, predicting="all", truth=truth)
    with pytest.raises(InputError):
        uncertainty_cell(logits * math.nan, predicting=predicting, truth=truth)


def test_equal_members_agree_and_far_log_probs_do_not_underflow():
    logits = draw(0, 1, 4, 3).expand(6, 4, 3)
    assert float(predictive_uncertainty(logits).epistemic.abs().max()) < 1e-12
    far = torch.tensor([[0.0, -800.0], [-800.0, 0.0]])
    assert float(predictive_uncertainty(far).epistemic) == pytest.approx(400)
    masked = torch.tensor([[0.0, 1.0, -math.inf], [1.0, 0.0, -math.inf]])
    assert float(predictive_uncertainty(masked).total) == pytest.approx(
        float(predictive_uncertainty(masked[:, :2]).total)
    )
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.full((2, 3), math.nan)):
        with pytest.raises(InputError):
            predictive_uncertainty(bad)
    with pytest.raises(InputError, match="different one"):
        predictive_uncertainty(torch.zeros(1, 3), pairs="different")


def test_dropout_samples_leave_model_and_chance_alone_and_repeat():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.Dropout(0.3), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance, x = torch.random.get_rng_state(), torch.randn(5, 4)
    chance = torch.random.get_rng_state()
    one, again = (dropout_logits(model, x, samples=4, seed=s) for s in (1, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, dropout_logits(model, x, samples=4, seed=2))
    assert torch.equal(chance, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not one.requires_grad
    for without in (nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0))):
        with pytest.raises(ScopeError, match="dropout"):
            dropout_logits(without, x)
    with pytest.raises(InputError):
        ensemble_logits([], x)
    assert torch.equal(ensemble_logits([model], x)[0], model.eval()(x))
