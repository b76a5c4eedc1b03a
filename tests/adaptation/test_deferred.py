"""Answers that leave before their update: the same to the last bit, and nobody sees it half done."""

import copy
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

import testtime as tt
from battery import ALL, adapter_of, alike, recipe_of, told
from models import batches, tiny
from testtime._core.errors import InputError, OptionError, StateError
from testtime.adaptation.deferred import Behind, answers_last
from testtime.adaptation.engine import Engine
from testtime.adaptation.events import Counts

WHY = {name: answers_last(recipe_of(name)) for name in ALL}
ANSWER_FIRST = [name for name, why in WHY.items() if why is None]
ANSWER_LAST = [name for name, why in WHY.items() if why is not None]
first = pytest.mark.parametrize("name", ANSWER_FIRST)


@pytest.fixture
def held(monkeypatch):
    """Updates wait for this to be set."""
    go = threading.Event()
    learn = Engine.learn

    def waiting(engine, evidence):
        assert go.wait(30)
        return learn(engine, evidence)

    monkeypatch.setattr(Engine, "learn", waiting)
    yield go
    go.set()


@first
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_a_deferred_run_is_the_same_to_the_last_bit(name, kind):
    if name == "bn-adapt" and kind == "group":
        kind = "frozen"  # it is not for networks without stored statistics
    model = tiny(kind)
    plain, deferred = adapter_of(name, tiny(kind)), adapter_of(name, model, deferred=True)
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for number, x in enumerate(batches(6)):
        assert torch.equal(plain(x), deferred(x))
        if number == 2:  # in the middle of a stream, an update pending
            assert torch.equal(plain.predict(x), deferred.predict(x))
    assert alike(vars(plain.snapshot()), vars(deferred.snapshot()))
    assert told(plain) == told(deferred)
    assert plain.counts == deferred.counts
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ANSWER_LAST)
def test_a_method_that_answers_last_says_why_it_cannot(name):
    with pytest.raises(OptionError, match="cannot: it"):
        adapter_of(name, deferred=True)


@pytest.mark.parametrize("options", [{"steps": 2}])
def test_options_that_make_a_method_answer_last_are_refused(options):
    with pytest.raises(OptionError, match="the last of 2 steps"):
        tt.adapt(tiny(), "tent", deferred=True, **options)
    with pytest.raises(OptionError, match="moving averages"):
        tt.adapt(tiny(), "bn-adapt", momentum=0.1, deferred=True)
    with pytest.raises(OptionError, match="deferred is 'yes'"):
        tt.adapt(tiny(), "tent", deferred="yes")


def test_the_answer_leaves_before_the_update_and_the_next_call_waits(held):
    adapter, xs = tt.adapt(tiny(), "tent", deferred=True), batches(2)
    adapter(xs[0])
    assert adapter._state.steps == 0
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(adapter, xs[1])
        time.sleep(0.05)
        assert not later.done()
        held.set()
        later.result(30)
    assert adapter.counts.updates == 2


WAITING = {
    "call": lambda adapter, x, path: adapter(x),
    "predict": lambda adapter, x, path: adapter.predict(x),
    "snapshot": lambda adapter, x, path: adapter.snapshot(),
    "restore": lambda adapter, x, path: adapter.restore(adapter._state),
    "save": lambda adapter, x, path: adapter.save(path),
    "reset": lambda adapter, x, path: adapter.reset(),
    "export": lambda adapter, x, path: adapter.export(),
    "plan": lambda adapter, x, path: adapter.plan(),
    "flush": lambda adapter, x, path: adapter.flush(),
}


@pytest.mark.parametrize("call", WAITING)
def test_whoever_comes_next_hears_of_an_error_once(call, monkeypatch, tmp_path):
    adapter, xs = tt.adapt(tiny(), "tent", deferred=True), batches(3)
    adapter(xs[0])
    mark = adapter.snapshot()
    with monkeypatch.context() as broken:
        broken.setattr(Engine, "gradient", lambda *_, **__: 1 / 0)
        assert adapter(xs[1]).shape == (16, 5)
        adapter._behind.settle()
    counts = adapter.counts
    with pytest.raises(ZeroDivisionError):
        WAITING[call](adapter, xs[2], tmp_path / "state")
    assert adapter.snapshot() is mark
    assert adapter.counts == counts == Counts(1, 16, 16, 16, 1)
    expected = tt.adapt(tiny(), "tent")
    expected(xs[0])
    assert torch.equal(adapter(xs[2]), expected(xs[2]))


