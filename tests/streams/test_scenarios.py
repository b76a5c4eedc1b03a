"""The record: what it accepts, its text forms, and that any product of its choices streams."""

import itertools
import math
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from reference.samplers import long_tail
from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.streams.corruptions import CORRUPTIONS
from testtime.streams.order import DISTRIBUTIONS, ORDERS
from testtime.streams.plan import severity_ramp
from testtime.streams.scenarios import PATTERNS, PRESETS, Scenario, known_domains

NAMES = ("clean", "gaussian_noise", "shot_noise")


@st.composite
def scenarios(draw, domains=NAMES):
    pattern = draw(st.sampled_from(PATTERNS))
    most = 1 if pattern == "stationary" else 4
    return Scenario(
        pattern=pattern,
        labels=draw(st.sampled_from(ORDERS)),
        delta=draw(st.floats(0.01, 100)),
        distribution=draw(st.sampled_from(DISTRIBUTIONS)),
        ratio=draw(st.floats(1, 10)),
        domains=tuple(draw(st.lists(st.sampled_from(domains), min_size=1, max_size=most))),
        severity=draw(st.integers(1, 5)),
        batch_size=draw(st.integers(1, 50)),
        samples=draw(st.none() | st.integers(10, 40)),
        rounds=draw(st.integers(2 if pattern == "recurring" else 1, 3)),
        unknown=draw(st.sampled_from([(), (), ("blobs",), ("noise", "class:2")])),
        unknown_share=draw(st.floats(0.05, 0.8)),
    )


def toy(n=30, classes=3):
    pixels = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(pixels, torch.arange(n) % classes)


@settings(max_examples=80, deadline=None)
@given(scenario=scenarios(known_domains()))
def test_toml_round_trip(scenario):
    text = scenario.to_toml()
    assert Scenario.from_toml(text) == scenario
    assert Scenario.from_toml(text).to_toml() == text


@settings(max_examples=60, deadline=None)
@given(scenario=scenarios(), seed=st.integers(0, 5))
def test_any_product_sends_each_sample_as_often_as_it_should(scenario, seed):
    data = toy()
    stream = scenario.stream(data, seed=seed)
    batches, order = list(stream), stream.order()
    assert len(batches) == len(stream)
    sent = [pair for b in batches for pair in zip(b.indices.tolist(), b.domains, strict=True)]
    assert sent == [(sample.position, sample.domain) for sample in order]
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert [label == -1 for label in labels] == [sample.unknown for sample in order]
    known = [pair for pair, label in zip(sent, labels, strict=True) if label != -1]
    chosen = {position for position, _ in known}
    times = Counter(scenario.domains * scenario.rounds)
    assert Counter(known) == {(i, d): n for i in chosen for d, n in times.items()}
    if scenario.distribution == "natural":
        there = 20 if "class:2" in scenario.unknown else 30
        assert len(chosen) == min(scenario.samples or there, there)
    share = scenario.unknown_share if scenario.unknown else 0
    strangers = round(len(chosen) * share / (1 - share)) * sum(times.values())
    assert len(sent) - len(known) == strangers
    for batch in batches:
        assert batch.inputs.shape == (len(batch.labels), 1, 8, 8)
        assert len(batch.labels) <= scenario.batch_size
        mine = batch.labels != -1
        assert torch.equal(batch.labels[mine], data.tensors[1][batch.indices[mine]])
        assert scenario.pattern == "mixed" or len(set(batch.domains)) == 1
    for sample in order:
        assert 0 <= sample.severity <= scenario.severity
        assert (sample.severity == 0) == (sample.domain == "clean")


@settings(max_examples=25, deadline=None)
@given(scenario=scenarios(), seed=st.integers(0, 3), other=st.integers(1, 50))
def test_the_same_seed_sends_the_same_images_whatever_the_batch_size(scenario, seed, other):
    first = list(scenario.stream(toy(), seed=seed))
    second = list(scenario.stream(toy(), seed=seed))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.indices, b.indices)
        assert (a.domains, a.reset) == (b.domains, b.reset)
    resized = list(replace(scenario, batch_size=other).stream(toy(), seed=seed))
    assert torch.equal(torch.cat([b.inputs for b in first]), torch.cat([b.inputs for b in resized]))


