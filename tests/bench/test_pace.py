"""A stream that does not wait, with fixed seconds."""

from statistics import fmean, median
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import testtime as tt
from rows import make
from testtime.bench import trial
from testtime.bench.cells import Cell, plan
from testtime.bench.metrics import ranked
from testtime.bench.models import load_model
from testtime.bench.pace import schedule
from testtime.bench.runner import run
from testtime.bench.tables import styles, summary
from testtime.bench.trial import paced
from testtime.streams.data import load_data
from testtime.streams.scenarios import Scenario

STREAM = Scenario(domains=("contrast", "fog"), batch_size=20, samples=160)


@settings(deadline=None, max_examples=50)
@given(st.floats(0.5, 9), st.integers(1, 60))
def test_a_method_learns_as_often_as_its_time_allows(ratio, batches):
    learns = schedule(batches, pace=0.25, seconds=0.25 * ratio)
    assert learns[0]
    possible = batches if ratio <= 1 else batches / ratio
    assert possible - 1 <= sum(learns) <= possible + 2
    if ratio >= 1:  # no time is spent twice, and none is wasted while a batch waits
        free, late = 0.0, 0.0
        for number, learnt in enumerate(learns):
            assert learnt == (free <= (number + 1) * (1 + 1e-9))
            if learnt:
                late = max(late, free - number)
                free = max(free, float(number)) + ratio
        assert late <= 1 + 1e-6


def test_single_slow_batches_cost_those_that_follow():
    assert schedule(6, pace=1, seconds=[1, 3.5, 1, 1, 1, 1]) == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert schedule(0, pace=1, seconds=1.0) == []


def test_updates_that_come_now_and_then_are_counted(monkeypatch):
    """Their batches take longer than the middle one."""
    asked, clock = [], iter(n**2 for n in range(1000))  # batches of 1, 9, 17 ... seconds
    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(trial, "paced", lambda *_, **times: asked.append(times) or {})
    monkeypatch.setattr(trial, "CLEAN_SAMPLES", 50)
    trial.run_cell(cell("tent"))
    batches = [8.0 * n + 1 for n in range(16)]
    assert asked == [{"pace": median(b + 4 for b in batches), "seconds": fmean(batches[1:])}]


def cell(method: str) -> Cell:
    return plan(methods=[method], models=["embedded:batch"], data="fashion-mnist:sample",
                streams=[STREAM], seeds=1, paced=True)[-1]  # fmt: skip


def test_late_batches_are_answered_with_the_state_there_is():
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    got = paced(cell("tent"), STREAM.stream(data, seed=0), tt.adapt(model, "tent"),
                torch.device("cpu"), pace=0.1, seconds=0.3)  # fmt: skip
    adapter, wrong, learnt = tt.adapt(model, "tent"), {}, {}
    for number, batch in enumerate(STREAM.stream(data, seed=0)):
        learns = schedule(16, pace=0.1, seconds=0.3)[number]
        logits = adapter(batch.inputs) if learns else adapter.predict(batch.inputs)
        name = batch.domains[0]
        wrong[name] = wrong.get(name, 0) + int((logits.argmax(1) != batch.labels).sum())
        learnt[name] = learnt.get(name, 0) + learns
    for name in STREAM.domains:
        assert got[name]["paced_error"] == pytest.approx(100 * wrong[name] / 160)
        assert got[name]["paced_share"] == learnt[name] / 8
    assert adapter.counts.updates == 6


def test_rows_hold_both_scores(tmp_path, monkeypatch):
    monkeypatch.setattr("testtime.bench.trial.CLEAN_SAMPLES", 50)
    stream = Scenario(domains=("contrast",), batch_size=20, samples=60)
    cells = plan(methods=["bn-adapt"], models=["embedded:batch"], data="fashion-mnist:sample",
                 streams=[stream], seeds=1, paced=True)  # fmt: skip
    source, adapted = run(cells, tmp_path, jobs=0)
    assert source["paced_error"] == source["error"]
    assert source["paced_share"] == 1
    assert adapted["paced_error"] == adapted["error"]  # it keeps nothing that it could miss
    assert 0 < adapted["paced_share"] <= 1
    plain = plan(methods=["bn-adapt"], models=["embedded:batch"], data="fashion-mnist:sample",
                 streams=[stream], seeds=1)  # fmt: skip
    assert {c.key for c in plain}.isdisjoint({c.key for c in cells})
    assert run(plain, tmp_path, jobs=0)[0]["paced_error"] is None


def test_tables_show_them_where_they_are():
    look = styles(["source", "tent"])
    shown = summary(ranked(make())[0], look)
    assert 'data-key="paced_error"' in shown
    assert "pace of plain inference" in shown
    hidden = summary(ranked(make(paced_error=None, paced_share=None))[0], look)
    assert "paced" not in hidden
