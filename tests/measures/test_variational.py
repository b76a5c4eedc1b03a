import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import information as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.information import bounds
from testtime.measures.information import mine as mine_file
from testtime.measures.information.consistency import self_consistency
from testtime.measures.information.estimate import Estimate
from testtime.measures.information.laws import gaussian
from testtime.measures.information.mine import (
    adaptive_clip,
    mine,
    mine_objective,
    mine_value,
    partners,
    running_log_mean,
)
from testtime.measures.information.neighbours import ksg
from testtime.measures.information.networks import Averaged, JointCritic, adam, linear, mlp
from testtime.measures.information.variational import smile, variational


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def trained(bound=bounds.infonce, **options):
    return partial(variational, bound=bound, steps=3, **options)


SHORT = {"mine": partial(mine, steps=3), "smile": partial(smile, steps=3), "nce": trained()}
scores = st.builds(lambda seed, b, s: s * normal(seed, b, b), st.integers(0, 99), st.integers(2, 9), st.floats(0, 8))  # fmt: skip


@given(scores, st.sampled_from([1.0, 5.0, math.inf]))
def test_the_estimates_of_fixed_scores(F, tau):
    f = F.numpy()
    for own, expected in {
        bounds.donsker_varadhan: reference.dv(f), bounds.nwj: reference.nwj(f),
        bounds.infonce: reference.infonce(f), bounds.jensen_shannon: reference.js(f),
        bounds.jensen_shannon_bound: reference.js_objective(f),
        partial(bounds.smile_bound, clip=tau): reference.smile(f, tau),
        lambda s: bounds.tuba(s, s[0]): reference.tuba(f, f[0]),
    }.items():  # fmt: skip
        assert float(own(F)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert bounds.infonce(F) <= math.log(len(F)) + 1e-12
    assert float(bounds.smile_bound(F, clip=math.inf)) == pytest.approx(reference.dv(f), abs=1e-9)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_clip_beyond_the_precision_of_scores_clips_nothing(kind):
    F = normal(0, 4, 4).to(kind)
    for clip in (1e38, 1e39, 1e300):
        assert bounds.smile_bound(F, clip=clip) == bounds.smile_bound(F, clip=math.inf)


@given(scores)
def test_gradients_are_those_of_the_bound_that_trains(F):
    F.requires_grad_()
    expected = torch.autograd.grad(bounds.jensen_shannon_bound(F), F)[0]
    for own in (bounds.jensen_shannon, bounds.smile_bound):
        assert torch.equal(torch.autograd.grad(own(F), F)[0], expected)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(1, 1), torch.zeros(4)])
def test_scores_that_are_not_square_are_refused(bad):
    for own in (bounds.nwj, bounds.donsker_varadhan, bounds.infonce, bounds.jensen_shannon, bounds.smile_bound):  # fmt: skip
        with pytest.raises(InputError, match=r"expected \(B, B\)"):
            own(bad)
    with pytest.raises(InputError, match="one number for each row"):
        bounds.tuba(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(OptionError, match="clip is -1"):
        bounds.smile_bound(torch.zeros(2, 2), clip=-1)


def test_the_corrected_gradient_of_mine_is_the_plain_one_at_the_mean_of_the_batch():
    t, u = normal(0, 20).requires_grad_(), (30 * normal(1, 20)).requires_grad_()
    log_mean = running_log_mean(None, u, rate=0.01)
    assert float(log_mean) == pytest.approx(math.log(float(u.detach().exp().mean())), abs=1e-12)
    found = torch.autograd.grad(mine_objective(t, u, log_mean), [t, u])
    expected = torch.autograd.grad(mine_value(t, u), [t, u])
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain)


@given(st.floats(0, 1), st.integers(0, 50))
def test_the_running_mean_of_mine(rate, seed):
    first, second = normal(seed, 5), normal(seed + 1, 5)
    log_mean = running_log_mean(running_log_mean(None, first, rate=rate), second, rate=rate)
    expected = (1 - rate) * first.exp().mean() + rate * second.exp().mean()
    assert float(log_mean.exp()) == pytest.approx(float(expected))