def test_another_seed_sends_another_order_and_other_noise():
    scenario = Scenario(domains=("gaussian_noise",), batch_size=30)
    a, b = (next(iter(scenario.stream(toy(), seed=seed))) for seed in (0, 1))
    assert not torch.equal(a.indices, b.indices)
    noise = [x.inputs[x.indices.argsort()] - toy().tensors[0] for x in (a, b)]
    assert not torch.allclose(*noise, atol=0.05)


def test_noise_of_a_domain_does_not_depend_on_the_domains_before_it():
    alone = Scenario(domains=("shot_noise",), batch_size=30)
    after = Scenario(domains=("clean", "shot_noise"), batch_size=30)
    (only,) = alone.stream(toy(), seed=4)
    assert torch.equal(only.inputs, list(after.stream(toy(), seed=4))[1].inputs)


def grey_noise(text, *, seed=0):
    """What is sent when every image is the same grey one, so that only noise differs."""
    grey = TensorDataset(torch.full((256, 1, 4, 4), 0.5), torch.arange(256) % 3)
    return torch.cat([b.inputs for b in Scenario.parse(text).stream(grey, seed=seed)])


def test_noise_is_fresh_at_every_position_visit_and_seed():
    text = "recurring,domains=gaussian_noise,rounds=2,batch_size=100"
    sent = grey_noise(text)
    assert len(sent) == 512
    assert len(sent.flatten(1).unique(dim=0)) == 512
    both = torch.cat([sent, grey_noise(text, seed=1)])
    assert len(both.flatten(1).unique(dim=0)) == 1024


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_whole_type_are_sent_as_long(dtype):
    pixels, labels = toy().tensors
    (batch,) = Scenario(domains=("clean",), batch_size=30).stream(
        TensorDataset(pixels, labels.to(dtype))
    )
    assert batch.labels.dtype == torch.long
    assert torch.equal(batch.labels, labels[batch.indices])


def test_clean_images_are_untouched():
    (batch,) = Scenario(domains=("clean",), batch_size=30).stream(toy())
    assert torch.equal(batch.inputs, toy().tensors[0][batch.indices])


def test_reset_says_so_at_the_first_batch_of_each_domain():
    scenario = Scenario(pattern="reset", domains=NAMES, batch_size=20, rounds=2)
    assert [b.reset for b in scenario.stream(toy())] == [True, False] * 6
    for pattern in ("continual", "gradual", "mixed", "recurring"):
        other = replace(scenario, pattern=pattern)
        assert not any(b.reset for b in other.stream(toy()))


def test_domains_follow_one_another_and_the_last_small_batch_is_kept():
    scenario = Scenario(domains=NAMES, batch_size=20, rounds=2)
    batches = list(scenario.stream(toy()))
    assert [len(b.labels) for b in batches] == [20, 10] * 6
    runs = [name for name, _ in itertools.groupby(s.domain for s in scenario.stream(toy()).order())]
    assert tuple(runs) == NAMES * 2


def test_mixed_batches_hold_all_domains():
    scenario = Scenario(pattern="mixed", domains=NAMES, batch_size=45)
    for batch in scenario.stream(toy(60)):
        assert set(batch.domains) == set(NAMES)


@pytest.mark.parametrize("peak", [1, 2, 3, 5])
def test_severity_goes_up_and_down(peak):
    ramp = severity_ramp(360, peak=peak).tolist()
    runs = [(level, len(list(run))) for level, run in itertools.groupby(ramp)]
    assert [level for level, _ in runs] == [*range(1, peak), *range(peak, 0, -1)]
    assert max(n for _, n in runs) - min(n for _, n in runs) <= 1


def test_gradual_reaches_the_peak_in_every_domain_and_noise_follows():
    scenario = Scenario(pattern="gradual", domains=("gaussian_noise", "shot_noise"), batch_size=90)
    stream = scenario.stream(toy(90))
    severities = [sample.severity for sample in stream.order()]
    assert severities == [s for s in (1, 2, 3, 4, 5, 4, 3, 2, 1) for _ in range(10)] * 2
    for batch in stream:
        change = (batch.inputs - toy(90).tensors[0][batch.indices]).abs().mean(dim=(1, 2, 3))
        assert change[40:50].mean() > 1.5 * change[:10].mean()


