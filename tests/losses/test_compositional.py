"""MECO against the gradient of the likelihood by quadrature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from testtime._core.errors import InputError, OptionError
from testtime.losses.compositional import (
    compositional_likelihood,
    log_partition,
    moving_average,
    noise_contrastive,
    storm,
)

positive = st.floats(1e-3, 1e3)


def energy(x, theta):
    """A lopsided double well."""
    return theta[0] * x**4 - theta[1] * x**2 + theta[2] * x


def test_the_gradient_is_that_of_the_likelihood():
    theta = torch.tensor([0.3, 1.1, 0.4], dtype=torch.double, requires_grad=True)
    z = torch.linspace(-5, 5, 20_001).double()
    data = torch.tensor([-1.2, 0.3, 0.9, 1.4]).double()
    uniform = torch.full_like(z, -math.log(10))
    log_g = log_partition(energy(z, theta), uniform)
    loss = compositional_likelihood(energy(data, theta), log_g, log_g.detach())
    exact = energy(data, theta).mean() + torch.trapezoid((-energy(z, theta)).exp(), z).log()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), abs=1e-4)
    found, expected = (torch.autograd.grad(value, theta)[0] for value in (loss, exact))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    half = compositional_likelihood(energy(data, theta), log_partition(energy(z, theta), uniform),
                                    log_g.detach() + math.log(2))  # fmt: skip
    mean = torch.autograd.grad(energy(data, theta).mean(), theta)[0]
    torch.testing.assert_close(
        torch.autograd.grad(half, theta)[0] - mean, (expected - mean) / 2, atol=1e-4, rtol=0
    )


@settings(max_examples=30, deadline=None)
@given(positive, positive, positive, st.floats(0, 1))
def test_the_tracked_value_follows_its_formulas(u, g, before, rate):
    logs = [torch.tensor(math.log(v), dtype=torch.double) for v in (u, g, before)]
    average = moving_average(logs[0], logs[1], rate=rate)
    assert float(average.exp()) == pytest.approx((1 - rate) * u + rate * g, rel=1e-9)
    expected = g + (1 - rate) * (u - before)
    found = float(storm(*logs, rate=rate).exp())
    assert found == pytest.approx(expected if expected > 1e-9 * max(u, g, before) else g, rel=1e-5)


def test_the_first_value_is_that_of_the_batch_and_large_energies_are_no_trouble():
    log_g = log_partition(torch.full((4,), -1e4), torch.zeros(4))
    assert float(log_g) == 1e4
    assert float(moving_average(None, log_g)) == float(storm(None, log_g, log_g)) == 1e4
    assert math.isfinite(float(moving_average(torch.tensor(-1e4), log_g)))


def test_what_is_tracked_is_no_function_of_the_parameters():
    log_g = torch.tensor(0.5, requires_grad=True)
    for log_u in (log_g, 2 * log_g):
        loss = compositional_likelihood(ZERO, log_g, log_u)
        (slope,) = torch.autograd.grad(loss, log_g)
        assert float(slope) == pytest.approx(math.exp(0.5 - float(log_u.detach())))
    assert not moving_average(log_g, log_g).requires_grad
    assert not storm(log_g, log_g, log_g).requires_grad
    with pytest.raises(OptionError, match="rate"):
        storm(ZERO[0], ZERO[0], ZERO[0], rate=-0.5)


def test_a_tenth_of_the_batch_is_taken_where_no_rate_is_given():
    u, g, before = (torch.tensor(math.log(v)) for v in (2.0, 3.0, 1.0))
    assert float(moving_average(u, g).exp()) == pytest.approx(0.9 * 2 + 0.1 * 3)
    assert float(storm(u, g, before).exp()) == pytest.approx(3 + 0.9 * (2 - 1))


def test_nce_finds_the_normaliser():
    random = torch.Generator().manual_seed(0)
    data, noise = torch.randn(4000, generator=random), 2 * torch.randn(4000, generator=random)

    def log_q(x):
        return -x.square() / 8 - math.log(2 * math.sqrt(2 * math.pi))

    log_z = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.LBFGS([log_z])

    def closure():
        optimizer.zero_grad()
        loss = noise_contrastive(
            (data.square() / 2, log_q(data)), (noise.square() / 2, log_q(noise)), log_z
        )
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert float(log_z.detach()) == pytest.approx(0.5 * math.log(2 * math.pi), abs=0.05)


@pytest.mark.slow
def test_a_network_learns_a_density_that_is_normalised():
    """A network's energy in the plane; noise is a Gaussian as wide as the data."""
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )
    optimizer, log_u, scale = torch.optim.Adam(net.parameters(), lr=3e-3), None, 2.0

    def law(x):
        return -x.square().sum(1) / (2 * scale**2) - math.log(2 * math.pi * scale**2)

    def energies(x):
        return net(x)[:, 0] - law(x)

    for _ in range(1500):
        side = 2 * torch.randint(0, 2, (256, 1), generator=random) - 1
        data = 1.2 * side + 0.5 * torch.randn(256, 2, generator=random)
        noise = scale * torch.randn(512, 2, generator=random)
        log_g = log_partition(energies(noise), law(noise))
        log_u = moving_average(log_u, log_g)
        optimizer.zero_grad()
        compositional_likelihood(energies(data), log_g, log_u).backward()
        optimizer.step()
    grid = torch.cartesian_prod(*[torch.linspace(-6, 6, 161)] * 2)
    with torch.no_grad():
        density = (-energies(grid) - log_u).exp()
    assert float(density.sum()) * (12 / 160) ** 2 == pytest.approx(1, abs=0.05)
    at = torch.tensor([[1.2, 1.2], [-1.2, -1.2], [0.0, 0.0]])
    with torch.no_grad():
        high, other, low = (-energies(at) - log_u).exp()
    assert min(high, other) > 5 * low


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="every noise sample"):
        log_partition(torch.zeros(3), torch.zeros(4))
    for bad in (torch.zeros(0), torch.zeros(2, 2), torch.zeros(3).long()):
        with pytest.raises(InputError, match="one energy for each"):
            log_partition(bad, bad)
        with pytest.raises(InputError, match="one energy for each"):
            compositional_likelihood(bad, torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(OptionError, match="rate"):
        moving_average(torch.tensor(0.0), torch.tensor(0.0), rate=1.5)
    pair = torch.zeros(3), torch.zeros(3)
    with pytest.raises(InputError, match="noise"):
        noise_contrastive(pair, (torch.zeros(3), torch.zeros(2)), torch.tensor(0.0))


INF = torch.tensor([math.inf, math.inf])
ZERO = torch.zeros(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: log_partition(ZERO, ZERO.long()),
        lambda: log_partition(torch.tensor([math.nan, 0.0]), ZERO),
        lambda: log_partition(INF, ZERO),
        lambda: log_partition(-INF, ZERO),
        lambda: log_partition(ZERO, torch.tensor([math.inf, 0.0])),
        lambda: moving_average(INF[0], ZERO[0]),
        lambda: moving_average(ZERO[0], torch.tensor(math.nan)),
        lambda: moving_average(ZERO, ZERO),
        lambda: storm(ZERO[0], ZERO[0], torch.tensor(math.nan)),
        lambda: storm(ZERO[0], ZERO[0], INF[0]),
        lambda: storm(ZERO, ZERO[0], ZERO[0]),
        lambda: compositional_likelihood(torch.tensor([math.nan]), ZERO[0], ZERO[0]),
        lambda: compositional_likelihood(ZERO, ZERO[0] + 200, ZERO[0]),
        lambda: compositional_likelihood(ZERO, ZERO, ZERO[0]),
        lambda: noise_contrastive((torch.tensor([math.nan]), ZERO[:1]), (ZERO, ZERO), ZERO[0]),
        lambda: noise_contrastive((INF, -INF), (ZERO, ZERO), ZERO[0]),
        lambda: noise_contrastive((ZERO, ZERO), (ZERO, ZERO.long()), ZERO[0]),
        lambda: noise_contrastive((ZERO, ZERO), (ZERO, ZERO), ZERO),
        lambda: noise_contrastive((ZERO, ZERO), (ZERO, ZERO), ZERO[:, None]),
        lambda: noise_contrastive((ZERO, ZERO), (ZERO, ZERO), torch.tensor(math.nan)),
    ],
)
def test_what_has_no_likelihood_is_refused(call):
    with pytest.raises(InputError):
        call()


