"""Runs that are interrupted, damaged or asked for again."""

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn

import testtime
from reference import measures as reference
from rows import make
from testtime._core.errors import InputError, RunError, ScopeError, UnknownName, WorkFailed
from testtime.bench import trial
from testtime.bench.cells import plan
from testtime.bench.metrics import OPEN_SET, Score, summarise
from testtime.bench.models import load_model
from testtime.bench.report import write_report
from testtime.bench.runner import run
from testtime.bench.store import piece, read_run
from testtime.bench.trial import Domain
from testtime.measures.calibration import calibration_error
from testtime.streams.data import load_data
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


pytestmark = pytest.mark.usefixtures("few_images")


def test_rows_are_complete_and_the_source_is_always_there(tmp_path):
    rows = run(cells(["tent", "eata"]), tmp_path, jobs=0)
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


def test_rows_say_where_they_come_from(tmp_path):
    row = run(cells(), tmp_path, jobs=0)[2]
    known = {"method": "tent", "options": "{}", "seed": 0, "severity": 5, "batch_size": 20,
             "pattern": "continual", "order": "shuffled", "reset_rule": "never", "device": "cpu",
             "threads": 1, "version": testtime.__version__, "torch_version": torch.__version__}  # fmt: skip
    assert {name: row[name] for name in known} == known
    assert row["preprocessing"].startswith("pixels in [0, 1]; the model removes mean 0.286")
    assert row["machine"]
    assert len(row["weights_sha256"]) == len(row["samples_sha256"]) == 64
    other = run(cells(seeds=2), tmp_path, jobs=0)[-1]
    assert other["samples_sha256"] != row["samples_sha256"]
    assert other["weights_sha256"] == row["weights_sha256"]


def test_a_run_repeats_and_resumes(tmp_path):
    first = run(cells(), tmp_path / "a", jobs=0)
    assert without_times(run(cells(), tmp_path / "b", jobs=0)) == without_times(first)
    ran = []

    def done(cell, rows, now):
        ran.extend([f"{cell.method} {cell.seed}"] * now)

    assert run(cells(), tmp_path / "a", jobs=0, on_done=done) == first == read_run(tmp_path / "a")
    assert ran == []
    run(cells(["tent", "bn-adapt"], seeds=2), tmp_path / "a", jobs=0, on_done=done)
    assert ran == ["bn-adapt 0", "source 1", "tent 1", "bn-adapt 1"]
    assert len(read_run(tmp_path / "a")) == 12


def test_a_cell_of_its_own_process_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.undo()  # processes measure the clean error on all clean samples
    here = run(cells(), tmp_path / "here", jobs=0)
    there = run(cells(), tmp_path / "there", jobs=2)
    assert without_times(here) == without_times(there)
    sizes = [row["peak_memory_mb"] for row in there]
    assert all(5 < size < 500 for size in sizes)


def test_a_worker_that_dies_is_named_and_the_rest_is_kept(tmp_path):
    def kill(cell, kind, count):
        if cell.method == "tent" and kind == "start":
            (child,) = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)

    wanted = cells(["tent", "bn-adapt"])
    with pytest.raises(WorkFailed, match=r"1 of 3 cells.*\n  tent on embedded:batch.*signal 9"):
        run(wanted, tmp_path, on_notice=kill)
    assert [row["method"] for row in read_run(tmp_path, partial=True)][::2] == [
        "source",
        "bn-adapt",
    ]
    assert len(run(wanted, tmp_path)) == 6


def test_a_method_that_fails_leaves_the_others_running(tmp_path, monkeypatch):
    whole = testtime.adapt

    def fails(model, method, **options):
        if method == "tent":
            raise ScopeError("nothing to adapt")
        return whole(model, method, **options)

    monkeypatch.setattr("testtime.adapt", fails, raising=False)
    with pytest.raises(WorkFailed, match="1 of 3 cells") as caught:
        run(cells(["tent", "bn-adapt"]), tmp_path, jobs=0)
    assert "tent on embedded:batch" in str(caught.value)
    assert "nothing to adapt" in str(caught.value)
    assert len(read_run(tmp_path, partial=True)) == 4


