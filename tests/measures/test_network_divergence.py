import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reference import information as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.information.networks import Averaged, mlp
from testtime.measures.network_divergence import (
    dequantised,
    frechet_distance,
    image_critic,
    inception_score,
    network_divergence,
    penalised,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed))


def law(seed, dims=2, shift=0.0):
    random = generator(seed)
    return lambda n: torch.randn(n, dims, generator=random) + shift


def linear(*weights):
    critic = nn.Linear(len(weights), 1, bias=False)
    critic.weight.data = torch.tensor([weights])
    return critic


SHORT = {"steps": 3, "batch_size": 16, "draws": 2}


@pytest.mark.parametrize(("steps", "penalty", "lr", "decay"), [(1, 10, 0.1, 0.5), (40, 3, 0.02, 0.9)])  # fmt: skip
def test_the_training_of_a_linear_critic_between_two_points(steps, penalty, lr, decay):
    """There the gradient is known and no draw matters."""
    a, b, w = [0.5, 2.0, -1.0], [1.0, 0.5, 0.0], [0.2, -0.1, 0.7]
    found = network_divergence(
        torch.tensor([a]).repeat(40, 1), torch.tensor([b]), critic=linear(*w), steps=steps,
        penalty=penalty, lr=lr, decay=decay, trace=True,
    )  # fmt: skip
    value, trace = reference.divergence_of_points(a, b, w, steps, penalty, lr, decay)
    assert found.value == pytest.approx(value, abs=1e-4)
    assert found.trace == pytest.approx(trace, abs=1e-4)
    assert found.standard_error == pytest.approx(0, abs=1e-4)


@given(st.integers(0, 99), st.integers(1, 3), st.floats(0, 20))
def test_the_terms_of_a_quadratic_critic(seed, dims, penalty):
    """D(x) = |x|^2 / 2, whose slope at z is |z|."""

    class Quadratic(nn.Module):
        def forward(self, x):
            return x.square().sum(1) / 2

    x, y = normal(seed, 5, dims).double(), 2 * normal(seed + 100, 5, dims).double()
    found = penalised(Quadratic(), x, y, penalty, generator(seed))
    place = torch.rand(5, generator=generator(seed)).double()
    for i in range(5):
        z = np.sqrt(((place[i] * x[i] + (1 - place[i]) * y[i]).numpy() ** 2).sum() + 1e-8)
        expected = (x[i] @ x[i] - y[i] @ y[i]) / 2 - penalty * (z - 1) ** 2
        assert float(found[i].detach()) == pytest.approx(float(expected), abs=1e-9)


@given(st.integers(0, 99), st.floats(-9, 9))
def test_a_constant_on_top_of_the_critic_changes_nothing(seed, level):
    class Raised(nn.Module):
        def forward(self, x):
            return critic(x) + level

    critic = mlp([3, 8, 1], generator(seed), nn.SiLU).double()
    x, y = normal(seed, 6, 3).double(), normal(seed + 100, 6, 3).double()
    found = [penalised(each, x, y, 10.0, generator()) for each in (critic, Raised())]
    torch.testing.assert_close(*found)


def test_the_gradient_passes_through_the_penalty():
    critic = mlp([2, 4, 1], generator(), nn.SiLU).double()
    x, y, weights = normal(0, 3, 2).double(), normal(1, 3, 2).double(), list(critic.parameters())

    def gain(*values):
        for own, value in zip(weights, values, strict=True):
            own.data = value.detach()
        return penalised(critic, x, y, 10.0, generator()).mean()

    value = gain(*[w.detach().clone() for w in weights])
    found = torch.autograd.grad(value, weights, allow_unused=True)
    for k, weight in enumerate(weights[:-1]):
        start = [w.detach().clone() for w in weights]
        step = torch.zeros_like(weight)
        step.view(-1)[0] = 1e-5
        higher = gain(*[w + step if j == k else w for j, w in enumerate(start)]).detach()
        lower = gain(*[w - step if j == k else w for j, w in enumerate(start)]).detach()
        gain(*start)
        assert float(found[k].view(-1)[0]) == pytest.approx(float(higher - lower) / 2e-5, abs=1e-5)


@settings(max_examples=4, deadline=None)
@given(st.floats(0.5, 3), st.integers(0, 9))
def test_two_points_are_their_distance_apart(distance, seed):
    """The best slope is 1 + d / 20, and the value d + d^2 / 40; small distances take long to learn."""
    direction = normal(seed, 3)
    point = distance * direction / direction.norm()
    found = network_divergence(
        torch.zeros(40, 3), point[None], steps=150, lr=1e-2, batch_size=8, decay=0.8, seed=seed
    )
    best, error = distance + distance**2 / 40, 4 * found.standard_error + 1e-4
    assert 0.9 * best - error <= found.value <= best + error


