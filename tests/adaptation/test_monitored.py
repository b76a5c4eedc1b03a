"""Gates and guards in a service: batches of any size, answers that are no numbers, faults of their own."""

import math
import threading
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import alike
from elsewhere import There, elsewhere, send
from guards import Says, outcomes
from models import Deep, batches, tiny
from testtime._core.errors import InputError, OptionError, StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation.loan import lock_of
from testtime.adaptation.source_like import SourceLike
from testtime.guard.collapse import Collapse
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.monitor import Monitor
from testtime.guard.risk import Risk


class Failing(nn.Module):
    """A network that fails for the first sample of a batch, in its answer or inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.fault = tiny(), ""

    def forward(self, x: Tensor) -> Tensor:
        if self.fault == "inside":
            x = torch.cat([x[:1] * math.nan, x[1:]])
        logits = self.net(x)
        return torch.cat([logits[:1] * math.nan, logits[1:]]) if self.fault == "answer" else logits


def clean(count: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.rand(count, size, 3, 8, 8, generator=generator).unbind(0))


# --- answers that are no numbers --------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("fault", ["inside", "answer"])
def test_a_sample_without_an_answer_opens_the_gate_and_is_forgotten(fault, size):
    model, xs = Failing().eval(), clean(20, size)
    source = tt.fit_source(model, clean(20, 64), gate=True)
    adapter = tt.adapt(model, "tent", source=source, gate=True)
    assert set(outcomes(adapter, xs[4:])) == {Outcome.LIKE_SOURCE}
    model.fault = fault
    assert outcomes(adapter, xs[:1]) == [Outcome.NON_FINITE]
    model.fault = ""
    assert set(outcomes(adapter, [0.4 * x + 0.5 for x in xs])[8:]) == {Outcome.ADAPTED}
    assert outcomes(adapter, xs * 3)[-4:] == [Outcome.LIKE_SOURCE] * 4


class Shown:
    """A gate that keeps what it is shown, and never opens."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def update(self, values: Tensor) -> bool:
        self.values.append(values)
        return False

    def reset(self) -> None:
        self.values = []

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def test_a_gate_is_shown_the_answers_that_are_numbers():
    model, gate = Failing().eval(), Shown()
    adapter = tt.adapt(model, "bn-adapt", gate=gate)
    model.fault = "answer"
    assert outcomes(adapter, batches(1)) == [Outcome.ANSWERED]
    assert gate.values[0].shape == (15,)
    assert gate.values[0].isfinite().all()
    model.fault = ""
    got = outcomes(adapter, batches(4))
    assert got == [Outcome.ANSWERED] * 3 + [Outcome.LIKE_SOURCE]
    strict = tt.adapt(model, "tent", gate=Monitor(Risk(bound=0.9)))
    model.fault = "answer"
    outcomes(strict, batches(2))
    assert strict.counts.steps == 2


class Now(Says):
    """A guard whose word may be changed."""

    def update(self, adapted: Tensor, source: Tensor) -> bool | None:
        super().update(adapted, source)
        return self.words[0]


@pytest.mark.parametrize("word", [None, True])
def test_what_was_let_go_is_looked_at_again_once_a_guard_has_doubts(word):
    model, guard, xs = Failing().eval(), Now(False), batches(9, size=8)
    adapter = tt.adapt(model, "tent", lr=1e-2, guard=guard)
    while not adapter.snapshot().guard or adapter.snapshot().guard["left"] < 3:
        adapter(xs[0])
    model.fault, guard.words = "answer", (word,)  # neither model answers one of the samples
    adapter(xs[1])
    model.fault = ""
    assert torch.equal(adapter(xs[2]), model(xs[2]).detach())
    guard.words = (False,)
    adapter(xs[3])
    before = adapter.counts
    outcomes(adapter, xs[4:])  # trust has come back, so all are looked at
    assert adapter.counts.forwards - before.forwards == 2 * 5 * 8


# --- batches of any size, and states of before ------------------------------------------------


def test_a_large_batch_counts_as_many_small_ones_that_are_not_looked_at():
    adapter = tt.adapt(tiny("group"), "tent", guard=Says(False))
    large, small = batches(1, size=256)[0], batches(1, size=1)[0]
    outcomes(adapter, [large] * 2)
    while adapter.snapshot().guard["left"] < 100:  # 48 single samples are looked at
        adapter(small)
    looked = []
    for x in [large] * 3 + [small]:
        before = adapter.counts.forwards
        adapter(x)
        looked.append(adapter.counts.forwards - before == 2 * len(x))
    assert looked == [False, True, False, False]


