"""Answers without a graph, which is made behind them: the same to the last bit."""

import threading

import pytest
import torch
from torch import nn

import testtime as tt
from battery import ALL, adapter_of, alike, recipe_of, told
from models import batches, tiny, tiny_vit
from testtime.adaptation import shortcuts
from testtime.adaptation.deferred import Lane, answers_last
from testtime.adaptation.engine import Engine
from testtime.adaptation.kernels.replay import Recorded, Replayed
from testtime.adaptation.parts.prediction import from_teacher
from testtime.adaptation.shortcuts import TRIES, Sooner

ANSWER_FIRST = [n for n in ALL if answers_last(recipe_of(n)) is None]


@pytest.fixture
def twice(monkeypatch):
    """All forwards go twice where they may, everything is kept; how much the second ones took."""
    monkeypatch.setattr(Recorded.__init__, "__kwdefaults__", {"wide": 3, "dear": 1, "least": 1})
    monkeypatch.setattr(shortcuts, "WORTH", 1)
    monkeypatch.setattr(Sooner, "twice", True)
    taken = []
    out = Replayed.__exit__

    def leave(self, *error):
        taken.append(self.taken)
        return out(self, *error)

    monkeypatch.setattr(Replayed, "__exit__", leave)
    return taken


def compare(plain, deferred, xs):
    """Both go through the stream; their answers, states and all they tell are the same."""
    for x in xs:
        assert torch.equal(plain(x), deferred(x))
        deferred.flush()
    assert alike(vars(plain.snapshot()), vars(deferred.snapshot()))
    assert told(plain) == told(deferred)
    assert plain.counts == deferred.counts


@pytest.mark.parametrize("name", ANSWER_FIRST)
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_a_graph_made_behind_the_answer_changes_no_bit(name, kind, twice):
    if name == "bn-adapt" and kind == "group":
        kind = "frozen"
    deferred = adapter_of(name, tiny(kind), deferred=True)
    compare(adapter_of(name, tiny(kind)), deferred, batches(4))
    recipe = deferred.recipe
    waits = recipe.learns and recipe.procedure is None and recipe.prediction is not from_teacher
    assert bool(twice) == waits


BY_OTHERS = ("cotta", "petal", "psmt", "rmt", "stamp", "vcotta")
"""Methods whose answer takes views, or a teacher beside the student."""


@pytest.mark.parametrize("name", [n for n in ANSWER_FIRST if n not in BY_OTHERS])
def test_an_answer_waits_for_one_forward(name, monkeypatch):
    """And not for what the source model says, which only the update reads."""
    model, ran, at_answer = tiny(), [], []
    model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    give = Lane.give
    monkeypatch.setattr(Lane, "give", lambda *a: at_answer.append(sum(ran)) or give(*a))
    adapter = adapter_of(name, model, deferred=True)
    adapter(batches(1)[0])  # which also looks at the model
    adapter.flush()
    ran.clear(), at_answer.clear()
    adapter(batches(2)[1])
    adapter.flush()
    assert at_answer == [16]
    if name == "ostta":
        assert sum(ran) == 2 * 16


def test_what_learns_by_gradients_takes_what_is_known(twice):
    compare(tt.adapt(tiny(), "tent"), tt.adapt(tiny(), "tent", deferred=True), batches(3))
    assert len(twice) == 3
    assert all(twice)


def test_nor_does_it_in_a_transformer(twice):
    compare(tt.adapt(tiny_vit(), "tent"), tt.adapt(tiny_vit(), "tent", deferred=True), batches(3))
    assert len(twice) == 3
    assert all(twice)


def test_who_has_waited_for_an_update_gets_one_forward(twice, monkeypatch):
    learn, slow = Engine.learn, threading.Event()

    def waiting(engine, evidence):
        slow.wait(0.2)
        return learn(engine, evidence)

    monkeypatch.setattr(Engine, "learn", waiting)
    deferred = tt.adapt(tiny(), "tent", deferred=True)
    for x in batches(4):
        deferred(x)
    deferred.flush()
    assert len(twice) == 1


