"""Runs that are interrupted, damaged or asked for again."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from testtime._core.errors import RunError, UnknownName
from testtime.bench.metrics import score, summarise
from testtime.bench.models import load_model
from testtime.bench.runner import plan, run
from testtime.bench.store import piece, read_run
from testtime.streams.scenarios import Scenario

TIMES = ("seconds_per_batch", "peak_memory_mb")


def cells(methods=("tent",), seeds=1):
    stream = Scenario(domains=("fog", "contrast"), batch_size=20, samples=40)
    return plan(
        methods=list(methods), models=["embedded:batch"], data="fashion-mnist:sample",
        streams=[stream], seeds=seeds,
    )  # fmt: skip


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.fixture(autouse=True)
def few_clean_images(monkeypatch):
    from testtime.bench import runner

    whole = runner.clean
    monkeypatch.setattr(runner, "clean", lambda d, y: whole(d, y, limit=50))


def test_rows_are_complete_and_the_source_is_always_there(tmp_path):
    rows = run(cells(["tent", "eata"]), tmp_path)
    assert [(r["method"], r["domain"]) for r in rows] == [
        (m, d) for m in ("source", "tent", "eata") for d in ("fog", "contrast")
    ]
    tent = rows[2]
    assert tent["samples"] == 40
    assert [t["batch"] for t in tent["trace"]] == [0, 1]
    assert tent["forwards_per_sample"] == tent["backwards_per_sample"] == 1
    assert sum(b["count"] for b in tent["reliability"]) == 40
    mean = sum(t["error"] * t["samples"] for t in tent["trace"]) / 40
    assert tent["error"] == pytest.approx(mean)


def test_a_run_repeats_and_resumes(tmp_path):
    first = run(cells(), tmp_path / "a")
    assert without_times(run(cells(), tmp_path / "b")) == without_times(first)
    started = []
    again = run(cells(), tmp_path / "a", on_start=lambda cell, n: started.append(cell))
    assert again == first == read_run(tmp_path / "a")
    assert started == []
    run(cells(["tent", "bn-adapt"]), tmp_path / "a", on_start=lambda cell, n: started.append(cell))
    assert [cell.method for cell in started] == ["bn-adapt"]


def test_a_damaged_piece_is_made_again(tmp_path):
    first = run(cells(), tmp_path)
    path = piece(tmp_path, cells()[1].key)
    path.write_bytes(path.read_bytes()[:100])
    (path.parent / ".left.part").write_bytes(b"half")
    with pytest.raises(RunError, match="1 of 2 cells"):
        read_run(tmp_path)
    assert without_times(run(cells(), tmp_path)) == without_times(first)
    assert len(read_run(tmp_path)) == 4


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        read_run(tmp_path)


SCRIPT = """
import sys
from testtime.bench.runner import plan, run
from testtime.streams.scenarios import Scenario
stream = Scenario(domains=("fog", "contrast"), batch_size=20, samples=200)
run(plan(methods=["tent", "bn-adapt", "eta"], models=["embedded:batch"],
    data="fashion-mnist:sample", streams=[stream], seeds=1), sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    command = [sys.executable, "-c", SCRIPT]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    killed = tmp_path / "killed"
    for wanted in (1, 2):
        process = subprocess.Popen([*command, str(killed)])
        limit = time.monotonic() + 120
        while time.monotonic() < limit and len(list(killed.glob("cells/*.parquet"))) < wanted:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(RunError, match="half-written"):
            read_run(killed)
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("cells/*.parquet")}
    subprocess.run([*command, str(killed)], check=True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert without_times(read_run(killed)) == without_times(read_run(tmp_path / "whole"))


def test_score_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    got = score(logits, torch.tensor([0, 0, 0]))
    p = logits.double().softmax(1)
    assert got["error"] == pytest.approx(100 / 3)
    assert got["nll"] == pytest.approx(float(-p[:, 0].log().mean()))
    assert got["brier"] == pytest.approx(float((2 * (1 - p[:, 0]) ** 2).mean()))
    gaps = [abs(p[0, 0] - 1), abs(p[1, 1] - 0), abs(p[2, 0] - 1)]
    assert got["ece"] == pytest.approx(float(sum(gaps)) / 3)


def test_summary_is_over_domains_then_seeds(tmp_path):
    rows = run(cells(seeds=2), tmp_path)
    (tent,) = [r for r in summarise(rows) if r["method"] == "tent"]
    means = [
        sum(r["error"] for r in rows if r["method"] == "tent" and r["seed"] == seed) / 2
        for seed in (0, 1)
    ]
    assert tent["error"] == pytest.approx(sum(means) / 2)
    assert tent["error_std"] == pytest.approx(abs(means[0] - means[1]) / 2)


@pytest.mark.parametrize("name", ["batch", "group"])
def test_embedded_models_fit_their_data(name):
    from testtime.streams.data import load_data, stack

    model = load_model(f"embedded:{name}")
    images, labels = stack(load_data("fashion-mnist:sample"), torch.arange(1000))
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9


def test_unknown_models():
    for spec in ("embedded:bach", "nothing", "torchvision:resnet1888"):
        with pytest.raises(UnknownName):
            load_model(spec)
