"""Unknown classes in a stream: how many, where, what they look like, and what stays as it was."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from testtime._core.errors import InputError, OptionError
from testtime.streams.batches import Segment
from testtime.streams.data import load_data, stack
from testtime.streams.open_set import weave
from testtime.streams.scenarios import UNKNOWN, Scenario


def toy(n=60, classes=3, channels=1, size=(8, 8)):
    pixels = torch.rand(n, channels, *size, generator=torch.Generator().manual_seed(0))
    return TensorDataset(pixels, torch.arange(n) % classes)


def closed(n):
    return Segment(("fog",), 0, torch.arange(n), torch.zeros(n).long(), torch.arange(n) % 5)


@settings(max_examples=100, deadline=None)
@given(known=st.integers(1, 200), count=st.integers(1, 300), seed=st.integers(0, 9), data=st.data())
def test_any_stretch_has_its_share_of_unknown_samples(known, count, seed, data):
    chance = torch.Generator().manual_seed(seed)
    strangers = 1000 + torch.arange(count)
    mixed = weave(closed(known), strangers, generator=chance)
    strange = mixed.strange
    assert mixed.indices[~strange].tolist() == list(range(known))  # in the order they had
    assert mixed.indices[strange].sort().values.equal(strangers)
    start = data.draw(st.integers(0, known + count - 1))
    stop = data.draw(st.integers(start + 1, known + count))
    expected = (stop - start) * count / (known + count)
    assert abs(int(strange[start:stop].sum()) - expected) < 2
    previous = 0  # domain and severity are those of the known sample before
    for place in range(known + count):
        previous = previous if strange[place] else int(mixed.indices[place])
        assert int(mixed.severities[place]) == previous % 5


@pytest.mark.parametrize(
    ("share", "size", "expected"), [(0.5, 20, 10), (0.25, 20, 5), (0.8, 10, 8)]
)
def test_a_batch_holds_exactly_the_share_where_it_can(share, size, expected):
    scenario = Scenario(
        domains=("clean", "fog"), unknown=("noise",), unknown_share=share, batch_size=size
    )
    for batch in scenario.stream(toy(), seed=3):
        assert len(batch.labels) == size
        assert int((batch.labels == UNKNOWN).sum()) == expected


def test_unknown_samples_stand_at_random_places():
    scenario = Scenario(domains=("clean",), unknown=("noise",), batch_size=120)
    (one,), (other,) = (scenario.stream(toy(), seed=seed) for seed in (0, 1))
    assert not torch.equal(one.labels == UNKNOWN, other.labels == UNKNOWN)


def test_the_known_samples_are_those_of_the_stream_without_unknown_ones():
    scenario = Scenario(
        domains=("clean", "fog"), labels="dirichlet", distribution="inverse", ratio=4
    )
    alone = scenario.stream(toy(), seed=5).order()
    mixed = replace(scenario, unknown=("blobs",), unknown_share=0.3).stream(toy(), seed=5).order()
    assert [sample for sample in mixed if not sample.unknown] == alone


def test_kinds_come_in_equal_parts_and_are_not_repeated_before_their_time():
    scenario = Scenario(
        domains=("clean",), unknown=("blobs", "class:1", "noise"), unknown_share=0.6
    )
    strange = [sample.position for sample in scenario.stream(toy()).order() if sample.unknown]
    parts = Counter(min(position // 60, 2) if position >= 60 else 0 for position in strange)
    assert len(strange) == 60
    assert parts[0] == 20  # all of the twenty samples of class 1, once
    own = [position for position in strange if position < 60]
    assert sorted(own) == list(range(1, 60, 3))
    assert sum(position >= 100_060 for position in strange) == 20  # noise, behind the blobs


def test_held_out_classes_are_no_known_classes():
    scenario = Scenario(domains=("clean",), unknown=("class:0", "class:2"), unknown_share=0.5)
    data = toy()
    order = scenario.stream(data).order()
    assert {sample.position % 3 for sample in order if sample.unknown} == {0, 2}
    assert {sample.position % 3 for sample in order if not sample.unknown} == {1}
    for batch in scenario.stream(data):
        assert set(batch.labels.tolist()) == {1, UNKNOWN}
        assert torch.equal(batch.inputs, data.tensors[0][batch.indices])  # corruption is "clean"


def test_a_small_kind_is_sent_again_when_it_has_been_gone_through():
    scenario = Scenario(domains=("clean",), unknown=("class:0",), unknown_share=0.5)
    order = scenario.stream(toy()).order()
    times = Counter(sample.position for sample in order if sample.unknown)
    assert set(times.values()) == {2}
    assert len(times) == 20


@pytest.mark.parametrize("kind", ["blobs", "noise"])
@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (9, 17))])
def test_what_is_made_has_the_shape_of_the_images(kind, channels, size):
    scenario = Scenario(domains=("clean",), unknown=(kind,), batch_size=120)
    (batch,) = scenario.stream(toy(channels=channels, size=size), seed=2)
    made = batch.inputs[batch.labels == UNKNOWN]
    assert made.shape == (60, channels, *size)
    assert len(made.flatten(1).unique(dim=0)) == 60
    assert 0 <= float(made.min()) < float(made.max()) <= 1
    if kind == "blobs":
        assert made.unique().tolist() == [0, 1]
        assert made.mean((1, 2, 3)).sub(0.3).abs().max() < 0.02
        if channels == 3:
            assert torch.equal(made[:, 0], made[:, 2])
    else:
        assert float(made.std()) == pytest.approx(1 / math.sqrt(12), abs=0.02)


def test_digits_come_at_the_size_of_the_images():
    scenario = Scenario(domains=("clean",), unknown=("digits",), batch_size=200, samples=100)
    batch = next(iter(scenario.stream(load_data("fashion-mnist:sample"))))
    strange = batch.labels == UNKNOWN
    digits = load_data("digits").images
    places = batch.indices[strange] - 2000
    small = torch.nn.functional.interpolate(batch.inputs[strange], (8, 8), mode="area")
    truth, other = digits[places], digits[places.roll(1)]
    assert (small - truth).abs().mean() < 0.5 * (small - other).abs().mean()


def test_unknown_samples_are_corrupted_as_known_ones_are():
    scenario = Scenario(domains=("gaussian_noise",), unknown=("blobs",), batch_size=120)
    (batch,) = scenario.stream(toy())
    made = batch.inputs[batch.labels == UNKNOWN]
    assert len(made.unique()) > 1000  # no longer two values
    assert set(batch.domains) == {"gaussian_noise"}


def test_a_mixture_sends_unknown_samples_in_all_domains():
    scenario = Scenario(pattern="mixed", domains=("clean", "fog"), unknown=("blobs",))
    strange = [sample for sample in scenario.stream(toy()).order() if sample.unknown]
    assert set(Counter((s.domain, s.severity) for s in strange)) == {("clean", 0), ("fog", 5)}
    assert set(Counter(s.position for s in strange).values()) == {2}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 3), size=st.integers(1, 50), share=st.floats(0.1, 0.9))
def test_the_images_do_not_depend_on_the_batch_size(seed, size, share):
    scenario = Scenario(
        domains=("gaussian_noise",), unknown=("noise", "blobs"), unknown_share=share
    )
    first = torch.cat([b.inputs for b in scenario.stream(toy(), seed=seed)])
    other = replace(scenario, batch_size=size).stream(toy(), seed=seed)
    assert torch.equal(first, torch.cat([b.inputs for b in other]))


def test_a_class_that_is_not_there_cannot_be_held_out():
    with pytest.raises(OptionError, match=r"class:7 is no class of the data set; it has 0, 1, 2"):
        Scenario(unknown=("class:7",)).stream(toy())
    with pytest.raises(OptionError, match="every class"):
        Scenario(unknown=("class:0", "class:1", "class:2")).stream(toy())


def test_joined_data_sets_are_read_as_their_items_are():
    one, two = toy(6), toy(9, classes=5)
    joined = ConcatDataset([one, Subset(two, [8, 1, 2])])
    where = [7, 0, 8, 8, 5, 6]
    images, labels = stack(joined, where)
    for image, label, place in zip(images, labels, where, strict=True):
        assert torch.equal(image, joined[place][0])
        assert int(label) == int(joined[place][1])
    with pytest.raises(InputError, match="expected one shape"):
        stack(ConcatDataset([one, toy(3, size=(4, 4))]), [0, 7])
