"""What Rel-U is compared with, against loops, finite differences and a first step by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference import monitors as reference
from testtime._core.errors import InputError, OptionError
from testtime.guard.misclassification import (
    MisclassificationNetwork,
    doctor,
    odin,
    perturbed_score,
)
from testtime.measures.detection import auroc


def draw(seed, *shape, scale=2.0):
    chance = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=chance, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), temperature=st.floats(0.2, 5))
def test_scores_equal_their_definitions(seed, classes, temperature):
    logits = draw(seed, 20, classes)
    z = logits.numpy() / temperature
    probs = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    found = doctor(logits, temperature=temperature).numpy()
    np.testing.assert_allclose(found, reference.doctor(probs), rtol=1e-10)
    found = odin(logits, temperature=temperature).numpy()
    np.testing.assert_allclose(found, -probs.max(1), rtol=1e-12)


def test_who_is_very_sure_is_still_ranked():
    scores = doctor(torch.tensor([[20.0, 0.0], [30.0, 0.0], [60.0, 0.0]]))
    assert scores.tolist() == pytest.approx([2 * math.exp(-z) for z in (20, 30, 60)], rel=1e-5)


@pytest.mark.parametrize("score", [doctor, odin, partial(doctor, temperature=0.5)])
def test_the_input_moves_along_the_sign_of_the_slope(score):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, step = draw(1, 10, 4, scale=1.0), torch.eye(4).double() * 1e-6
    with torch.no_grad():
        slope = torch.stack(
            [score(model(x + each)).abs() - score(model(x - each)).abs() for each in step], 1
        )
        expected = score(model(x + 0.003 * slope.sign()))
        torch.testing.assert_close(perturbed_score(model, x, score, epsilon=0.003), expected)
        torch.testing.assert_close(perturbed_score(model, x, score, epsilon=0.0), score(model(x)))
        assert bool((expected.abs() > score(model(x)).abs()).all())
    with pytest.raises(OptionError):
        perturbed_score(model, x, score, epsilon=-1.0)


def test_the_networks_first_step_is_adams_on_binary_cross_entropy():
    logits, labels = draw(0, 30, 4), torch.arange(30) % 4
    options = {"epochs": 1, "batch_size": 30, "seed": 3}
    start = MisclassificationNetwork.fit(logits, labels, lr=0.0, **options).network
    after = MisclassificationNetwork.fit(logits, labels, lr=1e-3, **options).network
    wrong = (logits.argmax(1) != labels).double()
    h, leaves = logits, [p.clone().requires_grad_() for p in start.parameters()]
    for weight, bias in zip(leaves[:6:2], leaves[1:6:2], strict=True):
        h = (h @ weight.T + bias).clamp(min=0)
    s = 1 / (1 + (-(h @ leaves[6].T + leaves[7])[:, 0]).exp())
    (-(wrong * s.log() + (1 - wrong) * (1 - s).log()).mean()).backward()
    assert [tuple(p.shape) for p in leaves[::2]] == [(128, 4), (128, 128), (128, 128), (1, 128)]
    for old, new in zip(leaves, after.parameters(), strict=True):
        expected = old.detach() - 1e-3 * old.grad / (old.grad.abs() + 1e-8)
        torch.testing.assert_close(new, expected, rtol=1e-6, atol=1e-9)


def test_the_network_learns_which_answers_are_wrong_and_leaves_all_as_it_was():
    chance = torch.Generator().manual_seed(0)
    probs = torch.rand(400, 6, generator=chance)
    answer = torch.arange(400) % 6
    probs[torch.arange(400), answer] += 1
    labels = torch.where(answer >= 3, (answer + 1) % 6, answer)  # always wrong from 3 on
    logits, before = probs.log(), torch.random.get_rng_state()
    with torch.inference_mode():
        network = MisclassificationNetwork.fit(logits[:200], labels[:200], epochs=100)
        again = MisclassificationNetwork.fit(logits[:200], labels[:200], epochs=100)
        scores = network.score(logits[200:])
        assert torch.equal(scores, again.score(logits[200:]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert auroc(scores, answer[200:] >= 3) > 0.95
    assert bool(((scores >= 0) & (scores <= 1)).all())


def test_bad_input_is_refused():
    logits, labels = draw(0, 6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    network = MisclassificationNetwork.fit(logits, labels, epochs=1)
    for score in (doctor, odin, network.score):
        for bad in (logits[0], logits * math.nan):
            with pytest.raises(InputError):
                score(bad)
    with pytest.raises(InputError, match="expected"):
        network.score(logits[:, :2])
    for score in (doctor, odin):
        with pytest.raises(OptionError):
            score(logits, temperature=0.0)
    with pytest.raises(InputError):
        MisclassificationNetwork.fit(logits, labels + 1)
    for bad in ({"epochs": 0}, {"batch_size": 0}, {"lr": -1.0}):
        with pytest.raises(OptionError):
            MisclassificationNetwork.fit(logits, labels, **bad)