def test_noise_without_density_under_the_model_counts_nothing():
    found = log_partition(torch.tensor([math.inf, 0.0]), ZERO)
    assert float(found) == pytest.approx(-math.log(2))
    assert float(noise_contrastive((ZERO, -INF), (INF, ZERO), ZERO[0])) == 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(kind):
    random = torch.Generator().manual_seed(0)
    energies, law = torch.randn(2, 500, generator=random).to(kind)
    half = log_partition(energies, law)
    assert torch.equal(half, log_partition(energies.float(), law.float()))
    assert torch.equal(
        compositional_likelihood(energies, half, half),
        compositional_likelihood(energies.float(), half, half),
    )
    pair = (energies, law)
    single = (energies.float(), law.float())
    zero = torch.zeros((), dtype=kind)
    assert torch.equal(
        noise_contrastive(pair, pair, zero), noise_contrastive(single, single, zero.float())
    )
    one = torch.ones((), dtype=kind)
    assert storm(one, one * 2, one * 0.5).dtype == moving_average(one, one).dtype == torch.float32


def test_storm_keeps_a_value_far_below_what_cancels():
    far, zero = torch.tensor(-100.0), torch.tensor(0.0)
    assert float(storm(zero, far, zero, rate=0)) == pytest.approx(-100)