def test_long_tails_are_exact_in_every_domain():
    for name, flip in (("long-tailed", 1), ("inverse", -1)):
        scenario = Scenario(distribution=name, ratio=10, domains=NAMES)
        stream = scenario.stream(toy(300, 5))
        for domain in NAMES:
            labels = [s.position % 5 for s in stream.order() if s.domain == domain]
            counts = torch.tensor(labels).bincount(minlength=5).tolist()
            assert counts == long_tail(60, 10, 5)[::flip]


def test_sorted_labels_inside_each_domain():
    for batch in Scenario(labels="sorted", domains=NAMES, batch_size=30).stream(toy()):
        assert (batch.labels.diff() >= 0).all()


def test_single_images():
    stream = Scenario.parse("single,domains=gaussian_noise+clean").stream(toy())
    assert len(stream) == 60
    assert {tuple(batch.inputs.shape) for batch in stream} == {(1, 1, 8, 8)}


def test_batches_larger_than_a_block():
    scenario = Scenario(domains=("gaussian_noise",), batch_size=300)
    large = list(scenario.stream(toy(700)))
    assert [len(b.labels) for b in large] == [300, 300, 100]
    small = list(replace(scenario, batch_size=7).stream(toy(700)))
    assert torch.equal(torch.cat([b.inputs for b in large]), torch.cat([b.inputs for b in small]))


def test_images_are_read_when_their_batch_comes():
    class Counting:
        labels, read = torch.arange(1000) % 10, 0

        def __len__(self):
            return 1000

        def __getitem__(self, index):
            self.read += 1
            return torch.full((3, 4, 5), index / 1000), int(self.labels[index])

    data = Counting()
    stream = Scenario(domains=("clean", "gaussian_noise"), batch_size=10).stream(data)
    stream.order()
    assert data.read <= 1
    batches = iter(stream)
    batch = next(batches)
    assert data.read <= 129
    assert torch.allclose(batch.inputs[:, 0, 0, 0], batch.indices / 1000)
    assert sum(1 for _ in batches) == 199