class Chance(nn.Module):
    """A model that answers otherwise each time."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("group")

    def forward(self, x):
        return nn.functional.dropout(self.inner(x), 0.3, training=True)


def test_a_model_that_answers_by_chance_is_asked_once(twice):
    adapter = tt.adapt(Chance(), "tent", deferred=True)
    for x in batches(3):
        adapter(x)
        adapter.flush()
    assert not twice


class Scaled(nn.Module):
    """Answers a sample of zeros with NaN."""

    def __init__(self):
        super().__init__()
        self.inner = tiny("group")

    def forward(self, x):
        size = x.flatten(1).sum(1, keepdim=True)
        return self.inner(x) * (size / size)


@pytest.mark.parametrize("where", [slice(None), 3])
def test_answers_of_nan_decide_nothing(where, twice):
    first, *more = batches(4)
    first[where] = 0
    deferred = tt.adapt(Scaled(), "tent", deferred=True)
    deferred(first)
    deferred.flush()
    assert not twice
    for x in more:
        deferred(x)
        deferred.flush()
    assert len(twice) == 3


class Added(nn.Module):
    """Writes to what its convolutions gave."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.first(x))
        out = self.second(x)
        out += x
        return self.head(nn.functional.relu(out, inplace=True).mean((2, 3)))


def test_what_was_written_to_is_computed_and_what_is_taken_may_be_written_to(twice):
    torch.manual_seed(0)
    model = Added().eval()
    xs = [torch.rand(6, 1, 8, 8) for _ in range(3)]
    compare(tt.adapt(model, "tent"), tt.adapt(model, "tent", deferred=True), xs)
    assert twice
    assert all(twice)


def measured(once: float, again: float, monkeypatch) -> Sooner:
    now = [0.0]
    monkeypatch.setattr(shortcuts.time, "perf_counter", lambda: now[0])
    sooner = Sooner(torch.device("cpu"))
    for _ in range(2 * TRIES):
        with sooner:
            now[0] += again if sooner.twice else once
    return sooner


def test_a_graph_is_made_behind_only_where_the_answer_would_wait_for_it(monkeypatch):
    assert measured(1.06, 1.0, monkeypatch).twice
    assert not measured(1.04, 1.0, monkeypatch).twice
    assert not measured(1.0, 6.0, monkeypatch).twice


def test_what_a_device_has_still_to_do_is_measured_and_then_not_waited_for(monkeypatch):
    now, left, waits = [0.0], [5.0], []

    def wait(device):
        waits.append(device.type)
        now[0], left[0] = now[0] + left[0], 0.0

    monkeypatch.setattr(shortcuts.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(shortcuts, "wait_for", wait)
    sooner = Sooner(torch.device("cuda"))
    for number in range(2 * TRIES + 4):
        with sooner:  # the host calls at once, and the device takes its time
            left[0] += 1.0 if sooner.twice else 3.0
        assert len(waits) == 2 * min(number + 1, 2 * TRIES)
    assert sooner.once == [3.0] * TRIES
    assert sooner.again == [1.0] * TRIES


def test_a_forward_that_failed_is_not_measured():
    sooner = Sooner(torch.device("cpu"))
    with pytest.raises(RuntimeError), sooner:
        raise RuntimeError
    assert not sooner.once


class Text(nn.Module):
    """torch's own transformer, whose attention takes a short cut where nothing asks for a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize("name", ["tent", "lerm", "ostta"])
def test_what_rounds_otherwise_without_a_graph_is_answered_with_one(name, twice):
    model, xs = Text().eval(), list(torch.rand(4, 16, 6, 16))
    compare(tt.adapt(model, name), tt.adapt(model, name, deferred=True), xs)
    assert not twice
