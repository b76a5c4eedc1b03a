"""Transition matrices from paths, against counting by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import markov as reference
from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.measures.markov import (
    row_divergence,
    sample_path,
    stationary_law,
    transition_counts,
    transition_matrix,
)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=2, max_size=30), st.data())
def test_counts_and_rows(states, path, data):
    path = [state % states for state in path]
    counts = transition_counts(torch.tensor(path), states=states)
    assert counts.tolist() == reference.transition_counts(path, states)
    smoothing = data.draw(st.sampled_from([0.5, 1.0, 2.5, "braess-sauer"]))
    matrix = transition_matrix(counts, smoothing=smoothing)
    assert bool((matrix > 0).all())
    torch.testing.assert_close(matrix.sum(-1), torch.ones(states).double())
    for row, count in zip(matrix, counts, strict=True):
        expected = reference.transition_row(count.tolist(), smoothing)
        torch.testing.assert_close(row, torch.tensor(expected).double())
        if not int(count.sum()):
            torch.testing.assert_close(row, torch.full((states,), 1 / states).double())


def test_many_paths_at_once_are_counted_apart():
    paths = torch.randint(0, 3, (2, 5, 20), generator=torch.Generator().manual_seed(0))
    counts = transition_counts(paths, states=3)
    assert counts.shape == (2, 5, 3, 3)
    assert counts[1, 2].tolist() == reference.transition_counts(paths[1, 2].tolist(), 3)


def test_the_stationary_law_is_kept_and_paths_begin_in_it():
    random = torch.Generator().manual_seed(1)
    matrix = torch.rand(4, 4, generator=random).double()
    matrix = matrix / matrix.sum(1, keepdim=True)
    law = stationary_law(matrix)
    torch.testing.assert_close(law @ matrix, law)
    paths = sample_path(matrix, steps=3, paths=20_000, generator=random)
    for time in (0, 2):
        share = paths[:, time].bincount(minlength=4) / len(paths)
        torch.testing.assert_close(share.double(), law, atol=0.02, rtol=0)
    steps = transition_counts(paths, states=4).sum(0)
    torch.testing.assert_close(transition_matrix(steps), matrix, atol=0.03, rtol=0)
    begun = sample_path(matrix, steps=2, paths=5, generator=random, start=torch.eye(4)[2])
    assert begun[:, 0].tolist() == [2] * 5


def birth_and_death(up, states=40):
    up = torch.full((states - 1,), up, dtype=torch.double)
    matrix = torch.diag(up, 1) + torch.diag(1 - up, -1)
    return matrix + torch.diag((1 - matrix.sum(1)).clamp(min=0))


def test_the_rarest_states_of_a_law_have_their_digits():
    """Detailed balance gives the law of a walk on a line: a geometric one."""
    ratio = (0.01 / 0.99) ** torch.arange(40).double()
    found = stationary_law(birth_and_death(0.01))
    torch.testing.assert_close(found, ratio / ratio.sum(), rtol=1e-10, atol=0)
    swapped = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    other = stationary_law(birth_and_death(0.01)[swapped][:, swapped])
    torch.testing.assert_close(other, found[swapped], rtol=1e-10, atol=0)
    both = torch.stack([birth_and_death(0.01), birth_and_death(0.6)])
    torch.testing.assert_close(stationary_law(both)[0], found, rtol=1e-10, atol=0)


def test_states_rarer_than_any_number_have_nothing():
    rare = 1e-200
    matrix = torch.tensor([[0, 1, 0], [rare, 0, 1], [0, rare, 1]], dtype=torch.double)
    assert stationary_law(matrix).tolist() == pytest.approx([0, rare, 1], rel=1e-12, abs=0)


def test_a_chain_that_hardly_hangs_together_has_its_law_and_left_states_have_none():
    for rare in (1e-12, 1e-200):
        loose = torch.tensor([[1, rare], [2 * rare, 1]], dtype=torch.double)
        expected = torch.tensor([2 / 3, 1 / 3]).double()
        torch.testing.assert_close(stationary_law(loose), expected, rtol=1e-6, atol=0)
    left = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5], [0.5, 0.0, 0.5, 0.0], [0.0, 0.2, 0.0, 0.8]])  # fmt: skip
    assert stationary_law(left).tolist() == pytest.approx([0, 2 / 7, 0, 5 / 7])
    assert stationary_law(torch.ones(1, 1)).tolist() == [1]
    ring = torch.eye(5).roll(1, 1)
    torch.testing.assert_close(stationary_law(ring), torch.full((5,), 0.2).double())
    halves = torch.eye(4)[[1, 0, 3, 2]]
    with pytest.raises(InputError, match="falls apart"):
        stationary_law(torch.stack([torch.eye(4).roll(1, 1), halves]))


@pytest.mark.parametrize("kind", ["kl", "chi-squared", "hellinger"])
def test_zeros_have_no_gradient_that_is_nan(kind):
    rows = torch.tensor([[1.0, 0.0], [0.2, 0.8]]).double()
    p, q = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    total = row_divergence(p, q, kind=kind).sum()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(total, (p, q)))


def test_paths_never_enter_a_state_of_probability_0():
    rows = torch.tensor([[1 - 9e-7, 0.0], [1.0, 0.0]], dtype=torch.double)
    for start in (rows[1], rows[0]):
        paths = sample_path(
            rows, steps=2, paths=2_000_000, generator=torch.Generator().manual_seed(0), start=start
        )
        assert not paths.any()


def test_divergences_of_rows():
    p = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    q = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    kl = [0.2 * math.log(0.4) + 0.8 * math.log(1.6), math.log(2)]
    chi = [0.09 / 0.5 * 2, 1.0]
    hellinger = [1 - math.sqrt(0.1) - math.sqrt(0.4), 1 - math.sqrt(0.5)]
    for kind, values in (("kl", kl), ("chi-squared", chi), ("hellinger", hellinger)):
        found = row_divergence(p, q, kind=kind)
        torch.testing.assert_close(found, torch.tensor(values).double(), atol=1e-7, rtol=1e-6)
        assert row_divergence(p, p, kind=kind).tolist() == [0, 0]
    assert row_divergence(q, p, kind="kl")[1] == math.inf
    assert row_divergence(q, p, kind="chi-squared")[1] == math.inf
    with pytest.raises(UnknownName, match="hellinger"):
        row_divergence(p, q, kind="helinger")


@pytest.mark.slow
def test_the_constants_of_a_chain_without_rare_transitions():
    random = torch.Generator().manual_seed(0)
    matrix = torch._sample_dirichlet(torch.full((4, 4), 5.0), generator=random)
    matrix = matrix / matrix.sum(1, keepdim=True)
    law, n = stationary_law(matrix), 4000
    paths = sample_path(matrix, steps=n, paths=800, generator=random)
    estimate = transition_matrix(transition_counts(paths, states=4))
    for kind, second in (("kl", 1.0), ("chi-squared", 2.0), ("hellinger", 0.25)):
        risk = row_divergence(matrix, estimate, kind=kind).mean(0)
        torch.testing.assert_close(
            n * law * risk, torch.full((4,), 1.5 * second).double(), rtol=0.15, atol=0
        )


def test_what_is_no_chain_is_refused():
    for path in (torch.tensor([0]), torch.tensor([0.0, 1.0]), torch.tensor(1)):
        with pytest.raises(InputError, match="two or more states"):
            transition_counts(path, states=2)
    for path in (torch.tensor([0, 2]), torch.tensor([-1, 0])):
        with pytest.raises(InputError, match="expected 0 to 1"):
            transition_counts(path, states=2)
    counts = transition_counts(torch.tensor([0, 0, 0]), states=2)
    with pytest.raises(InputError, match="never left"):
        transition_matrix(counts, smoothing=0.0)
    with pytest.raises(OptionError, match="smoothing"):
        transition_matrix(counts, smoothing=-1.0)
    with pytest.raises(UnknownName, match="braess-sauer"):
        transition_matrix(counts, smoothing="braess")
    with pytest.raises(OptionError, match="no finite sum"):
        transition_matrix(counts, smoothing=1e308)
    for bad in (counts[:1], counts.to(torch.complex64)):
        with pytest.raises(InputError, match="whole numbers"):
            transition_matrix(bad)
    with pytest.raises(InputError, match="batches that go together"):
        row_divergence(torch.eye(2).expand(4, 2, 2), torch.eye(2).expand(3, 2, 2))
    for call in (
        stationary_law,
        lambda m: row_divergence(m, m),
        lambda m: row_divergence(m.real, m),
    ):
        with pytest.raises(InputError, match="expected real numbers"):
            call(torch.eye(2, dtype=torch.complex64))
    start, flat = torch.Generator(), torch.full((2, 2), 0.5)
    with pytest.raises(InputError, match="expected real numbers"):
        sample_path(flat, steps=2, paths=1, generator=start, start=torch.ones(2) / (2 + 0j))
    with pytest.raises(InputError, match="expected one chain"):
        sample_path(flat.expand(2, 2, 2), steps=2, paths=1, generator=start)
    with pytest.raises(InputError, match="sum 1"):
        stationary_law(torch.tensor([[0.5, 0.4], [0.5, 0.5]]))
    with pytest.raises(InputError, match="sum 1"):
        row_divergence(torch.full((2, 2), 0.5), torch.full((2, 2), math.nan))
    with pytest.raises(InputError, match="falls apart"):
        stationary_law(torch.eye(2))
    with pytest.raises(InputError, match="law of 2 states"):
        sample_path(torch.full((2, 2), 0.5), steps=2, paths=1, generator=torch.Generator(),
                    start=torch.ones(2))  # fmt: skip