def test_the_information_gradient_is_never_longer_than_the_other():
    g, limit = normal(0, 5), normal(1, 5)
    assert torch.allclose(adaptive_clip(10 * g, limit), limit.norm() * g / g.norm())
    assert torch.equal(adaptive_clip(0.01 * g, limit), 0.01 * g)
    assert torch.equal(adaptive_clip(torch.zeros(5), limit.float()), torch.zeros(5))
    huge = 1e30 * g.float()  # squares overflow
    assert torch.allclose(adaptive_clip(huge, limit.float()), (limit.norm() * g / g.norm()).float())
    assert torch.equal(adaptive_clip(huge, 2 * huge), huge)
    assert adaptive_clip(huge[0].half(), limit.half()).dtype == torch.half


def test_the_value_of_js_is_tight_at_the_log_ratio_that_it_is_trained_for():
    """The code takes NWJ of the scores themselves, 1 / e less there."""
    rho, b = 0.6, 400
    x, y = normal(0, 60, b, 1), normal(1, 60, b, 1)
    y = rho * x + math.sqrt(1 - rho**2) * y
    left = 1 - rho**2
    ratio = (y.mT**2 - (y.mT - rho * x) ** 2 / left - math.log(left)) / 2
    truth = -0.5 * math.log(left)
    values = [
        (bounds.jensen_shannon(scores), bounds.nwj(scores), bounds.jensen_shannon(scores - 1))
        for scores in ratio
    ]
    js, code, as_code = torch.tensor(values).mean(0).tolist()
    assert js == pytest.approx(truth, abs=0.02)
    assert code == pytest.approx(truth - 1 / math.e, abs=0.02)
    assert as_code == pytest.approx(code, abs=1e-9)


def test_no_sample_of_a_small_batch_of_mine_is_its_own_partner():
    random = generator()
    for n in (2, 3, 4, 31):
        met = torch.zeros(n, n)
        for _ in range(300):
            drawn = partners(n, random)
            assert sorted(drawn.tolist()) == list(range(n))
            assert not any(i == j for i, j in enumerate(drawn.tolist()))
            met[range(n), drawn] += 1
        if n < 31:  # every other sample is met equally often
            expected = 300 / (n - 1) * (1 - torch.eye(n))
            assert bool(((met - expected).abs() <= 4 * expected.sqrt()).all())
    kept = [int((partners(64, random) == torch.arange(64)).sum()) for _ in range(300)]
    assert 0.7 < sum(kept) / 300 < 1.3  # one on average, as of any permutation


def test_in_a_batch_of_two_mine_scores_each_x_with_the_y_of_the_other():
    x, y, _ = gaussian(64, dims=1, information=2.0, generator=generator())
    scored: list[tuple[Tensor, Tensor]] = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = JointCritic(mlp([2, 4, 1], generator(5)))

        def forward(self, a, b):
            if len(a) == 2:  # the held-out samples are 16
                scored.append((a, b))
            return self.inner(a, b)

    mine(x, y, critic=Spy(), steps=20, batch_size=2)
    for (a, b), (c, d) in zip(scored[::2], scored[1::2], strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b.flip(0), d)
    assert len(scored) == 40


def test_a_step_of_mine_by_hand():
    """One step with a batch of all training samples, against the box, written out."""
    x, y, _ = gaussian(40, dims=1, information=0.5, generator=generator())
    critic = JointCritic(mlp([2, 4, 1], generator(5)))
    moved: list[nn.Module] = []
    descend = mine_file.adam

    def spy(network, *, lr, decay_over):
        assert (lr, decay_over) == (0.1, 1)  # lr falls to 0 over all steps
        moved.append(network)
        return descend(network, lr=lr, decay_over=decay_over)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mine_file, "adam", spy)
        found = mine(x, y, critic=critic, steps=1, batch_size=30, lr=0.1, trace=True)
    assert moved[0] is not critic
    changes = [
        (new - old).abs()
        for new, old in zip(moved[0].parameters(), critic.parameters(), strict=True)
    ]
    largest = max(float(c.detach().max()) for c in changes)
    assert largest == pytest.approx(0.1, rel=1e-3)  # the first step of Adam is lr for each weight
    assert len(found.trace) == 1