def test_a_method_that_is_not_for_the_model_can_be_left_out(tmp_path):
    wanted, told = cells(["foa", "petal"]), []
    rows = run(wanted, tmp_path, jobs=0, on_unfit=lambda cell, why: told.append((cell.method, why)))
    assert [row["method"] for row in rows] == ["source"] * 2 + ["petal"] * 2
    assert [method for method, _ in told] == ["foa"]
    assert "vision transformer" in told[0][1]
    assert len(read_run(tmp_path)) == 4  # the run is whole without it
    with pytest.raises(WorkFailed, match="foa"):
        run(wanted, tmp_path, jobs=0)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"data": "fashion-mnit"}, UnknownName, "fashion-mnist"),
        ({"models": ["file:x.pt@embedded:batch"]}, InputError, "no file x.pt"),
        ({"models": ["embedded:bach"]}, UnknownName, "embedded:batch"),
        ({"device": "cuda:99"}, InputError, "no device"),
    ],
)
def test_what_the_source_cannot_run_on_ends_the_run(tmp_path, change, error, says):
    stream = Scenario(domains=("fog",), samples=20)
    base = {"methods": ["tent"], "models": ["embedded:batch"], "data": "fashion-mnist:sample",
            "streams": [stream], "seeds": 1}  # fmt: skip
    with pytest.raises(error, match=says):
        run(plan(**(base | change)), tmp_path, jobs=0)
    assert not (tmp_path / "run.json").exists()
    first = run(plan(**base), tmp_path, jobs=0)
    with pytest.raises(error, match=says):
        run(plan(**(base | change)), tmp_path, jobs=0)
    assert read_run(tmp_path) == first  # a slip of the pen leaves no trace


def test_a_model_for_other_images_is_refused_with_both_shapes(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 10))
    monkeypatch.setattr("testtime.bench.trial.load_model", lambda spec: net)
    with pytest.raises(InputError, match=r"embedded:batch cannot run on .*\(1, 28, 28\)"):
        run(cells(), tmp_path, jobs=0)


def test_a_damaged_piece_is_made_again(tmp_path):
    first = run(cells(), tmp_path, jobs=0)
    path = piece(tmp_path, cells()[1].key)
    path.write_bytes(path.read_bytes()[:100])
    (path.parent / ".left.part").write_bytes(b"half")
    with pytest.raises(RunError, match="1 of 2 cells"):
        read_run(tmp_path)
    assert without_times(run(cells(), tmp_path, jobs=0)) == without_times(first)
    assert len(read_run(tmp_path)) == 4


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        read_run(tmp_path)
    for text in ("{", "[]", '{"a": 1}', "\xff"):
        (tmp_path / "run.json").write_text(text, "latin-1")
        with pytest.raises(RunError, match=r"run.json is damaged.*Delete this file"):
            read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunError, match="no finished cell yet, of 0"):
        read_run(tmp_path)


def test_a_lost_plan_is_noted_again_without_running_anything(tmp_path):
    first = run(cells(), tmp_path, jobs=0)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        run(cells(), tmp_path, jobs=0)
    (tmp_path / "run.json").unlink()
    ran = []
    run(cells(), tmp_path, jobs=0, on_done=lambda cell, rows, now: ran.append(now))
    assert ran == [False, False]
    assert read_run(tmp_path) == first


def test_a_new_version_replaces_the_cells_of_the_old_one(tmp_path, monkeypatch):
    run(cells(["tent"]), tmp_path, jobs=0)
    monkeypatch.setattr("testtime.__version__", "9.9")
    run(cells([]), tmp_path, jobs=0)
    found = [(row["method"], row["version"]) for row in read_run(tmp_path)]
    assert set(found) == {("source", "9.9"), ("tent", "0.1.0")}
    assert len(found) == 4