def test_a_state_of_a_guard_that_tried_seldom_goes_on(tmp_path):
    """It waited for batches while it distrusted, and knew less."""
    xs = batches(8)
    one = tt.adapt(tiny(), "tent", guard=Says(True, False))
    one(xs[0])
    state = one.snapshot()
    known = {key: value for key, value in state.guard.items() if key not in ("trusted", "usual")}
    for old in (state, replace(state, guard={**known, "left": 9})):
        other = tt.adapt(tiny(), "tent", guard=Says(True, False))
        other.restore(old)
        other.save(tmp_path / "state")
        other.load(tmp_path / "state")
        assert outcomes(other, xs[1:6]) == [Outcome.TRUSTED] + [Outcome.ADAPTED] * 4
        assert other.counts.forwards == 2 * 5 * 16


def test_a_state_of_another_budget_is_refused_also_before_the_first_batch(tmp_path):
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.rand(8, 3, 8, 8)
    one = tt.adapt(model, "tent", budget=0.1)
    outcomes(one, [x] * 6)
    one.save(tmp_path / "state")
    other = tt.adapt(model, "tent", guard=Says(False, True))
    other.load(tmp_path / "state")
    with pytest.raises(StateError, match="the budget that it was made with"):
        other(x)
    other.reset()
    other(x)
    same = tt.adapt(model, "tent", budget=0.1)
    same.load(tmp_path / "state")
    same(x)


# --- faults of their own ----------------------------------------------------------------------


class Odd(Shown):
    """A gate and a guard that says what it was given to say, or raises it."""

    def __init__(self, word: object) -> None:
        self.word = word

    def update(self, *values: Tensor) -> object:
        if isinstance(self.word, Exception):
            raise self.word
        return self.word


BOTH = pytest.mark.parametrize("what", ["gate", "guard"])


@BOTH
@pytest.mark.parametrize("word", [torch.tensor([True, False]), torch.zeros(0), np.array([1, 0])])
def test_a_word_that_is_no_truth_value_is_refused(what, word):
    adapter = tt.adapt(tiny(), "tent", **{what: Odd(word)})
    with pytest.raises(OptionError, match=f"the {what}, a Odd, said .*one truth value"):
        adapter(batches(1)[0])
    assert adapter.counts.steps == 0


@BOTH
@pytest.mark.parametrize("word", [torch.tensor(True), torch.tensor([True]), np.bool_(True)])
def test_a_truth_value_of_any_kind_is_taken(what, word):
    adapter = tt.adapt(tiny(), "tent", **{what: Odd(word)})
    expected = Outcome.ADAPTED if what == "gate" else Outcome.GUARDED
    assert outcomes(adapter, batches(1)) == [expected]


@BOTH
def test_an_error_of_a_monitor_is_not_taken_for_the_models(what):
    adapter = tt.adapt(tiny(), "tent", **{what: Odd(False)})
    adapter(torch.rand(8, 3, 8, 8))
    monitor = adapter._gate if what == "gate" else adapter._guard
    monitor.word = KeyError("of mine")
    with pytest.raises(KeyError, match="of mine") as told:  # of a size that was not met before
        adapter(torch.rand(8, 3, 12, 12))
    assert told.value.__notes__ == [f"raised by the {what}, a Odd; the adapter is as it was"]
    with pytest.raises(InputError, match="could not take"):
        adapter(torch.rand(8, 7, 12, 12))


class Writes(Says):
    """Gives what it remembers itself, and writes to it."""

    def reset(self) -> None:
        self.all: dict = {"list": [], "tensor": torch.zeros(2), "deque": deque()}

    def update(self, adapted: Tensor, source: Tensor) -> bool:
        self.all["list"].append(1)
        self.all["deque"].append(1)
        self.all["tensor"] += 1
        return len(self.all["list"]) % 3 == 0

    def state_dict(self) -> dict:
        return self.all

    def load_state_dict(self, state: dict) -> None:
        self.all = state