def test_a_law_that_was_moved_is_farther_away():
    options = {"steps": 150, "lr": 5e-3, "batch_size": 64, "decay": 0.9, "draws": 50}
    values = [network_divergence(law(0), law(1, shift=s), **options).value for s in (0, 1, 3)]
    assert abs(values[0]) < 0.1
    assert values[1] == pytest.approx(math.sqrt(2), rel=0.2)
    assert values[2] == pytest.approx(3 * math.sqrt(2), rel=0.2)


def test_a_fixed_set_is_used_once_and_its_training_share_never(monkeypatch):
    """With real samples that tell themselves apart: the value is of a quarter, each once."""
    seen = []
    from testtime.measures import network_divergence as file

    plain = file.penalised

    def spy(critic, real, fake, *rest):
        seen.append((real[:, 0].tolist(), fake[:, 0].tolist()))
        return plain(critic, real, fake, *rest)

    monkeypatch.setattr(file, "penalised", spy)
    real, fake = torch.arange(44.0), torch.tensor([-1.0, -2.0, -3.0])
    network_divergence(real, fake, steps=5, batch_size=8)
    training = {x for x, _ in seen[:5] for x in x}
    held = [x for x, _ in seen[5:] for x in x]
    assert len(held) == len(set(held)) == 11
    assert not training & set(held)
    assert {y for _, y in seen for y in y} == {-1.0, -2.0, -3.0}
    assert [len(x) for x, _ in seen] == [8] * 5 + [8, 3]
    seen.clear()
    network_divergence(real, fake, held=real + 100, steps=5, batch_size=8)
    assert sorted(x for x, _ in seen[5:] for x in x) == [v + 100 for v in range(44)]
    seen.clear()
    network_divergence(torch.ones, fake, held=torch.zeros, **SHORT)
    assert [set(x) for x, _ in seen] == [{1.0}] * 3 + [{0.0}] * 2


def test_it_repeats_and_leaves_the_caller_alone():
    real, fake = normal(0, 40, 2), normal(1, 9, 2)
    before = torch.random.get_rng_state()
    found = network_divergence(real, fake, **SHORT)
    with torch.no_grad():
        assert network_divergence(real, fake, **SHORT) == found
    with torch.inference_mode():
        assert network_divergence(real * 1, fake * 1, **SHORT) == found
        assert math.isfinite(network_divergence(law(0), law(1), **SHORT).value)
    assert network_divergence(real.requires_grad_(), fake.double(), **SHORT) == found
    assert network_divergence(real, fake, seed=1, **SHORT) != found
    assert torch.equal(before, torch.random.get_rng_state())
    assert real.grad is None
    assert found.trace == ()
    assert len(network_divergence(real, fake, trace=True, **SHORT).trace) == 3
    critic = linear(1.0, 2.0)
    network_divergence(real, fake, critic=critic, **SHORT)
    assert critic.weight.tolist() == [[1.0, 2.0]]
    assert critic.weight.grad is None


def test_one_sample_for_the_value_has_no_error_that_is_known():
    found = network_divergence(normal(0, 40, 2), normal(1, 9, 2), held=normal(2, 1, 2), **SHORT)
    assert found.standard_error == math.inf


def test_images():
    images = torch.randint(256, (40, 3, 9, 8), generator=generator(), dtype=torch.uint8)
    real = dequantised(images, generator=generator())
    assert -1 <= real.min() < -0.9
    assert 0.9 < real.max() < 1
    torch.testing.assert_close((real * 128 + 128).floor(), images.float())
    blur = real * 128 + 128 - images
    assert 0 <= blur.min() < 0.01
    assert 0.99 < blur.max() <= 1
    found = network_divergence(real, real.flip(0), steps=2, batch_size=4)
    assert math.isfinite(found.value)
    critic = image_critic((3, 9, 8), generator=generator(1))
    assert critic(real).shape == (40, 1)
    shapes = [tuple(w.shape) for w in critic.parameters() if w.ndim > 1]
    assert shapes == [(64, 3, 5, 5), (128, 64, 5, 5), (256, 128, 5, 5), (1, 256 * 2 * 1)]
    assert not any(w.any() for name, w in critic.named_parameters() if name.endswith("bias"))
    wide = next(w for w in critic.parameters() if w.shape[:2] == (128, 64)).detach()
    assert float(wide.std()) == pytest.approx(math.sqrt(2 / (64 * 25)), rel=0.02)


