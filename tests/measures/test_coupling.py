"""Couplings and bottlenecks, against a direct greedy and the best of all encoders."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import coupling as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.coupling import (
    coupling_with_bottleneck,
    entropy_bits,
    greedy_bottleneck,
    greedy_coupling,
    mutual_information_bits,
    refined_bottleneck,
    uniform_bottleneck,
)


def laws(low=1, high=7):
    masses = st.lists(st.floats(0, 1), min_size=low, max_size=high).filter(lambda m: sum(m) > 1e-3)
    return masses.map(lambda m: torch.tensor(m).double() / torch.tensor(m).double().sum())


@settings(max_examples=30, deadline=None)
@given(laws(), laws())
def test_the_greedy_coupling_has_its_marginals(p, q):
    joint = greedy_coupling(p, q)
    torch.testing.assert_close(joint.sum(1), p, atol=1e-9, rtol=0)
    torch.testing.assert_close(joint.sum(0), q, atol=1e-9, rtol=0)
    assert int((joint > 0).sum()) <= len(p) + len(q) - 1


def test_the_greedy_coupling_follows_its_algorithm():
    random = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 3), (4, 4), (7, 5), (12, 9)):
        p, q = (torch.rand(n, generator=random).double() for n in (rows, columns))
        p, q = p / p.sum(), q / q.sum()
        expected = torch.from_numpy(reference.greedy_coupling(p.numpy(), q.numpy()))
        torch.testing.assert_close(greedy_coupling(p, q), expected, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(laws(), st.floats(0, 3))
def test_the_bottleneck_keeps_to_its_rate_and_nearly_fills_it(p, rate):
    found = greedy_bottleneck(p, rate=rate)
    torch.testing.assert_close(found.joint.sum(1), p, atol=1e-9, rtol=0)
    assert found.rate <= rate + 1e-9
    assert bool(((found.joint > 0).sum(1) <= 1).all())  # an encoder, not a draw
    assert mutual_information_bits(found.joint) == pytest.approx(found.rate, abs=1e-9)
    expected = sorted(reference.greedy_bottleneck(p.tolist(), rate))
    assert sorted(found.joint.sum(0).tolist()) == pytest.approx(expected, abs=1e-9)
    second = float(p.sort(descending=True).values[1]) if len(p) > 1 else 0.0
    bound = entropy_bits(torch.tensor([second, 1 - second]))
    assert min(rate, entropy_bits(p)) - found.rate <= bound + 1e-9


def test_the_bottleneck_beside_the_best_partition():
    random = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(40):
        p = torch.rand(5, generator=random).double() ** 3
        p, rate = p / p.sum(), 2 * float(torch.rand((), generator=random))
        rates = [entropy_bits(torch.stack([p[part].sum() for part in parts]))
                 for parts in reference.partitions(list(range(5)))]  # fmt: skip
        best = max(r for r in rates if r <= rate + 1e-12)
        gaps.append(best - greedy_bottleneck(p, rate=rate).rate)
    assert min(gaps) >= -1e-9
    assert sum(gaps) / len(gaps) < 0.25


def test_the_rate_of_a_mapping_is_enough_for_it():
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        p = torch.rand(7, generator=random, dtype=torch.double)
        p = p / p.sum()
        found = greedy_bottleneck(p, rate=2 * float(torch.rand((), generator=random)))
        again = greedy_bottleneck(p, rate=found.rate)
        assert again.rate == pytest.approx(found.rate, abs=1e-12)


def test_laws_of_single_precision_are_laws_of_double():
    joint = greedy_coupling(torch.full((10,), 0.1), torch.full((7,), 1 / 7))
    assert float(joint.sum()) == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(joint.sum(1), torch.full((10,), 0.1).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rate", "optimum"),
    [(0.3, 0.2003), (0.5, 0.4761), (0.7, 0.6398), (0.85, 0.7805), (0.9, 0.8848), (1.0, 0.9214),
     (1.1, 1.0297)],
)  # fmt: skip
def test_refined_encoders_of_the_papers_example_are_the_best(rate, optimum):
    """The optima are those of a free search, 60 starts of Powell's and of Nelder's and Mead's method."""
    p = torch.tensor([0.7, 0.2, 0.1]).double()
    found = refined_bottleneck(p, rate=rate)
    assert found.information == pytest.approx(optimum, abs=1e-4)
    assert found.rate == pytest.approx(rate)
    nearby = []
    for parts in reference.partitions([0, 1, 2]):
        joint = np.zeros((3, len(parts)))
        for code, part in enumerate(parts):
            joint[part, code] = p[part]
        nearby.append(reference.best_move(joint, rate))
    assert found.information == pytest.approx(max(nearby), abs=3e-3)


