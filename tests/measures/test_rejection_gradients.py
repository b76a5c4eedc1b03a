import math

import pytest
import torch
from scipy import stats
from torch import distributions

from testtime._core.errors import InputError, OptionError
from testtime.measures.rejection_gradients import (
    accepted_noise,
    beta,
    dirichlet,
    gamma,
    gamma_from_noise,
    noise_of_gamma,
    student,
    surrogate,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def double(value, n=40_000):
    return torch.full((n,), value, dtype=torch.float64, requires_grad=True)


def close(values, truth):
    error = float(values.std()) / len(values) ** 0.5
    assert float(values.mean()) == pytest.approx(truth, abs=4 * error + 1e-9), error


def test_the_derivatives_of_the_box():
    a = torch.tensor([1.0, 2.0, 5.0, 20.0], dtype=torch.float64, requires_grad=True)
    e = torch.tensor([-0.4, 0.3, 1.2, -2.0], dtype=torch.float64)
    draw = gamma_from_noise(a, e)
    n, d = a.detach(), 1 / 3
    b = n - d
    c = 1 / (9 * b).sqrt()
    v = 1 + c * e
    h = b * v**3
    dh = v**3 - 13.5 * e * b * v**2 * c**3
    dr = -0.5 / b + 9 * e * c**3 / v
    dq = h.log() + (n - 1) * dh / h - dh - n.digamma()
    torch.testing.assert_close(draw.sample.detach(), h)
    torch.testing.assert_close(torch.autograd.grad(draw.sample.sum(), a, retain_graph=True)[0], dh)
    torch.testing.assert_close(torch.autograd.grad(draw.log_ratio.sum(), a)[0], dq - dr)
    torch.testing.assert_close(noise_of_gamma(h, n), e)


@pytest.mark.parametrize("shape", [1.0, 2.0, 20.0])
def test_accepted_noise_makes_gammas(shape):
    a = double(shape, 5000).detach()
    drawn = gamma_from_noise(a, accepted_noise(a, generator())).sample
    assert stats.kstest(drawn.numpy(), stats.gamma(shape).cdf).pvalue > 1e-3
    raised = gamma(a, generator=generator(), raised=3).sample
    assert stats.kstest(raised.numpy(), stats.gamma(shape).cdf).pvalue > 1e-3


def test_shares_and_students_follow_their_laws():
    a, b = torch.full((5000,), 0.7, dtype=torch.float64), torch.full((5000,), 2.5).double()
    shares = beta(a, b, generator=generator()).sample
    assert stats.kstest(shares.numpy(), stats.beta(0.7, 2.5).cdf).pvalue > 1e-3
    heavy = student(b, generator=generator()).sample
    assert stats.kstest(heavy.numpy(), stats.t(2.5).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("shape", "raised"), [(0.3, 1), (0.3, 4), (1.0, 0), (1.0, 1), (2.0, 0), (5.0, 1), (20.0, 1)])  # fmt: skip
def test_the_gradient_of_gamma_is_unbiased(shape, raised):
    a = double(shape)
    draw = gamma(a, generator=generator(), raised=raised)
    (g,) = torch.autograd.grad(surrogate((draw.sample - 3) ** 2, draw).sum(), a)
    close(g, 2 * shape - 5)


@pytest.mark.parametrize("shape", [2.0, 20.0])
def test_less_variance_than_the_score_and_corrections_vanish(shape):
    a = double(shape)
    draw = gamma(a, generator=generator())
    f = (draw.sample - 3) ** 2
    (own,) = torch.autograd.grad(surrogate(f, draw).sum(), a)
    z = draw.sample.detach()
    score = (z - 3) ** 2 * (z.log() - a.detach().digamma())
    assert float(own.var()) < 0.4 * float(score.var())
    sizes = [
        float(
            torch.autograd.grad(gamma(a, generator=generator(), raised=b).log_ratio.sum(), a)[
                0
            ].std()
        )
        for b in (0, 1, 4, 16)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.1


def mean_gradient(parameters, sample):
    """Of E f with f = sin(3 z) of the first coordinate, by torch.distributions."""
    return torch.autograd.grad(torch.sin(3 * sample).mean(), parameters)


@pytest.mark.parametrize("name", ["beta", "dirichlet", "student", "gamma"])
def test_the_gradients_of_torch_in_mean(name):
    p = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 2.5, 1.5)]
    n = 60_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "beta":
            p = p[:2]
            theirs = distributions.Beta(*p).rsample((n,))
            draw = beta(*(v.expand(n) for v in p), generator=generator())
        elif name == "dirichlet":
            theirs = distributions.Dirichlet(torch.stack(p)).rsample((n,))[:, 0]
            draw = dirichlet(torch.stack(p).expand(n, 3), generator=generator())
            draw = draw._replace(sample=draw.sample[:, 0])
        elif name == "student":
            p = [p[1]]
            theirs = distributions.StudentT(p[0]).rsample((n,)).abs()
            draw = student(p[0].expand(n), generator=generator())
            draw = draw._replace(sample=draw.sample.abs())
        else:
            p = [p[0]]
            theirs = distributions.Gamma(p[0], torch.ones((), dtype=torch.float64)).rsample((n,))
            draw = gamma(p[0].expand(n), generator=generator())
    expected = mean_gradient(p, theirs)
    found = torch.autograd.grad(surrogate(torch.sin(3 * draw.sample), draw).mean(), p)
    for own, other in zip(found, expected, strict=True):
        assert float(own) == pytest.approx(float(other), abs=0.03)


