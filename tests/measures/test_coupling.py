"""Couplings and bottlenecks, against a direct greedy and the best of all encoders."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime._core.errors import InputError, OptionError
from testtime.measures.coupling import (
    coupling_with_bottleneck,
    entropy_bits,
    greedy_bottleneck,
    greedy_coupling,
    mutual_information_bits,
)


def laws(low=1, high=7):
    masses = st.lists(st.floats(0, 1), min_size=low, max_size=high).filter(lambda m: sum(m) > 1e-3)
    return masses.map(lambda m: torch.tensor(m).double() / torch.tensor(m).double().sum())


def plain_greedy(p, q):
    p, q, joint = p.clone(), q.clone(), torch.zeros(len(p), len(q)).double()
    while p.max() > 1e-14 and q.max() > 1e-14:
        i, j = int(p.argmax()), int(q.argmax())
        mass = min(float(p[i]), float(q[j]))
        joint[i, j] += mass
        p[i] -= mass
        q[j] -= mass
    return joint


def plain_bottleneck(masses, rate):
    """The algorithm box, word for word, on lists."""
    groups = sorted((m for m in masses if m > 0), reverse=True)
    bits = lambda g: -sum(m * math.log2(m) for m in g)  # noqa: E731
    if bits(groups) <= rate + 1e-12:
        return groups
    while len(groups) > 1:
        small = [*groups[:-2], groups[-2] + groups[-1]]
        if bits(small) <= rate + 1e-12:
            return small
        groups = [groups[0] + groups[1], *groups[2:]]
        if bits(groups) <= rate + 1e-12:
            return groups
    return groups


def partitions(places):
    if not places:
        yield []
        return
    first, *rest = places
    for parts in partitions(rest):
        yield [[first], *parts]
        for k, part in enumerate(parts):
            yield [*parts[:k], [first, *part], *parts[k + 1 :]]


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
        torch.testing.assert_close(greedy_coupling(p, q), plain_greedy(p, q), atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None)
@given(laws(), st.floats(0, 3))
def test_the_bottleneck_keeps_to_its_rate_and_nearly_fills_it(p, rate):
    found = greedy_bottleneck(p, rate=rate)
    torch.testing.assert_close(found.joint.sum(1), p, atol=1e-9, rtol=0)
    assert found.rate <= rate + 1e-9
    assert bool(((found.joint > 0).sum(1) <= 1).all())  # an encoder, not a draw
    assert mutual_information_bits(found.joint) == pytest.approx(found.rate, abs=1e-9)
    expected = sorted(plain_bottleneck(p.tolist(), rate))
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
                 for parts in partitions(list(range(5)))]  # fmt: skip
        best = max(r for r in rates if r <= rate + 1e-12)
        gaps.append(best - greedy_bottleneck(p, rate=rate).rate)
    assert min(gaps) >= -1e-9
    assert sum(gaps) / len(gaps) < 0.25


@settings(max_examples=40, deadline=None)
@given(laws(2), laws(2), st.floats(0, 3))
def test_a_coupling_through_a_bottleneck(p, q, rate):
    joint = coupling_with_bottleneck(p, q, rate=rate)
    torch.testing.assert_close(joint.sum(1), p, atol=1e-9, rtol=0)
    torch.testing.assert_close(joint.sum(0), q, atol=1e-9, rtol=0)
    code = greedy_bottleneck(p, rate=rate)
    second = mutual_information_bits(greedy_coupling(code.joint.sum(0), q))
    assert mutual_information_bits(joint) >= second - 1e-9  # I(X;T) = H(T): the bound of the paper
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
        lambda: greedy_bottleneck(law, rate=1.0), lambda: coupling_with_bottleneck(good, law, rate=1.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="with sum 1"):
            call()
    with pytest.raises(OptionError, match="rate"):
        greedy_bottleneck(good, rate=-0.1)
