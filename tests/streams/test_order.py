"""Counts of classes and orders of labels, against the published algorithms in numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reference.samplers import long_tail, rotta_draw, rotta_sequence, window_entropy
from testtime._core.errors import InputError
from testtime._core.seeds import generator
from testtime.streams.order import (
    arrange,
    choose,
    class_counts,
    dirichlet,
    dirichlet_order,
    slotted,
)

LABELS = torch.arange(10).repeat_interleave(200)


@pytest.mark.parametrize("ratio", [1, 2, 5, 10, 25, 50, 100, 200])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_long_tailed_counts_are_the_published_ones(ratio, classes):
    available = torch.full((classes,), 200)
    counts = class_counts(available, distribution="long-tailed", ratio=ratio)
    assert counts.tolist() == long_tail(200, ratio, classes)
    assert counts[0] == 200
    assert counts[-1] == 200 // ratio
    inverse = class_counts(available, distribution="inverse", ratio=ratio)
    assert inverse.tolist() == counts.tolist()[::-1]


@settings(max_examples=60, deadline=None)
@given(
    available=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    ratio=st.floats(1, 300),
    samples=st.none() | st.integers(1, 2000),
    distribution=st.sampled_from(["balanced", "long-tailed", "inverse"]),
)
def test_counts_stay_within_what_there_is(available, ratio, samples, distribution):
    available = torch.tensor(available)
    try:
        counts = class_counts(available, distribution=distribution, ratio=ratio, samples=samples)
    except InputError:
        assert distribution != "balanced" or samples is not None
        return
    assert (counts >= 0).all()
    assert (counts <= available).all()
    assert samples is None or counts.sum() <= samples
    steps = counts.diff()
    assert (steps == 0).all() or distribution != "balanced"
    assert (steps <= 0).all() or distribution == "inverse"
    if samples is None and distribution == "balanced":
        assert (counts == available.min()).all()


def test_a_single_class_has_no_tail():
    counts = class_counts(torch.tensor([7]), distribution="long-tailed", ratio=50)
    assert counts.tolist() == [7]


def test_the_last_class_is_not_lost_to_rounding():
    # 49 * 49 ** -1.0 is 0.9999999999999999
    counts = class_counts(torch.tensor([49, 49]), distribution="long-tailed", ratio=49)
    assert counts.tolist() == [49, 1]


def test_too_few_samples_for_a_tail_are_refused():
    with pytest.raises(InputError, match="no sample to send: samples=1"):
        class_counts(torch.tensor([9, 9, 9]), distribution="long-tailed", ratio=2, samples=1)


def test_choice_is_without_replacement_and_follows_the_counts():
    options = {"ratio": 20.0, "samples": None, "generator": generator(0, "t")}
    chosen = choose(LABELS, distribution="inverse", **options)
    assert len(chosen.unique()) == len(chosen)
    assert LABELS[chosen].bincount().tolist() == long_tail(200, 20, 10)[::-1]


def test_a_natural_choice_takes_all_or_the_limit():
    options = {"distribution": "natural", "ratio": 50.0}
    everything = choose(LABELS, samples=None, generator=generator(0), **options)
    assert everything.tolist() == list(range(2000))
    some = choose(LABELS, samples=300, generator=generator(0), **options)
    assert len(some.unique()) == 300
    assert len(choose(LABELS, samples=9999, generator=generator(0), **options)) == 2000


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    order=st.sampled_from(["shuffled", "dirichlet", "sorted"]),
    delta=st.sampled_from([1e-6, 0.01, 0.1, 1.0, 100.0, 1e6]),
    seed=st.integers(0, 1000),
)
def test_every_order_is_a_permutation(labels, order, delta, seed):
    labels = torch.tensor(labels)
    sent = arrange(labels, order=order, delta=delta, generator=generator(seed))
    assert sent.sort().values.tolist() == list(range(len(labels)))
    again = arrange(labels, order=order, delta=delta, generator=generator(seed))
    assert torch.equal(sent, again)
    if order == "sorted":
        assert (labels[sent].diff() >= 0).all()


def test_sorted_shuffles_within_a_class():
    sent = arrange(LABELS, order="sorted", delta=1, generator=generator(0))
    assert torch.equal(LABELS[sent], LABELS)
    assert not torch.equal(sent, torch.arange(2000))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=60),
    slots=st.integers(1, 7),
    delta=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_slots_equal_the_reference_on_the_same_draws(labels, slots, delta, seed):
    labels, rng = np.array(labels), np.random.default_rng(seed)
    classes = len(np.unique(labels))
    shares = rng.dirichlet([delta] * slots, classes)
    turns = np.stack([rng.permutation(classes) for _ in range(slots)])
    ours = slotted(*map(torch.from_numpy, (labels, shares, turns)))
    assert ours.tolist() == rotta_sequence(labels, shares, turns).tolist()


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 100.0])
def test_dirichlet_draws_have_the_right_marginals(delta):
    draws = dirichlet(2000, 10, delta=delta, generator=generator(0, delta))
    assert torch.allclose(draws.sum(1), torch.ones(2000, dtype=torch.float64))
    variance = 0.1 * 0.9 / (10 * delta + 1)
    assert float(draws[:, 3].var()) == pytest.approx(variance, rel=0.15)
    assert stats.kstest(draws[:, 7].numpy(), stats.beta(delta, 9 * delta).cdf).pvalue > 1e-3


def test_dirichlet_is_finite_where_gamma_variates_underflow():
    draws = dirichlet(500, 5, delta=1e-6, generator=generator(0))
    assert draws.isfinite().all()
    assert draws.max(dim=1).values.min() > 0.999


@pytest.mark.parametrize(
    ("delta", "low", "high"), [(0.01, 0, 0.6), (0.1, 0.3, 1.3), (1.0, 1.2, 2.1), (100.0, 2.2, 2.31)]
)
def test_correlation_of_labels_is_that_of_the_reference(delta, low, high):
    rng, labels = np.random.default_rng(0), LABELS.numpy()
    theirs = [window_entropy(labels[rotta_draw(labels, delta, rng)], 200) for _ in range(60)]
    ours = [
        window_entropy(labels[dirichlet_order(LABELS, delta=delta, generator=generator(s))], 200)
        for s in range(60)
    ]
    error = math.sqrt((np.var(ours) + np.var(theirs)) / 60)
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error
    assert low < np.mean(ours) < high


@pytest.mark.parametrize(
    ("delta", "alike"), [(0.01, 0.99), (0.1, 0.976), (1.0, 0.952), (100, 0.951)]
)
def test_neighbours_are_alike_as_often_as_the_record_says(delta, alike):
    sent = [LABELS[arrange(LABELS, order="dirichlet", delta=delta, generator=generator(s))]
            for s in range(20)]  # fmt: skip
    share = torch.stack([(labels[1:] == labels[:-1]).double().mean() for labels in sent])
    assert share.mean().item() == pytest.approx(alike, abs=0.003)


def test_correlation_falls_as_delta_rises():
    def information(labels):  # of a label about the next one, in nats
        joint = torch.zeros(10, 10, dtype=torch.float64)
        joint.index_put_((labels[:-1], labels[1:]), torch.tensor(1.0).double(), accumulate=True)
        joint = joint / joint.sum()
        alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return torch.special.xlogy(joint, joint / alone.clamp(min=1e-12)).sum().item()

    options = {"generator": generator(0, "information")}
    orders = [("sorted", 1), *(("dirichlet", d) for d in (0.01, 0.1, 1)), ("shuffled", 1)]
    found = [information(LABELS[arrange(LABELS, order=o, delta=d, **options)]) for o, d in orders]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2.25
    assert found[-1] < 0.05


def test_more_than_a_hundred_classes_share_a_hundred_slots():
    labels = torch.arange(150).repeat(4)
    sent = dirichlet_order(labels, delta=0.1, generator=generator(0))
    assert sent.sort().values.tolist() == list(range(600))