@pytest.mark.parametrize("call", [name for name in WAITING if name != "call"])
def test_everything_waits_for_the_update(call, held, tmp_path):
    adapter, x = tt.adapt(tiny(), "tent", deferred=True), batches(1)[0]
    adapter(x)
    threading.Timer(0.05, held.set).start()
    WAITING[call](adapter, x, tmp_path / "state")
    assert held.is_set()
    assert adapter.counts.updates == 1
    assert adapter.snapshot().steps == (0 if call in ("reset", "restore") else 1)


@pytest.mark.parametrize("what", ["events", "counts"])
def test_what_is_told_is_never_half_a_step(what, held):
    adapter = tt.adapt(tiny(), "tent", deferred=True)
    adapter(batches(1)[0])
    threading.Timer(0.05, held.set).start()
    assert getattr(adapter, what)[0]


@first
def test_the_caller_may_write_to_his_batch_and_to_the_answer(name):
    plain, deferred = adapter_of(name), adapter_of(name, deferred=True)
    place = torch.empty(16, 3, 8, 8)
    for x in batches(4):
        expected = plain(x)
        answer = deferred(place.copy_(x))
        place.fill_(0.5)
        assert torch.equal(answer, expected)
        answer.fill_(torch.nan)
    assert alike(vars(plain.snapshot()), vars(deferred.snapshot()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("half", [False, True])
def test_the_modes_of_the_caller_go_with_the_update(mode, half):
    plain, deferred = tt.adapt(tiny(), "sar"), tt.adapt(tiny(), "sar", deferred=True)
    with mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for x in batches(3):
            assert torch.equal(plain(x + 0), deferred(x + 0))
        assert torch.is_autocast_cache_enabled()
    assert alike(vars(plain.snapshot()), vars(deferred.snapshot()))


def test_a_callback_runs_in_order_and_may_call_the_adapter():
    seen = []

    def watch(event):
        seen.append((event.step, adapter.counts.steps, adapter.snapshot().steps))
        if event.step == 2:
            adapter.reset()
        if event.step == 3:
            adapter.predict(x)
            adapter(x)

    adapter = tt.adapt(tiny(), "tent", deferred=True, on_event=watch)
    for x in batches(5):
        adapter(x)
    adapter.flush()
    assert seen == [(1, 1, 1), (2, 2, 2), (3, 3, 1), (4, 4, 2), (5, 5, 3), (6, 6, 4)]


def test_a_callback_that_raises_is_heard_by_the_next():
    adapter = tt.adapt(tiny(), "tent", deferred=True, on_event=lambda event: 1 / 0)
    adapter(batches(1)[0])
    with pytest.raises(ZeroDivisionError):
        adapter.flush()
    adapter.flush()
    assert adapter.counts.steps == 1


def test_a_batch_that_is_refused_is_heard_at_once():
    adapter = tt.adapt(tiny(), "tent", deferred=True)
    with pytest.raises(InputError, match="NaN"):
        adapter(torch.full((4, 3, 8, 8), torch.nan))
    adapter(batches(1)[0])
    with pytest.raises(InputError, match="could not take"):
        adapter(torch.rand(4, 7, 8, 8))
    assert adapter.counts.steps == 1


@pytest.mark.parametrize("name", ["tent", "sar", "cotta"])
def test_many_threads_may_call_one_adapter(name):
    adapter = adapter_of(name, deferred=True)
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(adapter, batches(24)))
    finally:
        sys.setswitchinterval(often)
    assert adapter.counts.steps == adapter.snapshot().steps == 24
    assert [event.step for event in adapter.events] == list(range(1, 25))


@first
def test_two_deferred_streams_share_a_model(name):
    model = tiny()
    one, two = (adapter_of(name, model, deferred=True) for _ in range(2))
    alone = adapter_of(name)
    for x, y in zip(batches(4), batches(4, seed=9), strict=True):
        two(y)
        assert torch.equal(one(x), alone(x))


SCRIPT = """
import os, sys, time, torch
import testtime as tt
from models import batches, tiny
from testtime.adaptation.engine import Engine
from testtime.adaptation.events import Counts
learn = Engine.learn
def slowly(engine, evidence):
    time.sleep(0.3)
    return learn(engine, evidence)
Engine.learn = slowly
adapter = tt.adapt(tiny(), "tent", deferred=True, on_event=lambda e: os.write(1, b"told %d\\n" % e.step))
"""


def script(text: str) -> str:
    paths = os.pathsep.join([*sys.path])
    done = subprocess.run(
        [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", SCRIPT + text], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_a_fork_and_the_end_of_the_interpreter_wait_for_the_update():
    text = """
import atexit
xs = batches(3)
adapter(xs[0])
child = os.fork()
adapter(xs[1])
answer = float(adapter(xs[2]).sum())
adapter.flush()
if child:
    os.waitpid(child, 0)
    atexit.register(lambda: adapter(xs[0]))  # when no thread can begin any more
    adapter(xs[0])
os.write(1, f"{child > 0} {answer.hex()}\\n".encode())
"""
    lines = script(text).splitlines()
    assert lines[0] == "told 1"
    assert [lines.count(f"told {step}") for step in range(1, 6)] == [1, 2, 2, 1, 1]
    assert lines[-2:] == ["told 4", "told 5"]
    answers = dict(line.split() for line in lines if not line.startswith("told"))
    assert answers["True"] == answers["False"]


def test_an_update_that_a_fork_cut_off_is_told():
    behind, go = Behind(), threading.Event()
    behind.ask(lambda give: (give(1), go.wait()))
    behind._forked()
    go.set()
    assert behind.busy
    with pytest.raises(StateError, match="flush"):
        behind.wait()
    assert behind.ask(lambda give: give(3)) == 3
    behind.wait()


def test_a_call_that_is_interrupted_teaches_nothing():
    go, told = threading.Event(), []
    behind = Behind()

    def job(give):
        assert go.wait(30)
        told.append(give(1))

    def interrupt(self, *_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Future, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            behind.ask(job)
    go.set()
    behind.wait()
    assert told == [False]
    adapter, xs = tt.adapt(tiny(), "tent", deferred=True), batches(3)
    adapter(xs[0])
    mark = adapter.snapshot()
    with pytest.MonkeyPatch.context() as patch:
        forward = Engine.run
        patch.setattr(Engine, "run", lambda *a, **k: (go.wait(30), forward(*a, **k))[1])
        go.clear()
        patch.setattr(Future, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            adapter(xs[1])
        go.set()
        adapter.flush()
    assert adapter.snapshot() is mark
    assert adapter.counts.steps == 1


def test_without_a_thread_the_update_runs_at_once(monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", none)
    plain, deferred = tt.adapt(tiny(), "tent"), tt.adapt(tiny(), "tent", deferred=True)
    assert all(torch.equal(plain(x), deferred(x)) for x in batches(3))
    monkeypatch.setattr(Engine, "gradient", lambda *_, **__: 1 / 0)
    deferred(batches(1)[0])
    with pytest.raises(ZeroDivisionError):
        deferred.flush()


def test_a_dropped_adapter_leaves_no_thread():
    before = set(threading.enumerate())  # those of earlier tests may end meanwhile
    adapter = tt.adapt(tiny(), "tent", deferred=True)
    adapter(batches(1)[0])
    (own,) = set(threading.enumerate()) - before
    del adapter
    own.join(30)
    assert not own.is_alive()


def test_an_update_is_waited_for_though_an_interrupt_fell_when_it_had_begun(monkeypatch):
    go, told, submit = threading.Event(), [], ThreadPoolExecutor.submit

    def job(give):
        assert go.wait(30)
        told.append(give(1))

    def submitted(pool, *args):
        submit(pool, *args)
        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
        raise KeyboardInterrupt

    behind = Behind()
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submitted)
    with pytest.raises(KeyboardInterrupt):
        behind.ask(job)
    assert behind.busy
    threading.Timer(0.1, go.set).start()
    behind.wait()
    assert told == [False]
    assert not behind.busy


def test_an_interrupt_before_an_update_begins_leaves_nobody_waiting(monkeypatch):
    def refused(pool, *args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    behind = Behind()
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    with pytest.raises(KeyboardInterrupt):
        behind.ask(lambda give: give(1))
    behind.wait()
    assert behind.ask(lambda give: give(2)) == 2
