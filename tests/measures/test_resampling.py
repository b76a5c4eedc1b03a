"""Standard errors by halves, beside those that are known and the spread over fresh draws."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime._core.errors import InputError, OptionError
from testtime.measures.cauchy_schwarz import quadratic_information
from testtime.measures.information.neighbours import ksg
from testtime.measures.network_divergence import frechet_distance
from testtime.measures.resampling import with_standard_error
from testtime.measures.spectra import matrix_entropy
from testtime.measures.symmetry import invariant_mmd, invariant_wasserstein, sign_flips


@settings(deadline=None, max_examples=20)
@given(st.integers(10, 60), st.integers(0, 9))
def test_of_a_mean_it_is_the_known_one(n, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).exp()
    found = with_standard_error(torch.mean, x, rounds=1000, seed=seed)
    assert found.value == pytest.approx(float(x.mean()))
    assert found.standard_error == pytest.approx(float(x.std()) / math.sqrt(n), rel=0.12)


def test_kinds_are_halved_each_by_itself_or_together():
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, generator=chance), torch.randn(100, generator=chance)
    apart = with_standard_error(lambda a, b: a.mean() - b.mean(), x, y, rounds=2000)
    known = math.sqrt(float(x.var() / 400 + y.var() / 100))
    assert apart.standard_error == pytest.approx(known, rel=0.05)
    same = with_standard_error(lambda a, b: (a - b).mean(), x, x + 1, paired=True)
    assert same.value == pytest.approx(-1)
    assert same.standard_error < 1e-6


def group(x, y):
    return invariant_wasserstein(x, y, sign_flips(2))


MEASURES = {
    "Frechet": frechet_distance,
    "W1": group,
    "MMD": partial(invariant_mmd, group=sign_flips(2), bandwidth=1.0),
    "Cauchy-Schwarz": quadratic_information,
    "entropy of a matrix": lambda x, y: matrix_entropy(y),
    "KSG": ksg,
}


@pytest.mark.parametrize("name", MEASURES)
def test_it_is_the_spread_over_fresh_draws(name):
    measure, chance, found = MEASURES[name], torch.Generator().manual_seed(0), []
    paired = name in ("Cauchy-Schwarz", "KSG")
    for number in range(80):
        x, e = torch.randn(2, 100, 2, generator=chance)
        y = x + e if paired else e * torch.tensor([1.0, 2.0]) + 2
        told = measure(x, y)
        rounds = 12 if number < 40 else None
        more = with_standard_error(measure, x, y, paired=paired, rounds=rounds) if rounds else None
        found.append((float(getattr(told, "value", told)), more and more.standard_error))
    spread = float(torch.tensor([value for value, _ in found]).std())
    told = [error for _, error in found if error is not None]
    assert 0.7 < sum(told) / len(told) / spread < 1.4


def test_the_same_seed_draws_the_same_and_nothing_else_is_drawn():
    x = torch.arange(30.0)
    before = torch.get_rng_state()
    one, two, other = (with_standard_error(torch.mean, x, seed=seed) for seed in (0, 0, 1))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


def test_what_tells_nothing_is_refused():
    x = torch.arange(12.0)
    for samples, more, said in (
        ((), {}, "number"),
        ((x[:9],), {}, r"number \[9\]"),
        ((x, x[:11]), {"paired": True}, "as many"),
        ((x[0],), {}, r"number \[0\]"),
    ):
        with pytest.raises(InputError, match=said):
            with_standard_error(lambda *all: all[0].mean(), *samples, **more)
    for measure in (lambda x: x, lambda x: math.nan, lambda x: "much"):
        with pytest.raises(InputError, match="one finite number"):
            with_standard_error(measure, x)
    for wrong in ({"rounds": 1}, {"seed": 0.5}):
        with pytest.raises(OptionError):
            with_standard_error(torch.mean, x, **wrong)