COMMAND = [sys.executable, "-c", "from testtime.cli.main import app; app()", "bench", "--methods",
           "tent,bn-adapt,eata,tent(lr=0.01)", "--seeds", "2", "--stream",
           "continual,domains=fog+contrast,batch_size=20,samples=200"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_run_goes_on(tmp_path, jobs):
    killed, chance = tmp_path / "killed", random.Random(int(jobs))
    command = [*COMMAND, "--jobs", jobs, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    kept = {}
    for wanted in (0, 1, 3, 6, 8):
        process = subprocess.Popen([*command, str(killed)])
        limit = time.monotonic() + 120
        while time.monotonic() < limit and len(list(killed.glob("cells/*.parquet"))) < wanted:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
        kept = {path: path.stat().st_mtime_ns for path in killed.glob("cells/*.parquet")}
    subprocess.run([*command, str(killed)], check=True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert without_times(read_run(killed)) == without_times(read_run(tmp_path / "whole"))


def test_score_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    score = Score()
    assert score.add(logits[:2], torch.tensor([0, 0])) == 50
    assert score.add(logits[2:], torch.tensor([0])) == 0
    got = score.result()
    p = logits.double().softmax(1)
    assert got["error"] == pytest.approx(100 / 3)
    assert got["nll"] == pytest.approx(float(-p[:, 0].log().mean()))
    assert got["brier"] == pytest.approx(float((2 * (1 - p[:, 0]) ** 2).mean()))
    gaps = [abs(p[0, 0] - 1), abs(p[1, 1] - 0), abs(p[2, 0] - 1)]
    assert got["ece"] == pytest.approx(float(sum(gaps)) / 3)


def test_score_of_batches_is_that_of_all_at_once():
    chance = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 7, generator=chance)
    labels = torch.randint(7, (500,), generator=chance)
    whole, parts = Score(), Score()
    whole.add(logits, labels)
    for own, answers in zip(logits.split(33), labels.split(33), strict=True):
        parts.add(own, answers)
    assert all(isinstance(value, int | float | Tensor) for value in vars(parts).values())
    a, b = whole.result(), parts.result()
    for name in ("samples", "error", "nll", "brier", "ece"):
        assert a[name] == pytest.approx(b[name], rel=1e-12), name
    probs = logits.double().softmax(1)
    sure, hit = probs.amax(1), probs.argmax(1) == labels
    assert a["ece"] == pytest.approx(float(calibration_error(sure, hit)), rel=1e-12)
    for x, y in zip(a["reliability"], b["reliability"], strict=True):
        assert x == pytest.approx(y, rel=1e-12)


def test_answers_without_a_softmax_are_errors_without_a_likelihood():
    score = Score()
    logits = torch.tensor([[2.0, 0.0], [torch.nan, 0.0], [torch.inf, 0.0]])
    assert score.add(logits, torch.tensor([0, 0, 0])) == pytest.approx(200 / 3)
    assert all(math.isnan(score.result()[name]) for name in ("nll", "brier", "ece"))


def test_an_open_stream_counts_errors_of_known_samples_and_scores_the_others(tmp_path):
    stream = Scenario(
        domains=("clean", "fog"), batch_size=20, samples=40,
        unknown=("noise", "class:9"), unknown_share=0.25,
    )  # fmt: skip
    rows = run(
        plan(methods=["tent"], models=["embedded:batch"], data="fashion-mnist:sample",
             streams=[stream], seeds=1),
        tmp_path, jobs=0,
    )  # fmt: skip
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    sent = list(stream.stream(data, seed=0))
    with torch.no_grad():
        logits = torch.cat([model(batch.inputs) for batch in sent])
    labels = torch.cat([batch.labels for batch in sent])
    for row, part in zip(rows[:2], (slice(0, 53), slice(53, 106)), strict=True):  # of the source
        own, truth = logits[part].double(), labels[part]
        known, hit = truth != -1, own.argmax(1) == truth
        assert row["samples"] == int(known.sum()) == 40
        assert row["error"] == pytest.approx(100 * float((~hit[known]).double().mean()))
        scores = (1 - own.softmax(1).amax(1)).float().numpy()
        expected = reference.auroc(scores, ~known.numpy())
        assert row["auroc"] == pytest.approx(expected, abs=1e-6)
        expected = reference.fpr_at_95_tpr(-scores, known.numpy())
        assert row["fpr95"] == pytest.approx(expected, abs=1e-6)
        expected = reference.oscr(scores, hit.numpy(), ~known.numpy())
        assert row["oscr"] == pytest.approx(expected, abs=1e-6)
        expected = reference.h_score(scores, hit.numpy(), ~known.numpy())
        assert row["h_score"] == pytest.approx(expected, abs=1e-6)
        assert sum(t["samples"] for t in row["trace"]) == 40
    assert rows[0]["stream"] == "continual open-set"
    source, _ = summarise(rows)
    assert source["oscr"] == pytest.approx((rows[0]["oscr"] + rows[1]["oscr"]) / 2)
    assert "OSCR" in write_report(rows, tmp_path / "report.html").read_text("utf-8")


def test_a_method_s_own_score_is_used_and_closed_streams_have_none():
    opened, closed = Domain(opened=True), Domain(opened=False)
    logits = torch.tensor([[2.0, 0.0], [0.0, 9.0], [5.0, 0.0]])
    labels, own = torch.tensor([0, -1, 0]), torch.tensor([0.1, 0.7, 0.2])
    opened.add(0, logits, labels, own)
    opened.add(1, logits[1:2], labels[1:2], own[1:2])  # nothing known in it
    assert [opened.row()[name] for name in OPEN_SET] == [1, 0, 1, 1]
    assert [t["samples"] for t in opened.row()["trace"]] == [2, 0]
    assert opened.row()["trace"][1]["error"] is None
    unsure = Domain(opened=True)
    unsure.add(0, logits, labels, None)  # the unknown one is the surest
    assert unsure.row()["auroc"] == 0
    closed.add(0, logits[:1], labels[:1], own[:1])
    assert [closed.row()[name] for name in OPEN_SET] == [None] * 4
    familiar = Domain(opened=True)
    familiar.add(0, logits[[0, 1, 2]], torch.tensor([0, 0, 0]), own)  # nothing unknown has come
    assert [familiar.row()[name] for name in OPEN_SET] == [None, None, *[pytest.approx(2 / 3)] * 2]
    broken = Domain(opened=True)
    broken.add(0, logits, labels, own * math.nan)
    assert [broken.row()[name] for name in OPEN_SET] == [None] * 4


def test_a_class_that_is_held_out_is_seen_by_nobody(monkeypatch, tmp_path):
    drawn = []
    whole = trial.draw

    def spy(*args, **more):
        for images, labels in whole(*args, **more):
            drawn.append(labels)
            yield images, labels

    monkeypatch.setattr(trial, "draw", spy)
    stream = Scenario(domains=("clean",), batch_size=20, samples=20, unknown=("class:9",))
    run(plan(methods=["eata"], models=["embedded:batch"], data="fashion-mnist:sample",
             streams=[stream], seeds=1), tmp_path, jobs=0)  # fmt: skip
    assert set(torch.cat(drawn).tolist()) == set(range(9))


def test_summary_is_over_domains_then_seeds(tmp_path):
    rows = run(cells(seeds=2), tmp_path, jobs=0)
    (tent,) = [r for r in summarise(rows) if r["method"] == "tent"]
    means = [
        sum(r["error"] for r in rows if r["method"] == "tent" and r["seed"] == seed) / 2
        for seed in (0, 1)
    ]
    assert tent["error"] == pytest.approx(sum(means) / 2)
    assert tent["error_std"] == pytest.approx(abs(means[0] - means[1]) / 2)


@pytest.mark.parametrize(
    ("name", "other"), [("scenario", "severity = 3"), ("options", '{"lr": 0.1}'), ("data", "b")]
)
def test_what_differs_is_never_averaged(name, other):
    rows = make(("source", "tent"), seeds=1)
    both = summarise(rows + [row | {name: other, "error": 0.0} for row in rows])
    assert len(both) == 4
    assert [r["error"] for r in both[2:]] == [0, 0]
    assert both[:2] == summarise(rows)


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
