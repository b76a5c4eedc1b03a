"""Deferred steps on a device with streams: nothing is read too early, or forgotten too early."""

import gc
import time

import pytest
import torch

import testtime as tt
from elsewhere import DEVICE, There, elsewhere, send
from lanes import Stream, lanes
from models import batches, tiny
from testtime._core.registry import find
from testtime.adaptation.deferred import Lane, answers_last
from testtime.adaptation.kernels.bits import pack

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
