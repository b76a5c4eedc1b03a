"""Lipschitz-regularised alpha-divergences, against a program over functions and what is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import symmetry as reference

from testtime._core.errors import InputError, OptionError, WorkFailed
from testtime.measures.lipschitz import lipschitz_divergence
from testtime.measures.symmetry import (
    fundamental_domain,
    invariant_alpha_divergence,
    invariant_distances,
    invariant_mmd,
    permutations,
    rotations,
    sign_flips,
)

GROUPS = {
    "one": torch.eye(2)[None],
    "signs": sign_flips(2),
    "orders": permutations(2),
    "turns": rotations(5),
}


def drawn(seed, count=6, dims=2):
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)).double()


def images(x, group, seed):
    chosen = torch.randint(len(group), (len(x),), generator=torch.Generator().manual_seed(seed))
    return torch.einsum("nij,nj->ni", group.double()[chosen], x)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("alpha", [1.2, 2.0, 4.0])
def test_the_supremum_over_functions(name, alpha):
    for seed, scale in ((0, 1.0), (2, 0.2), (4, 5.0)):
        x, y, group = scale * drawn(seed), scale * (drawn(seed + 1, 4) + 0.5), GROUPS[name]
        expected = reference.alpha_divergence(x.numpy(), y.numpy(), group.double().numpy(), alpha)
        found = invariant_alpha_divergence(x, y, group, alpha=alpha)
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("name", GROUPS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(1.05, 6))
def test_laws_of_the_divergence(name, seed, alpha):
    x, y, group = drawn(seed), drawn(seed + 1), GROUPS[name]
    found = invariant_alpha_divergence(x, y, group, alpha=alpha)
    moved = images(x, group, seed), images(y, group, seed + 1)
    assert invariant_alpha_divergence(*moved, group, alpha=alpha) == pytest.approx(found, abs=1e-6)
    assert invariant_mmd(*moved, group, bandwidth=0.7) == pytest.approx(
        invariant_mmd(x, y, group, bandwidth=0.7), abs=1e-6
    )
    assert 0 < found <= invariant_alpha_divergence(x, y, GROUPS["one"], alpha=alpha) + 1e-7
    assert found <= reference.wasserstein(x.numpy(), y.numpy(), group.double().numpy()) + 1e-12
    assert invariant_alpha_divergence(x, moved[0], group, alpha=alpha) == pytest.approx(0, abs=1e-8)


def test_it_is_not_symmetric():
    x, y = torch.tensor([[0.0], [0.0], [4.0]]), torch.tensor([[0.0], [4.0], [4.0]])
    apart = torch.cdist(x, 0.8 * y)
    assert abs(lipschitz_divergence(apart) - lipschitz_divergence(apart.mT)) > 1e-3


@pytest.mark.parametrize("alpha", [1.3, 2.0, 3.0])
def test_short_distances_are_transport_and_long_ones_the_alpha_divergence(alpha):
    x, y = drawn(0), drawn(1)
    transport = reference.wasserstein(x.numpy(), y.numpy(), np.eye(2)[None])
    short = lipschitz_divergence(1e-4 * torch.cdist(x, y), alpha=alpha)
    assert short / 1e-4 == pytest.approx(transport, rel=1e-3)
    places = torch.tensor([[0.0], [1.0]])
    p, q = [0.75, 0.25], [0.4, 0.6]
    rows, columns = places[[0, 0, 0, 1]], places[[0, 0, 1, 1, 1]]
    expected = sum(
        b * ((a / b) ** alpha - 1) / (alpha * (alpha - 1)) for a, b in zip(p, q, strict=True)
    )
    long = lipschitz_divergence(1e3 * torch.cdist(rows, columns), alpha=alpha)
    assert long == pytest.approx(expected, abs=1e-5)


def test_one_sample_each_is_their_distance():
    assert lipschitz_divergence(torch.tensor([[2.5]])) == pytest.approx(2.5)


def test_repeated_samples_and_fewer_than_dimensions():
    x, y = drawn(3, 3, dims=7), drawn(4, 4, dims=7)
    found = lipschitz_divergence(torch.cdist(x, y))
    twice = lipschitz_divergence(torch.cdist(x.repeat(2, 1), y.repeat(5, 1)))
    assert twice == pytest.approx(found, abs=1e-7)
    assert lipschitz_divergence(torch.zeros(4, 9)) == pytest.approx(0, abs=1e-8)


def test_symmetry_saves_samples():
    random, ratios = torch.Generator().manual_seed(0), []
    for _ in range(4):
        x, y = (2 * torch.rand(2, 150, 3, generator=random, dtype=torch.double) - 1).unbind()
        plain = lipschitz_divergence(torch.cdist(x, y))
        ratios.append(plain / invariant_alpha_divergence(x, y, sign_flips(3)))
    assert 1.6 <= sum(ratios) / 4 <= 2.4  # the rate says 8^(1/3) = 2


def test_what_is_no_distance_is_refused():
    good = torch.ones(2, 3)
    for bad in (good[0], good[:0], -good, math.nan * good, math.inf * good, good.to(torch.cfloat)):
        with pytest.raises(InputError, match="expected finite distances"):
            lipschitz_divergence(bad)
    for alpha in (1, 0.5, math.inf, math.nan, "2"):
        with pytest.raises(OptionError, match="alpha"):
            lipschitz_divergence(good, alpha=alpha)


def test_bounds_that_stay_apart_are_said():
    with pytest.raises(WorkFailed, match="lies between"):
        lipschitz_divergence(1e6 * torch.cdist(drawn(0, 1, dims=3), drawn(1, 40, dims=3)), alpha=50)


@pytest.mark.parametrize("name", [*GROUPS, "signed orders"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_fundamental_domain_has_one_point_of_each_orbit(name, seed):
    both = torch.einsum("aij,bjk->abik", sign_flips(2), permutations(2)).flatten(0, 1)
    group, x, y = GROUPS.get(name, both), drawn(seed), drawn(seed + 1)
    found = fundamental_domain(x, group)
    assert bool((invariant_distances(found, x, group).diagonal() < 1e-6).all())
    torch.testing.assert_close(fundamental_domain(images(x, group, seed), group), found)
    torch.testing.assert_close(fundamental_domain(found, group), found)
    plain = torch.cdist(found, fundamental_domain(y, group))
    orbits = invariant_distances(x, y, group)
    assert bool((plain >= orbits - 1e-6).all())
    if name != "turns":
        torch.testing.assert_close(plain, orbits, atol=1e-6, rtol=0)


def test_rotations_bring_orbits_closer_than_their_domain():
    x, y, group = drawn(0, 200), drawn(1, 200), rotations(5)
    plain = torch.cdist(fundamental_domain(x, group), fundamental_domain(y, group))
    assert bool((plain > invariant_distances(x, y, group) + 0.1).any())


def test_the_domain_of_signs_and_of_orders():
    x = drawn(5, dims=3)
    torch.testing.assert_close(fundamental_domain(x, sign_flips(3)), x.abs())
    torch.testing.assert_close(fundamental_domain(x, permutations(3)), x.sort(1).values)


def test_elements_that_do_nothing_have_no_domain():
    with pytest.raises(InputError, match="more than one element"):
        fundamental_domain(drawn(0), torch.eye(2).repeat(2, 1, 1))
    with pytest.raises(InputError, match="expected finite samples"):
        fundamental_domain(torch.full((3, 2), math.nan), sign_flips(2))