def test_the_caller_is_left_alone_and_bad_shapes_refused():
    before = torch.random.get_rng_state()
    one = [gamma(torch.ones(3), generator=generator()).sample for _ in range(2)]
    assert torch.equal(*one)
    assert torch.equal(before, torch.random.get_rng_state())
    tiny = gamma(torch.full((500,), 1e-3), generator=generator())
    assert tiny.sample.isfinite().all()
    for bad in (torch.tensor([0.0]), torch.tensor([math.nan]), torch.tensor([1, 2])):
        with pytest.raises(InputError, match="expected finite numbers above 0"):
            gamma(bad, generator=generator())
    with pytest.raises(InputError, match=r"at least 1\.0, or raised"):
        gamma(torch.tensor([0.5]), generator=generator(), raised=0)
    with pytest.raises(OptionError, match="raised is -1"):
        gamma(torch.ones(1), generator=generator(), raised=-1)
    with pytest.raises(InputError, match="one for each sample"):
        surrogate(torch.ones(3, 2), dirichlet(torch.ones(3, 2), generator=generator()))


KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gradient(sample, p, function):
    draw = sample(p, generator=generator())
    values = function(draw.sample)
    (g,) = torch.autograd.grad(surrogate(values, draw).sum(), p)
    return draw.sample.detach(), g


SHAPES = [(kind, value) for kind in KINDS for value in (2e-30, 1e-8, 1e-3, 1e8, 5e29)
          if 0 < float(torch.tensor(value, dtype=kind)) < math.inf]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), SHAPES, ids=str)
def test_tiny_and_huge_shapes_have_samples_and_gradients(kind, value):
    p = torch.full((300, 3), value, dtype=kind, requires_grad=True)
    shares, slope = gradient(dirichlet, p, lambda s: s[:, 0])
    # 1 / a^2 is beyond the numbers of half precision
    assert shares.isfinite().all()
    assert kind == torch.float16 or slope.isfinite().all()
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[:, 0]))
    whole, slope = gradient(gamma, p, torch.log)
    assert ((whole > 0) & whole.isfinite()).all()
    assert kind == torch.float16 or slope.isfinite().all()
    heavy, slope = gradient(student, p * 2, torch.tanh)
    assert heavy.isfinite().all()
    assert kind == torch.float16 or slope.isfinite().all()
    half = kind in KINDS[:2]
    assert whole.dtype == heavy.dtype == shares.dtype == (torch.float32 if half else kind)


def test_shares_of_tiny_concentrations_have_the_mean_of_their_law():
    p = torch.full((60_000,), 1e-3, requires_grad=True)
    draw = beta(p, 2 * p.detach(), generator=generator())
    (g,) = torch.autograd.grad(surrogate(draw.sample, draw).sum(), p)
    close(draw.sample.detach().double(), 1 / 3)
    close(g.double(), 2e-3 / 3e-3**2)


def test_large_shapes_lose_no_digits_in_single_precision():
    p = torch.full((20_000,), 1e8, requires_grad=True)
    _, g = gradient(gamma, p, lambda z: z)
    close(g.double(), 1.0)


@pytest.mark.parametrize("kind", KINDS[:2], ids=str)
def test_half_precision_draws_what_single_does(kind):
    p = torch.full((9, 3), 0.3, dtype=kind)
    for sample in (gamma, dirichlet, student):
        drawn = [sample(each, generator=generator()).sample for each in (p, p.float())]
        assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "call",
    [
        lambda: accepted_noise(torch.tensor([0.2]), generator()),
        lambda: accepted_noise(torch.tensor([math.nan]), generator()),
        lambda: gamma_from_noise(torch.tensor(1.0), torch.tensor(-3.0)),
        lambda: gamma_from_noise(torch.tensor(0.5), torch.tensor(0.0)),
        lambda: noise_of_gamma(torch.tensor(-1.0), torch.tensor(2.0)),
        lambda: noise_of_gamma(torch.tensor(1.0), torch.tensor(0.2)),
        lambda: beta(torch.ones(2), torch.ones(3), generator=generator()),
        lambda: dirichlet(torch.tensor(1.0), generator=generator()),
        lambda: dirichlet(torch.ones(2, 0), generator=generator()),
        lambda: gamma(torch.tensor([1e-200], dtype=torch.float64), generator=generator()),
    ],
)
def test_what_no_sampler_can_answer_is_refused(call):
    with pytest.raises(InputError):
        call()
