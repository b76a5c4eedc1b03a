"""Estimators that train give the same numbers whatever mode or default type the caller has set."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from testtime._core.errors import InputError, OptionError
from testtime.measures import network_divergence as nd
from testtime.measures import rejection_gradients
from testtime.measures.information import bounds, laws
from testtime.measures.information.consistency import self_consistency
from testtime.measures.information.diffusion import diffusion_gap, minde_entropy
from testtime.measures.information.minde import diffusion_information, minde
from testtime.measures.information.mine import (
    adaptive_clip,
    mine,
    mine_objective,
    mine_value,
    running_log_mean,
)
from testtime.measures.information.neighbours import ksg
from testtime.measures.information.networks import JointCritic, mlp
from testtime.measures.information.noise import diffused, sampled_times
from testtime.measures.information.variational import smile, variational


def generator():
    return torch.Generator().manual_seed(0)


X, Y, _ = laws.gaussian(64, dims=2, information=1.0, generator=generator())
SHORT = {"steps": 3, "batch_size": 8}
TRAINED = {
    "mine": lambda: mine(X, Y, **SHORT),
    "smile": lambda: smile(X, Y, **SHORT),
    "minde": lambda: minde(X, Y, width=16, **SHORT),
    "entropy": lambda: minde_entropy(X, width=16, **SHORT),
    "divergence": lambda: nd.network_divergence(X, Y, draws=1, **SHORT),
    "images": lambda: nd.network_divergence(
        X.view(-1, 1, 1, 2), Y.view(-1, 1, 1, 2), draws=1, **SHORT
    ),
    "dequantised": lambda: nd.dequantised(torch.zeros(1, 1, 2, 2), generator=generator()).tolist(),
}


@contextmanager
def default_type(kind):
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    "mode",
    [
        lambda: default_type(torch.float64),
        lambda: default_type(torch.bfloat16),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["double", "bfloat16", "autocast"],
)
def test_modes_of_the_caller_change_no_number(name, mode):
    expected = TRAINED[name]()
    with mode():
        assert TRAINED[name]() == expected


class Fixed(nn.Module):
    """A critic that answers what it is told to, with one weight."""

    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, x, *_):
        return self.answer(x * self.weight)


@pytest.mark.parametrize(
    "critic", [torch.tanh, JointCritic(nn.Identity()), Fixed(torch.tanh).requires_grad_(False)]
)
def test_a_critic_that_cannot_be_trained_is_refused(critic):
    for call in (
        lambda: mine(X, Y, critic=critic, **SHORT),
        lambda: smile(X, Y, critic=critic, **SHORT),
        lambda: nd.network_divergence(X, Y, critic=critic, draws=1, **SHORT),
    ):
        with pytest.raises(InputError, match=r"no weight|expected a torch module"):
            call()


@pytest.mark.parametrize("answer", [torch.sum, lambda x: (x,), lambda x: x, lambda x: x[:1, 0]])
def test_a_critic_that_does_not_score_each_sample_is_refused(answer):
    for call in (
        lambda: mine(X, Y, critic=Fixed(answer), **SHORT),
        lambda: nd.network_divergence(X, Y, critic=Fixed(answer), draws=1, **SHORT),
    ):
        with pytest.raises(InputError, match="one score for each"):
            call()


def test_scores_in_a_column_are_scores():
    column = mine(X, Y, critic=Fixed(lambda x: x[:, :1]), **SHORT)
    assert column == mine(X, Y, critic=Fixed(lambda x: x[:, 0]), **SHORT)


BOUNDS = (bounds.donsker_varadhan, bounds.nwj, bounds.infonce, bounds.jensen_shannon_bound,
          bounds.jensen_shannon, bounds.smile_bound, lambda s: bounds.tuba(s, s[0]))  # fmt: skip


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_bounds_of_half_precision_are_computed_in_single(bound, kind):
    scores = (4 * torch.randn(20, 20, generator=generator()) + 13).to(kind)
    assert torch.equal(bound(scores), bound(scores.float()))


SCORES = torch.ones(4)


@pytest.mark.parametrize(
    "bad", [torch.ones(0), torch.ones(2, 2), torch.tensor(1.0), SCORES.long(), SCORES > 0, [1.0]]
)
def test_scores_of_another_kind_are_refused(bad):
    for call in (
        lambda: mine_value(bad, SCORES),
        lambda: mine_value(SCORES, bad),
        lambda: mine_objective(SCORES, bad, SCORES[0]),
        lambda: running_log_mean(None, bad, rate=0.5),
    ):
        with pytest.raises(InputError):
            call()


def test_numbers_of_mine_are_checked():
    for rate in (-1, 2, math.nan):
        with pytest.raises(OptionError, match="rate"):
            running_log_mean(None, SCORES, rate=rate)
    for wrong in ([1.0], SCORES.long(), None):
        with pytest.raises(InputError):
            adaptive_clip(wrong, SCORES)


def nothing(z, _):
    return 0 * z


@pytest.mark.parametrize(
    "bad",
    [X[:, 0], X.long(), X > 0, X * math.nan, X.tolist(), None, torch.tensor(1.0), X[None]],
    ids=["flat", "whole", "flags", "nan", "list", "none", "number", "batch"],
)
def test_samples_of_another_kind_have_no_gap(bad):
    chance = {"draws": 1, "generator": generator()}
    for call in (
        lambda: diffusion_gap(nothing, nothing, bad, **chance),
        lambda: diffusion_information(nothing, bad, Y, kind="c", **chance),
        lambda: diffusion_information(nothing, X, bad, kind="j", **chance),
    ):
        with pytest.raises(InputError):
            call()


def test_options_of_a_gap_are_checked():
    for options in ({"draws": 0}, {"draws": 1.5}, {"kind": "z"}, {"difference": "beside"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            diffusion_information(
                nothing, X, Y, **{"kind": "c", "draws": 1, "generator": generator(), **options}
            )
    with pytest.raises(OptionError, match="draws"):
        diffusion_gap(nothing, nothing, X, draws=0, generator=generator())
    with pytest.raises(InputError, match="as many of each"):
        diffusion_information(nothing, X, Y[:9], kind="c", draws=1, generator=generator())
    with pytest.raises(InputError, match="expected"):
        diffused(X[:, 0], X[:, 0], X[:, 0])


@pytest.mark.parametrize(
    "call",
    [
        lambda g: laws.gaussian(3, dims=1, information=1.0, generator=g),
        lambda g: laws.uniform(3, dims=1, noise=0.5, generator=g),
        lambda g: laws.multimodal(3, dims=1, generator=g),
        lambda g: nd.dequantised(torch.zeros(1, 1, 2, 2), generator=g),
        lambda g: nd.image_critic((1, 8, 8), generator=g),
        lambda g: nd.penalised(nn.Identity(), X[:, :1], Y[:, :1], 1.0, g),
        lambda g: sampled_times(3, g),
        lambda g: diffusion_gap(nothing, nothing, X, draws=1, generator=g),
        lambda g: rejection_gradients.gamma(torch.ones(3), generator=g),
        lambda g: rejection_gradients.accepted_noise(torch.ones(3), g),
    ],
)
def test_without_a_generator_nothing_is_drawn(call):
    before = torch.random.get_rng_state()
    for wrong in (None, 0):
        with pytest.raises(InputError, match="generator"):
            call(wrong)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_are_no_samples_of_a_model():
    for wrong in (X.tolist(), None, "model"):
        with pytest.raises(InputError, match="expected a tensor"):
            nd.network_divergence(X, wrong, **SHORT)
        with pytest.raises(InputError, match="expected a tensor"):
            nd.network_divergence(wrong, X, **SHORT)
        with pytest.raises(InputError, match="expected a tensor"):
            nd.dequantised(wrong, generator=generator())
    for bad in (X.long(), X.to(torch.complex64), X[:0], torch.tensor(1.0)):
        with pytest.raises(InputError, match="expected"):
            nd.penalised(nn.Identity(), bad, bad, 1.0, generator())
    with pytest.raises(InputError, match="channels, height, width"):
        nd.image_critic((1, 8), generator=generator())
    for bad in (math.nan, 1e300):  # the latter leaves single precision
        with pytest.raises(InputError, match="finite"):
            nd.dequantised(torch.full((1, 1, 2, 2), bad, dtype=torch.double), generator=generator())


def test_distances_of_huge_features_are_numbers_or_refused():
    huge = 1e200 * X
    assert nd.frechet_distance(huge, huge) == 0
    with pytest.raises(InputError, match="overflow"):
        nd.frechet_distance(huge, 2 * huge)


def test_what_a_process_answers_is_checked():
    flat = self_consistency(ksg, X, Y, process=lambda y: y[:, 0])
    assert flat == self_consistency(ksg, X, Y, process=lambda y: y[:, :1])
    for process in (lambda y: y[1:], lambda y: None, lambda y: y * math.nan):
        with pytest.raises(InputError, match="process"):
            self_consistency(ksg, X, Y, process=process)
    critic = JointCritic(mlp([4, 4, 1], generator()))
    assert math.isfinite(variational(X, Y, bound=bounds.infonce, critic=critic, **SHORT).value)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_critic_of_another_precision_is_trained_in_single(kind):
    pairs = JointCritic(mlp([4, 4, 1], generator())).to(kind)
    alone = nn.Sequential(mlp([2, 4, 1], generator())).to(kind)
    for call, critic in (
        (lambda critic: mine(X, Y, critic=critic, **SHORT), pairs),
        (lambda critic: smile(X, Y, critic=critic, **SHORT), pairs),
        (lambda critic: nd.network_divergence(X, Y, critic=critic, draws=1, **SHORT), alone),
    ):
        assert call(critic) == call(copy.deepcopy(critic).float())
        assert {weight.dtype for weight in critic.parameters()} == {kind}