def test_the_critic_of_vectors_starts_as_that_of_images(monkeypatch):
    seen, plain = [], Averaged

    def spy(critic, *, decay):
        seen.append(critic)
        return plain(critic, decay=decay)

    monkeypatch.setattr("testtime.measures.network_divergence.Averaged", spy)
    network_divergence(normal(0, 40, 8), normal(1, 40, 8), steps=1, lr=0.0)
    layers = [layer for layer in seen[0] if hasattr(layer, "weight")]
    assert [tuple(layer.weight.shape) for layer in layers] == [(128, 8), (128, 128), (1, 128)]
    for layer in layers:
        assert not layer.bias.any()
        expected = math.sqrt(2 / layer.in_features)
        assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(
    ("real", "fake", "said"),
    [
        (torch.full((40, 2), math.nan), torch.rand(9, 2), "real holds NaN"),
        (torch.rand(40, 2), torch.full((9, 2), math.inf), "fake holds NaN, infinity"),
        (torch.full((40,), 1e300, dtype=torch.float64), torch.rand(9), "beyond float32"),
        (torch.rand(31), torch.rand(9), "real has 31 samples; this needs at least 32"),
        (torch.rand(40, 2), torch.rand(9, 3), r"shape \(16, 2\).*\(16, 3\)"),
        (torch.rand(40, 2), torch.rand(0, 2), r"fake has the shape \(0, 2\)"),
        (torch.rand(40) * 1j, torch.rand(9), "real samples"),
        (torch.tensor(1.0), torch.rand(9), r"real has the shape \(\)"),
        (lambda n: torch.rand(n + 1, 2), torch.rand(9, 2), "asked for 16 samples"),
        (torch.rand(40, 2), lambda n: torch.rand(2), "fake was asked for 16 samples"),
        (torch.rand(40, 2), lambda n: torch.full((n, 2), math.nan), "fake holds NaN"),
        (torch.rand(40, 2), lambda n: np.ones((n, 2)), "answered ndarray; expected a tensor"),
    ],
)  # fmt: skip
def test_bad_samples_are_refused(real, fake, said):
    with pytest.raises(InputError, match=said):
        network_divergence(real, fake, **SHORT)


def test_bad_options_and_critics_are_refused():
    x = torch.rand(40, 2)
    for options in ({"steps": 0}, {"batch_size": 1}, {"lr": -1}, {"draws": 0}, {"decay": 2}, {"penalty": -1}):  # fmt: skip
        with pytest.raises(OptionError, match=next(iter(options))):
            network_divergence(x, x, **options)
    with pytest.raises(InputError, match=r"the critic answers the shape \(16, 2\)"):
        network_divergence(x, x, critic=nn.Linear(2, 2), **SHORT)
    for frozen in (nn.Flatten(), nn.Linear(2, 1).requires_grad_(requires_grad=False)):
        with pytest.raises(InputError, match="no weight that may be trained"):
            network_divergence(x, x, critic=frozen, **SHORT)
    with pytest.raises(InputError, match="held holds NaN"):
        network_divergence(x, x, held=x * math.nan, **SHORT)
    with pytest.raises(InputError, match="training diverged"):
        network_divergence(x, -x, lr=1e20, **SHORT)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(2, 12), st.floats(-9, 9))
def test_the_distance_of_two_moments(seed, dims, n, shift):
    x, y = normal(seed, n, dims).double(), 2 * normal(seed + 100, n + 3, dims).double()
    found = frechet_distance(x, y)
    assert found == pytest.approx(reference.frechet(x.numpy(), y.numpy()), abs=1e-5)
    assert found >= 0
    assert frechet_distance(y, x) == pytest.approx(found, abs=1e-6)
    turn = torch.linalg.qr(normal(seed, dims, dims).double())[0]
    assert frechet_distance(x @ turn + shift, y @ turn + shift) == pytest.approx(found, abs=1e-6)
    assert frechet_distance(x, x + shift) == pytest.approx(dims * shift**2, abs=1e-6)


def test_moments_of_what_is_none_are_refused():
    x = torch.rand(9, 2)
    assert frechet_distance(torch.ones(9, 2), torch.zeros(5, 2)) == 2
    for y, said in {
        "features": (torch.rand(9, 3), "2 features on cpu and y 3"),
        "one": (torch.rand(1, 2), "y has 1 samples"),
        "nan": (x * math.nan, "y holds NaN"),
    }.values():
        with pytest.raises(InputError, match=said):
            frechet_distance(x, y)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(2, 5))
def test_the_inception_score_is_its_formula(seed, n, classes):
    z = 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).double()
    p = z.softmax(1).numpy()
    expected = np.exp(np.mean([(row * np.log(row / p.mean(0))).sum() for row in p]))
    assert inception_score(z) == pytest.approx(expected, rel=1e-9)
    assert 1 - 1e-9 <= inception_score(z) <= classes + 1e-9


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(0, 3), torch.ones(2, 2).long(), torch.full((2, 2), torch.nan)]
)  # fmt: skip
def test_logits_without_predictions_have_no_score(bad):
    with pytest.raises(InputError):
        inception_score(bad)