class Counts(nn.Module):
    """A module as a guard: what it remembers are its buffers, which loading writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def update(self, adapted: Tensor, source: Tensor) -> bool:
        self.asked += 1
        return bool(self.asked % 3 == 0)

    def reset(self) -> None:
        self.asked.zero_()


@pytest.mark.parametrize("guard", [Writes, Counts])
def test_a_guard_that_writes_to_what_it_remembers_leaves_snapshots_alone(guard):
    adapter, xs = tt.adapt(tiny(), "tent", lr=1e-2, guard=guard()), batches(9)
    outcomes(adapter, xs[:2])
    mark = adapter.snapshot()
    for _ in range(2):
        later = [adapter(x) for x in xs[2:]]
        adapter.restore(mark)
        assert all(torch.equal(adapter(x), y) for x, y in zip(xs[2:], later, strict=True))
        adapter.restore(mark)


class Remembers(Says):
    """Remembers what it is given to remember."""

    def __init__(self, memory: object) -> None:
        super().__init__(False)
        self.memory = memory

    def state_dict(self) -> object:
        return self.memory

    def load_state_dict(self, state: object) -> None:
        self.memory = state


@pytest.mark.parametrize(
    "memory", [{"a": np.zeros(2)}, {1: 2}, {"a": deque()}, {"a": b""}, {"a": {"b": {1, 2}}}]
)
def test_what_no_file_can_hold_is_told_and_nothing_is_written(memory, tmp_path):
    adapter = tt.adapt(tiny(), "tent", guard=Remembers(memory))
    adapter(batches(1)[0])
    with pytest.raises(StateError, match=r"guard/memory.*state_dict of your gate or guard"):
        adapter.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_any_names_come_back_from_a_file(tmp_path):
    memory = {
        "count": np.int64(3), "mean": np.float32(0.5), "bad": np.bool_(True), "far": math.inf,
        "a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, "none": None,
    }  # fmt: skip
    adapter = tt.adapt(tiny(), "tent", guard=Remembers(memory))
    adapter(batches(1)[0])
    adapter.save(tmp_path / "state")
    adapter.load(tmp_path / "state")
    assert adapter._guard.memory == memory


def test_a_gate_that_is_given_to_two_models_watches_each():
    gate = SourceLike()
    source = [tt.fit_source(m, clean(8, 64), gate=True) for m in (tiny(), tiny("group"))]
    one = tt.adapt(tiny(), "tent", source=source[0], gate=gate)
    alone = tt.adapt(tiny(), "tent", source=source[0], gate=True)
    other = tt.adapt(tiny("group"), "tent", source=source[1], gate=gate)
    for x in clean(3, 16):
        for each in (one, alone, other):
            each(x)
    assert alike(one.snapshot().gate, alone.snapshot().gate)


@pytest.mark.parametrize("what", ["gate", "guard"])
def test_a_monitor_goes_on_from_a_file_on_another_device(what, tmp_path, monkeypatch):
    values = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    detector = Exchangeability.fit(values) if what == "gate" else Collapse(classes=5, block=8)
    xs = batches(4)
    with elsewhere(monkeypatch):
        one, other = (tt.adapt(send(tiny()), "tent", **{what: Monitor(detector)}) for _ in range(2))
        outcomes(one, [There(x) for x in xs[:2]])
        one.save(tmp_path / "state")
        other.load(tmp_path / "state")
        for x in xs[2:]:
            assert torch.equal(one(There(x)).held, other(There(x)).held)


# --- who looks on -----------------------------------------------------------------------------


def test_events_may_be_read_while_another_thread_calls():
    adapter, x, failed = tt.adapt(tiny(), "tent"), batches(1)[0], []
    adapter(x)
    going = iter(adapter.events)
    adapter(x)
    assert len(list(going)) == 1
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                sum(event.samples for event in adapter.events)
        except RuntimeError as error:
            failed.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    outcomes(adapter, [x] * 20)
    done.set()
    looking.join()
    assert not failed


def test_scores_of_pixels_are_kept_of_the_last_step_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)).eval()
    adapter = tt.adapt(net, "ostta")
    outcomes(adapter, [torch.rand(2, 3, 64, 64)] * 3)
    kept = [event.measured.get("outlier") for event in adapter.events]
    assert kept[:2] == [None, None]
    assert kept[2].shape == (2 * 64 * 64,)
    small = tt.adapt(tiny(), "ostta")
    outcomes(small, batches(3))
    assert all(event.measured["outlier"].shape == (16,) for event in small.events)


def test_a_model_of_parts_that_were_lent_waits_for_each_of_them():
    one, two = tiny(), tiny()
    parts = [lock_of(one), lock_of(two)]
    free: list[bool] = []

    def try_each() -> None:
        free.extend(lock.acquire(blocking=False) for lock in parts)

    with lock_of(nn.Sequential(one, nn.Identity(), two)):
        other = threading.Thread(target=try_each)
        other.start()
        other.join()
    assert free == [False, False]
    assert all(lock.acquire(blocking=False) for lock in parts)
