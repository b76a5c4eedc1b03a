"""Deferred steps on a device with streams: nothing is read too early, or forgotten too early."""

import gc
import itertools
import time

import pytest
import torch

import testtime as tt
from elsewhere import DEVICE, There, elsewhere, send
from lanes import Stream, lanes
from models import batches, tiny
from testtime._core.registry import find
from testtime.adaptation import budget, shortcuts
from testtime.adaptation.deferred import Lane, answers_last
from testtime.adaptation.kernels.bits import pack
from testtime.adaptation.kernels.replay import Recorded, Replayed

FIRST = [
    n for n in sorted(set(tt.methods()) - {"foa"}) if not answers_last(find("method", n).build())
]
SMALL = {name: {"views": 2} for name in ("cotta", "petal", "psmt")}


def stream_of_calls(method, told, monkeypatch, tmp_path, **more):
    """A stream with all that one may do between two batches."""
    model, xs = send(tiny()), batches(7)
    pairs = [(There(x), There(torch.arange(16) % 5)) for x in xs[:2]]
    source = tt.fit_source(model, pairs, methods=[method]) if tt.methods()[method].needs else None
    adapter = tt.adapt(model, method, source=source, deferred=True, **SMALL.get(method, {}), **more)
    for number, x in enumerate(xs):
        mine = There(x.clone())
        answer = adapter(mine)
        mine.mul_(2)  # it is the caller's again
        _ = answer + 1
        if number == 1:
            adapter.predict(There(x))
            mark = adapter.snapshot()
        if number == 2:
            adapter.restore(mark)
            adapter.save(tmp_path / "state")
        if number == 3:
            adapter.load(tmp_path / "state")
        if number == 4:
            adapter.reset()
        _ = adapter.counts  # the update is over for the host; of the device nobody knows
        gc.collect()
        time.sleep(0.001)  # its thread lets go of what it held
        _ = torch.zeros(3, device=DEVICE)
    adapter.export()
    adapter.flush()
    return told.faults


@pytest.mark.parametrize(
    "method",
    [
        name if name in ("tent", "sar") else pytest.param(name, marks=pytest.mark.slow)
        for name in FIRST
    ],
)
def test_a_deferred_stream_has_no_races(method, tmp_path, monkeypatch):
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        assert stream_of_calls(method, told, monkeypatch, tmp_path) == []


@pytest.mark.parametrize("more", [{"gate": True}, {"guard": True}, {"every": 2}])
def test_nor_has_one_with_a_monitor(more, tmp_path, monkeypatch):
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        assert stream_of_calls("tent", told, monkeypatch, tmp_path, **more) == []


@pytest.fixture
def behind(monkeypatch):
    """Every answer that may comes without a graph; what the forwards behind them took, not computed."""
    monkeypatch.setattr(Recorded.__init__, "__kwdefaults__", {"wide": 3, "dear": 1, "least": 1})
    monkeypatch.setattr(shortcuts, "WORTH", 1)
    monkeypatch.setattr(shortcuts.Sooner, "twice", True)
    taken, out = [], Replayed.__exit__

    def leave(self, *error):
        taken.append(self.taken)
        return out(self, *error)

    monkeypatch.setattr(Replayed, "__exit__", leave)
    return taken


@pytest.mark.parametrize("method", ["tent", "eta"])
def test_nor_has_one_whose_graphs_are_made_behind_the_answers(
    method, behind, tmp_path, monkeypatch
):
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        assert stream_of_calls(method, told, monkeypatch, tmp_path) == []
    assert behind
    assert all(behind)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_a_graph_behind_the_answer_changes_no_bit_there(kind, behind, monkeypatch):
    with elsewhere(monkeypatch), lanes(monkeypatch):
        model = send(tiny(kind))
        deferred, plain = (tt.adapt(model, "tent", deferred=later) for later in (True, False))
        for x in map(There, batches(4)):
            answer = deferred(x)
            deferred.flush()
            assert torch.equal(answer.held, plain(x).held)
        ours, theirs = (adapter.snapshot().tensors for adapter in (deferred, plain))
        assert all(torch.equal(ours[name].held, theirs[name].held) for name in ours)
    assert len(behind) == 4