@settings(max_examples=30, deadline=None)
@given(laws(3), st.floats(1e-4, 0.01))
def test_near_a_mapping_no_other_cell_is_better(p, more):
    mapping = greedy_bottleneck(p, rate=0.6 * entropy_bits(p))
    rate = mapping.rate + more
    if greedy_bottleneck(p, rate=rate).rate == mapping.rate:
        best = reference.best_move(mapping.joint.numpy(), rate)
        assert refined_bottleneck(p, rate=rate).information >= best - 1e-6


@settings(max_examples=40, deadline=None)
@given(laws(), st.floats(0, 3))
def test_refined_encoders_keep_to_the_rate_and_more_than_the_greedy_one(p, rate):
    found, greedy = refined_bottleneck(p, rate=rate), greedy_bottleneck(p, rate=rate)
    torch.testing.assert_close(found.joint.sum(1), p, atol=1e-9, rtol=0)
    assert found.rate == pytest.approx(min(rate, entropy_bits(p)), abs=1e-6)
    assert found.rate <= rate + 1e-9
    assert greedy.information - 1e-9 <= found.information <= found.rate + 1e-9
    assert bool((found.joint >= 0).all())


@settings(max_examples=30, deadline=None)
@given(laws(), st.floats(0, 70))
def test_the_uniform_quantiser_has_cells_of_as_many_symbols(p, rate):
    found = uniform_bottleneck(p, rate=rate)
    assert found.rate <= rate + 1e-9
    size = math.ceil(len(p) / math.floor(2**rate))
    cells = [float(cell.sum()) for cell in p.split(size)]
    assert found.joint.sum(0).tolist() == pytest.approx([mass for mass in cells if mass > 0])


def test_information_does_not_fall_with_the_rate():
    p, q = (torch.rand(9, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    p, q = p / p.sum(), q / q.sum()
    for encoder in (greedy_bottleneck, refined_bottleneck):
        told = [
            mutual_information_bits(coupling_with_bottleneck(p, q, rate=r / 4, encoder=encoder))
            for r in range(14)
        ]
        assert all(later > sooner - 0.25 for sooner, later in pairwise(told))
        assert told[0] == pytest.approx(0, abs=1e-9)
        assert told[-1] > 2


@settings(max_examples=40, deadline=None)
@given(
    laws(2), laws(2), st.floats(0, 3),
    st.sampled_from([greedy_bottleneck, refined_bottleneck, uniform_bottleneck]),
)  # fmt: skip
def test_a_coupling_through_a_bottleneck(p, q, rate, encoder):
    joint = coupling_with_bottleneck(p, q, rate=rate, encoder=encoder)
    torch.testing.assert_close(joint.sum(1), p, atol=1e-9, rtol=0)
    torch.testing.assert_close(joint.sum(0), q, atol=1e-9, rtol=0)
    code = encoder(p, rate=rate)
    second = mutual_information_bits(greedy_coupling(code.joint.sum(0), q))
    bound = code.information + second - code.rate
    assert mutual_information_bits(joint) >= bound - 1e-9  # the bound of the paper
    assert mutual_information_bits(joint) <= rate + 1e-9


def test_the_ends():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    whole = greedy_bottleneck(p, rate=5.0)
    assert whole.joint.shape == (4, 3)
    assert whole.rate == pytest.approx(entropy_bits(p))
    nothing = greedy_bottleneck(p, rate=0.0)
    assert nothing.joint.shape == (4, 1)
    assert nothing.rate == 0.0
    assert greedy_bottleneck(torch.ones(1), rate=0.0).rate == 0.0


@pytest.mark.parametrize(
    "law", [torch.tensor([0.5, 0.6]), torch.tensor([1.5, -0.5]), torch.tensor([math.nan, 1.0]),
            torch.tensor([[1.0]]), torch.tensor([1]), torch.zeros(0)]
)  # fmt: skip
def test_what_is_no_law_is_refused(law):
    good = torch.tensor([0.5, 0.5])
    for call in (
        lambda: greedy_coupling(law, good), lambda: greedy_coupling(good, law),
        lambda: greedy_bottleneck(law, rate=1.0), lambda: refined_bottleneck(law, rate=1.0),
        lambda: uniform_bottleneck(law, rate=1.0), lambda: coupling_with_bottleneck(good, law, rate=1.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="with sum 1"):
            call()
    for encoder in (greedy_bottleneck, refined_bottleneck, uniform_bottleneck):
        with pytest.raises(OptionError, match="rate"):
            encoder(good, rate=-0.1)


def test_alphabets_of_thousands_are_coupled():
    random = torch.Generator().manual_seed(0)
    p, q = (-torch.rand(5000, generator=random, dtype=torch.double).log() for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    code = greedy_bottleneck(p, rate=6.0)
    joint = coupling_with_bottleneck(p, q, rate=6.0)
    assert code.rate <= 6.0 + 1e-9
    torch.testing.assert_close(joint.sum(1), p, atol=1e-9, rtol=0)
    torch.testing.assert_close(joint.sum(0), q, atol=1e-9, rtol=0)