@pytest.mark.parametrize("name", SHORT)
def test_training_leaves_the_caller_alone_and_repeats(name):
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    estimator = SHORT[name]
    before = torch.random.get_rng_state()
    found = estimator(x, y)
    with torch.no_grad():
        assert estimator(x, y) == found
    with torch.inference_mode():
        assert estimator(x * 1, y * 1) == found
    assert estimator(x.requires_grad_(), y) == found
    assert estimator(x.detach() * 1, y, seed=1) != found
    assert torch.equal(before, torch.random.get_rng_state())
    assert x.grad is None
    assert found.trace == ()
    assert len(estimator(x, y, trace=True).trace) == 3
    assert math.isfinite(found.value)
    assert found.standard_error > 0


@pytest.mark.parametrize("name", SHORT)
def test_moves_and_scales_of_coordinates_change_nothing(name):
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    moved = SHORT[name](4 * x + 7, y)
    assert moved.value == pytest.approx(SHORT[name](x, y).value, abs=1e-4)


@pytest.mark.parametrize("name", SHORT)
def test_bad_samples(name):
    estimator, x = SHORT[name], torch.rand(40, 2)
    assert estimator(torch.ones(40), x) == Estimate(0.0, 0.0)
    assert estimator(x, torch.zeros(40, 3)).value == 0
    constant_feature = torch.cat([x, torch.ones(40, 1)], 1)
    for good in (constant_feature, x.repeat(2, 1)[:40], torch.rand(40, 60), x.half()):
        assert math.isfinite(estimator(good, x).value)
    for bad, said in {
        "NaN": (x.clone().fill_(math.nan), "NaN or infinity, first in sample 0"),
        "length": (torch.rand(50), "50 samples"),
        "few": (torch.rand(31), "31 samples; this needs at least 32"),
    }.values():
        with pytest.raises(InputError, match=said):
            estimator(bad, x)


def test_bad_options():
    x = torch.rand(40)
    for options in ({"steps": 0}, {"batch_size": 1}, {"lr": -1.0}, {"lr": math.nan}):
        with pytest.raises(OptionError, match=next(iter(options))):
            mine(x, x, **options)
        with pytest.raises(OptionError, match=next(iter(options))):
            smile(x, x, **options)
    with pytest.raises(OptionError, match="rate is 2"):
        mine(x, x, rate=2)


def test_a_training_that_diverges_is_said():
    x, y, _ = gaussian(64, dims=1, information=1.0, generator=generator())
    with pytest.raises(InputError, match="training diverged"):
        variational(x, y, bound=bounds.nwj, steps=50, lr=1e6)


def test_a_critic_of_the_callers_is_copied():
    x, y, _ = gaussian(64, dims=1, information=1.0, generator=generator())
    critic = JointCritic(mlp([2, 4, 1], generator()))
    before = [p.clone() for p in critic.parameters()]
    variational(x, y, bound=bounds.infonce, critic=critic, steps=2)
    mine(x, y, critic=critic, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))


def test_mine_learns_what_a_gaussian_tells():
    x, y, truth = gaussian(4000, dims=1, information=0.5, generator=generator())
    found = mine(x, y, steps=300, lr=5e-3)
    assert abs(found.value - truth) < 0.1
    assert abs(mine(x, y.flip(0), steps=100, lr=5e-3).value) < 0.05


def test_as_a_term_it_lowers_the_information_of_an_encoder():
    """z = w x + noise, I(x; z) = ln(1 + w^2) / 2: the weight falls as the term is minimised."""
    x, noise = normal(0, 512, 1).float(), normal(1, 512, 1).float()
    encoder = linear(1, 1, generator())
    nn.init.constant_(encoder.weight, 2.0)
    critic = JointCritic(mlp([2, 16, 1], generator(), nn.ELU))
    raise_it, lower_it = adam(critic, lr=1e-2), adam(encoder, lr=1e-2)
    for step in range(200):
        z, other = encoder(x) + noise, x.roll(step + 1, 0)
        value = mine_value(critic(x, z), critic(other, z))
        if step < 50 or step % 2:
            raise_it(-value)
        else:
            lower_it(value)
    assert 0.5 * math.log1p(float(encoder.weight.detach()) ** 2) < 0.7 * 0.5 * math.log(5)


