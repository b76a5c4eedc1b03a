"""Divergences under symmetry, against transport and kernels over all group elements."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime._core.errors import InputError, OptionError
from testtime.measures.symmetry import (
    invariant_distances,
    invariant_mmd,
    invariant_wasserstein,
    permutations,
    rotations,
    sign_flips,
)

GROUPS = {"signs": sign_flips(2), "orders": permutations(2), "turns": rotations(3)}


def drawn(seed, count=12, dims=2):
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_is_closed_and_each_element_once(name):
    group = GROUPS[name].double()
    products = torch.einsum("aij,bjk->abik", group, group)
    apart = (products[:, :, None] - group).abs().amax((-1, -2))
    assert bool((apart < 1e-6).any(-1).all())
    assert int((torch.cdist(group.flatten(1), group.flatten(1)) < 1e-6).sum()) == len(group)


@pytest.mark.parametrize("name", GROUPS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_distances_are_those_of_orbits(name, seed):
    group, x, y = GROUPS[name].double(), drawn(seed), drawn(seed + 1, 7)
    expected = torch.tensor([[min(float((a - g @ b).norm()) for g in group) for b in y] for a in x])
    torch.testing.assert_close(
        invariant_distances(x, y, group), expected.double(), atol=1e-6, rtol=0
    )
    chosen = group[torch.arange(len(y)) % len(group)]
    moved = torch.einsum("nij,nj->ni", chosen, y)
    torch.testing.assert_close(
        invariant_distances(x, moved, group), invariant_distances(x, y, group), atol=1e-6, rtol=0
    )


def test_distances_by_a_fundamental_domain():
    x, y = drawn(0, dims=3), drawn(1, dims=3)
    torch.testing.assert_close(
        invariant_distances(x, y, sign_flips(3)), torch.cdist(x.abs(), y.abs()), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        invariant_distances(x, y, permutations(3)),
        torch.cdist(x.sort(1).values, y.sort(1).values), atol=1e-6, rtol=0,
    )  # fmt: skip


@pytest.mark.extra
def test_transport_between_orbits():
    from scipy.optimize import linear_sum_assignment

    x, y, group = drawn(2), drawn(3), sign_flips(2)
    cost = invariant_distances(x, y, group).numpy()
    rows, columns = linear_sum_assignment(cost)
    found = invariant_wasserstein(x, y, group)
    assert found == pytest.approx(cost[rows, columns].mean(), abs=1e-9)
    assert found <= invariant_wasserstein(x, y, torch.eye(2)[None]) + 1e-12
    assert invariant_wasserstein(x, -x, group) == pytest.approx(0, abs=1e-9)
    assert invariant_wasserstein(x, y[:5], group) > 0


@pytest.mark.extra
@pytest.mark.parametrize("name", GROUPS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_laws_of_transport_between_orbits(name, seed):
    """As Chen et al. have it: blind to images of any sample, and never above W1; and a metric."""
    group = GROUPS[name].double()
    x, y, z = (drawn(seed + i) for i in range(3))
    found = invariant_wasserstein(x, y, group)
    chosen = group[torch.arange(len(y)) % len(group)]
    images = torch.einsum("nij,nj->ni", chosen, y)
    assert invariant_wasserstein(x, images, group) == pytest.approx(found, abs=1e-6)
    assert invariant_wasserstein(images, y, group) == pytest.approx(0, abs=1e-6)
    one = torch.eye(2)[None]
    assert 0 < found <= invariant_wasserstein(x, y, one) + 1e-9
    assert invariant_wasserstein(y, x, group) == pytest.approx(found, abs=1e-9)
    between = invariant_wasserstein(x, z, group) + invariant_wasserstein(z, y, group)
    assert found <= between + 1e-9
    assert invariant_wasserstein(x + 9, y + 9, one) == pytest.approx(
        invariant_wasserstein(x, y, one), abs=1e-9
    )


@pytest.mark.parametrize("name", GROUPS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), bandwidth=st.floats(0.05, 5))
def test_the_mean_discrepancy_of_orbits_is_a_metric(name, seed, bandwidth):
    group = GROUPS[name]
    x, y, z = (drawn(seed + i) for i in range(3))

    def apart(a, b):
        return invariant_mmd(a, b, group, bandwidth=bandwidth)

    assert apart(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert apart(x, y) >= 0
    assert apart(x, y) == pytest.approx(apart(y, x), abs=1e-6)
    assert apart(x, y) <= apart(x, z) + apart(z, y) + 1e-6


def test_mmd_of_all_images():
    x, y, group = drawn(4), drawn(5, 9), rotations(3)
    images = [torch.einsum("gij,nj->gni", group, z).flatten(0, 1) for z in (x, y)]

    def kernel(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * 0.7**2)).mean()

    square = kernel(images[0], images[0]) + kernel(images[1], images[1]) - 2 * kernel(*images)
    assert invariant_mmd(x, y, group, bandwidth=0.7) == pytest.approx(math.sqrt(square), abs=1e-6)


def test_what_is_no_group_or_no_sample_is_refused():
    x = drawn(0)
    for bad in (x[0], x.long(), x[:0], torch.full((3, 2), math.nan), drawn(0, dims=3)):
        with pytest.raises(InputError, match="expected finite samples"):
            invariant_distances(x, bad, sign_flips(2))
    for group in (sign_flips(3), torch.eye(2), 2 * sign_flips(2)):
        with pytest.raises(InputError, match="sign_flips"):
            invariant_distances(x, x, group)
    with pytest.raises(OptionError, match="bandwidth"):
        invariant_mmd(x, x, sign_flips(2), bandwidth=0.0)
    with pytest.raises(InputError, match="elements"):
        permutations(12)