def test_nor_has_one_under_a_budget(monkeypatch):
    """Batches that are only answered, that all learn from, and of which a part teaches."""
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        monkeypatch.setattr(budget, "clock", itertools.count(0.0).__next__)
        monkeypatch.setattr(budget, "CHEAPER", 9.0)
        adapter = tt.adapt(send(tiny("group")), "eta", deferred=True, budget=0.7)
        for x in batches(10):
            mine = There(x.clone())
            answer = adapter(mine)
            mine.mul_(2)
            _ = answer + 1
            _ = adapter.counts
            gc.collect()
            time.sleep(0.001)
            _ = torch.zeros(3, device=DEVICE)
        adapter.flush()
        account = adapter.snapshot().account
        assert 0 < account["parts"] < account["updates"] < account["batches"]
        assert told.faults == []


@pytest.mark.parametrize("without", ["join", "leave", "take", "mark"])
def test_every_part_of_a_lane_is_needed(without, tmp_path, monkeypatch):
    taking = Lane.take

    def unmarked(lane, x, state):
        lane.own = state
        return taking(lane, x, state)

    spoilt = {
        "join": lambda lane: None,
        "leave": lambda lane, theirs, ready: theirs,
        "take": lambda lane, x, state: x,
        "mark": unmarked,
    }
    monkeypatch.setattr(Lane, "take" if without == "mark" else without, spoilt[without])
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        assert stream_of_calls("tent", told, monkeypatch, tmp_path)


def test_what_a_step_tells_is_read_once_it_is_there(monkeypatch):
    """Its numbers stay on the device: whoever looks waits for the lane, a callback in its thread too."""
    told_of = []
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        model = send(tiny())
        heard = tt.adapt(
            model, "eta", deferred=True, on_event=lambda e: told_of.append((e.entropy, e.loss))
        )
        asked = tt.adapt(model, "eta", deferred=True)
        for x in batches(3):
            heard(There(x))
            asked(There(x))
            last = asked.events[-1]
            assert last.entropy == pytest.approx(float(last.measured["entropy"].held))
            heard.flush()
        assert told.faults == []
    assert len(told_of) == 3


def test_a_lane_outlives_a_reset(monkeypatch):
    """A device caches memory for each stream, so one for each reset would hold it many times over."""
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        adapter = tt.adapt(send(tiny()), "tent", deferred=True)
        before = adapter._lane.stream
        for x in batches(4):
            adapter(There(x))
            adapter.reset()
        assert adapter._lane.stream is before
        adapter.flush()
        assert told.faults == []


def test_the_callers_stream_waits_for_an_answer_and_not_for_the_update_behind_it(monkeypatch):
    """So the next batch is copied meanwhile."""
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        adapter = tt.adapt(send(tiny()), "tent", deferred=True)
        for x in batches(3):
            adapter(There(x))
            assert adapter.counts.updates  # once the host has called all of the update
            lane, here = adapter._lane.stream, told.current()
            assert 0 < here.seen[lane] < lane.done
            adapter.flush()
            assert here.seen[lane] == lane.done


def test_two_streams_share_no_room_for_bits(monkeypatch):
    """A thread that computes backwards does so for all adapters, each in its own stream."""
    with elsewhere(monkeypatch), lanes(monkeypatch) as told:
        for lane in (Stream(), Stream()):
            with told.stream(lane):
                pack(torch.ones(4, device=DEVICE))
        assert told.faults == []


def test_an_output_may_hold_what_lies_on_the_cpu(monkeypatch):
    with elsewhere(monkeypatch), lanes(monkeypatch):
        adapter = tt.adapt(Counting(), "tent", deferred=True)
        answer, count = adapter(There(batches(1)[0]))
        assert answer.device == DEVICE
        assert count.device.type == "cpu"


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = send(tiny())

    def forward(self, x):
        return self.net(x), torch.tensor(len(x))