def test_the_consistency_tests_are_one_call_for_every_estimator():
    x, y, truth = gaussian(2000, dims=1, information=0.8, generator=generator())
    found = self_consistency(ksg, x, y)
    assert abs(found.independent) < 0.1
    assert abs(found.processing - 1) < 0.1
    assert abs(found.additivity - 2) < 0.3
    assert abs(found.information - truth) < 0.1
    for estimator in SHORT.values():
        assert math.isfinite(self_consistency(estimator, x[:80], y[:80]).information)
    asked = []
    self_consistency(lambda a, b: asked.append((a.shape, b.shape)) or Estimate(1.0, 0.0), x, y)
    assert asked == [((1000, 1), (1000, d)) for d in (1, 1, 2)] + [((1000, 2), (1000, 2))]
    assert self_consistency(ksg, x[:81], y[:81]) == self_consistency(ksg, x[:80], y[:80])


def test_averaged_weights():
    network = linear(1, 1, generator())
    averaged = Averaged(network, decay=0.75)
    start = network.weight.detach().clone()
    network.weight.data += 4
    averaged.follow(network)
    torch.testing.assert_close(averaged.network.weight, start + 1)


@settings(max_examples=10)
@given(st.integers(0, 99))
def test_layers_have_the_default_initialisation(seed):
    layer = linear(400, 30, generator(seed))
    assert float(layer.weight.detach().abs().max()) <= 0.05
    assert float(layer.weight.detach().std()) == pytest.approx(0.05 / 3**0.5, rel=0.05)
    assert float(layer.bias.detach().abs().max()) <= 0.05


class Product(nn.Module):
    """T(x, y) = w x . y, that notes what it is asked."""

    def __init__(self, weight, asked):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.forward = lambda x, y: asked.append((x, y)) or self.weight * (x * y).sum(-1)


@pytest.mark.parametrize("name", SHORT)
def test_the_value_is_of_pairs_that_no_step_has_seen(name):
    x, asked = torch.arange(44.0), []
    SHORT[name](x, -x, critic=Product(0.1, asked), batch_size=8, steps=12)
    met = [(a.flatten().tolist(), (-b).flatten().tolist()) for a, b in asked]
    training = 24 if name == "mine" else 12
    trained = {v for pair in met[:training] for own in pair for v in own}
    held = [v for a, b in met[training : training + (1 if name == "mine" else 4)] for v in a]
    assert all(sorted(a) == sorted(b) for a, b in met)
    assert len(held) == len(set(held)) == 11
    assert not trained & set(held)
    if name != "mine":
        assert [len(a) for a, _ in met[12:]] == [3, 3, 3, 2]


def test_mine_carries_its_running_mean_from_step_to_step(monkeypatch):
    x, y, _ = gaussian(64, dims=2, information=1.0, generator=generator())
    seen, plain = [], mine_file.mine_objective

    def spy(together, apart, log_mean):
        seen.append((together.detach().double(), apart.detach().double(), float(log_mean)))
        return plain(together, apart, log_mean)

    monkeypatch.setattr(mine_file, "mine_objective", spy)
    found = mine(x, y, steps=6, batch_size=16, lr=0.05, rate=0.3, trace=True)
    ma = None
    for (together, apart, log_mean), value in zip(seen, found.trace, strict=True):
        batch = float(apart.exp().mean())
        ma = batch if ma is None else 0.7 * ma + 0.3 * batch
        assert log_mean == pytest.approx(math.log(ma), abs=1e-5)
        assert value == pytest.approx(float(together.mean()) - math.log(batch), abs=1e-5)


def test_the_standard_error_of_mine_is_that_of_the_jackknife(monkeypatch):
    """Each sample is left out in turn, as x, as y and as their pair."""
    monkeypatch.setattr(mine_file, "PARTNERS", 999)
    x, y, _ = gaussian(320, dims=1, information=0.5, generator=generator())
    asked: list[tuple[Tensor, Tensor]] = []
    found = mine(x, y, critic=Product(0.4, asked), steps=1, batch_size=8, lr=0.0)
    a, b = asked[2]
    scores = 0.4 * (a.double() @ b.double().T).numpy()
    n = len(scores)

    def value(left):
        rest = [i for i in range(n) if i != left]
        part = scores[rest][:, rest]
        return reference.dv(part)

    assert found.value == pytest.approx(value(None), abs=1e-5)
    values = torch.tensor([value(i) for i in range(n)])
    expected = float((values - values.mean()).square().sum() * (n - 1) / n) ** 0.5
    assert found.standard_error == pytest.approx(expected, rel=0.05)