def test_the_data_set_and_the_global_generator_are_left_alone():
    data = toy()
    before, state = data.tensors[0].clone(), torch.random.get_rng_state()
    stream = Scenario(domains=NAMES, labels="dirichlet").stream(data)
    order = stream.order()
    for batch in stream:
        batch.inputs.zero_()
        batch.indices.zero_()
    assert stream.order() == order
    assert torch.equal(data.tensors[0], before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_defaults_are_the_fifteen_corruptions():
    assert Scenario().domains == CORRUPTIONS
    assert Scenario(pattern="stationary").domains == CORRUPTIONS[:1]
    assert Scenario.parse("") == Scenario()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_scenario(name):
    scenario = Scenario.parse(name)
    for option, value in PRESETS[name].items():
        assert getattr(scenario, option) == value
    assert len(scenario.stream(toy())) > 0


def test_parse_combines_presets_and_options():
    scenario = Scenario.parse(
        " recurring, dirichlet,long-tailed,delta=0.01, "
        "ratio=10,domains=fog+snow ,rounds=5,samples=9"
    )
    assert scenario == Scenario(
        pattern="recurring",
        labels="dirichlet",
        distribution="long-tailed",
        delta=0.01,
        ratio=10,
        domains=("fog", "snow"),
        rounds=5,
        samples=9,
    )
    assert Scenario.parse("rounds=5,recurring").rounds == 5
    assert Scenario.parse("recurring").rounds == 3
    listed = Scenario(domains=["fog"], unknown=["noise", "class:2"])
    assert listed == Scenario(domains=("fog",), unknown=("noise", "class:2"))
    assert len({listed}) == 1
    assert Scenario.parse("continual,labels=sorted,batch_size=16").labels == "sorted"


def test_a_preset_keeps_its_own_among_all():
    orders = [each.labels for each in Scenario.parse_all("all,dirichlet,samples=9")]
    assert (orders.count("shuffled"), orders.count("sorted")) == (1, 1)
    assert orders.count("dirichlet") == len(orders) - 2
    found = Scenario.parse_all("all,recurring,rounds=2")
    assert [each.pattern for each in found[: len(PATTERNS)]] == [*PATTERNS]
    assert {each.pattern for each in found[len(PATTERNS) :]} == {"recurring"}


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("recuring", UnknownName, "did you mean recurring"),
        ("pattern=mixt", UnknownName, "did you mean mixed"),
        ("labels=sort", UnknownName, "did you mean sorted"),
        ("distribution=long-tail", UnknownName, "did you mean long-tailed"),
        ("domains=fogg", UnknownName, "did you mean fog"),
        ("domains=fog+", UnknownName, "domain"),
        ("batchsize=4", OptionError, "did you mean batch_size"),
        ("batch_size=four", OptionError, "expected a whole number"),
        ("severity=3.5", OptionError, "expected a whole number"),
        ("dirichlet,delta=low", OptionError, "expected a number"),
        ("unknown=class:08", OptionError, "its label, as class:8"),
        ("unknown=class:99999999999999999999", OptionError, "its label"),
        ("batch_size=0", OptionError, "1 or more"),
        ("severity=6", OptionError, "from 1 to 5"),
        ("dirichlet,delta=0", OptionError, "delta is 0"),
        ("dirichlet,delta=nan", OptionError, "delta is nan"),
        ("inverse,ratio=0.5", OptionError, "ratio is 0.5"),
        ("samples=-3", OptionError, "samples is -3"),
        ("recurring,rounds=1", OptionError, "rounds is 2 or more"),
        ("stationary,domains=fog+snow", OptionError, "one domain"),
        ("mixed,continual", OptionError, "sets pattern twice"),
        ("rounds=2,rounds=3", OptionError, "sets rounds twice"),
        ("continual,delta=0.01", OptionError, "Add dirichlet"),
        ("balanced,ratio=3", OptionError, "ratio"),
        ("unknown=blob", UnknownName, "did you mean blobs"),
        ("unknown=class:x", OptionError, "its label, as class:8"),
        ("unknown=noise+noise", OptionError, "twice"),
        ("unknown_share=0.3", OptionError, "Add open-set"),
        ("open-set,unknown_share=1", OptionError, "unknown_share is 1"),
    ],
)
def test_a_text_that_is_no_scenario_says_why(text, error, words):
    with pytest.raises(error, match=words):
        Scenario.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": True},
        {"batch_size": 2.0},
        {"severity": "5"},
        {"delta": "0.1"},
        {"delta": math.inf},
        {"ratio": None},
        {"domains": "fog"},
        {"rounds": 0},
        {"samples": 0},
        {"unknown": "blobs"},
        {"unknown_share": 0},
    ],
)
def test_values_of_the_wrong_kind_are_refused(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Scenario(**options)


@pytest.mark.parametrize(
    ("text", "words"),
    [("pattern = ", "TOML"), ("colour = 3", "colour"), ("severity = 9", "severity is 9")],
)
def test_broken_toml_is_refused(text, words):
    with pytest.raises(OptionError, match=words):
        Scenario.from_toml(text)


def test_an_empty_or_unfit_data_set_is_refused_before_the_first_batch():
    with pytest.raises(InputError, match="is empty"):
        Scenario().stream(TensorDataset(torch.rand(0, 1, 8, 8), torch.arange(0)))
    with pytest.raises(InputError, match=r"expected \[0, 1\]"):
        Scenario().stream(TensorDataset(torch.rand(4, 1, 8, 8) + 1, torch.arange(4)))
    with pytest.raises(InputError, match="no sample to send"):
        Scenario.parse("long-tailed,samples=1").stream(toy())


def test_every_option_can_be_parsed():
    texts = {"pattern": "mixed", "labels": "sorted", "distribution": "inverse", "domains": "fog",
             "unknown": "noise+class:3", "unknown_share": "0.3"}  # fmt: skip
    prefixes = {"delta": "dirichlet,", "ratio": "inverse,", "unknown_share": "open-set,"}
    read = {"domains": ("fog",), "unknown": ("noise", "class:3"), "unknown_share": 0.3}
    for field in fields(Scenario):
        prefix = prefixes.get(field.name, "")
        scenario = Scenario.parse(f"{prefix}{field.name}={texts.get(field.name, '3')}")
        expected = read.get(field.name, texts.get(field.name, 3))
        assert getattr(scenario, field.name) == expected
