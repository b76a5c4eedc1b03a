"""The command line, called in this process."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rows import make
from testtime._core.errors import WorkFailed
from testtime._core.registry import Entry
from testtime.bench import runner
from testtime.bench.store import write_cell
from testtime.bench.workers import Failure
from testtime.cli.bench import print_summary
from testtime.cli.main import app
from testtime.papers.reproduction import reproduce

call = CliRunner().invoke


def test_methods():
    listed = json.loads(call(app, ["methods", "--json"]).stdout)
    tent = next(m for m in listed if m["name"] == "tent")
    assert set(tent) == {"name", "paper", "summary", "options", "needs"}
    assert tent["options"]["lr"] == 1e-3
    assert "recover_below" in call(app, ["methods", "sar"]).stdout


def test_papers():
    listed = json.loads(call(app, ["papers", "--json"]).stdout)
    assert len(listed) > 200
    assert set(listed[0]) == {"slug", "title", "family", "state", "symbols"}
    works = {r["slug"] for r in listed if r["state"] == "works"}
    assert {"tent", "eata", "sar", "deyo", "ostta", "lame", "cotta", "rotta"} <= works
    found = json.loads(call(app, ["papers", "sharp dynamic", "--json"]).stdout)
    assert found == []
    assert "sar" in call(app, ["papers", "dynamic wild"]).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["methods", "tnet"], "did you mean tent"),
        (["bench", "--methods", "tnet", "--out", "x"], "did you mean tent"),
        (["bench", "--methods", "tent", "--stream", "contiual", "--out", "x"], "continual"),
        (["bench", "--methods", "tent(lrr=1)", "--out", "x"], "did you mean lr"),
        (["bench", "--methods", "tent(lr", "--out", "x"], "tent(lr=0.01)"),
        (["report", "nowhere"], "holds no run"),
        (["reproduce", "tnet"], "tent"),
    ],
)
def test_wrong_calls_end_with_two_and_a_sentence(words, says):
    result = call(app, words)
    assert result.exit_code == 2
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_bench_and_report(tmp_path):
    words = ["bench", "--methods", "bn-adapt", "--seeds", "1", "--out", str(tmp_path / "run"),
             "--stream", "continual,domains=fog+contrast,samples=40,batch_size=20"]  # fmt: skip
    rows = json.loads(call(app, [*words, "--json"]).stdout)
    assert {(r["method"], r["domain"]) for r in rows} == {
        (m, d) for m in ("source", "bn-adapt") for d in ("fog", "contrast")
    }
    table = call(app, words)
    assert table.exit_code == 0
    assert "bn-adapt" in table.stdout
    assert json.loads(call(app, ["report", str(tmp_path / "run"), "--json"]).stdout) == rows
    assert call(app, ["report", str(tmp_path / "run")]).exit_code == 0
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


CLAIM = "An assertion about a number, long enough that a terminal of eighty columns must break it."


@pytest.fixture
def one_check(monkeypatch):
    """A check of Tent that holds for seeds below 3."""

    def check(*, seeds=(0, 1, 2), on_progress=None):
        return reproduce(
            "tent", CLAIM, seeds=seeds, on_progress=on_progress, holds=lambda n: n["n"] < 83,
            measure=lambda seed: iter([("n", 80.0 + seed), ("small", 0.00123)]),
        )  # fmt: skip

    entry = Entry("tent", "tent", check)
    monkeypatch.setattr("testtime._core.registry.entries", lambda kind: {"tent": entry})


def test_reproduce_prints_claim_numbers_and_verdict(one_check):
    held = call(app, ["reproduce", "tent"])
    assert held.exit_code == 0
    assert max(map(len, held.stdout.splitlines())) <= 80
    assert CLAIM in " ".join(held.stdout.split())
    rows = [line.split() for line in held.stdout.splitlines()]
    assert ["seed", "0", "seed", "1", "seed", "2", "mean"] in rows
    assert ["n", "80.00", "81.00", "82.00", "81.00"] in rows
    assert ["small", *["0.0012"] * 4] in rows
    assert rows[-1] == ["held,", "for", "3", "of", "3", "seeds"]
    failed = call(app, ["reproduce", "tent", "--seeds", "12"])
    assert failed.exit_code == 1
    assert max(map(len, failed.stdout.splitlines())) <= 80
    assert ["n", "80.00", "91.00", "85.50"] in [line.split() for line in failed.stdout.splitlines()]
    assert failed.stdout.splitlines()[-1] == "not held, for 3 of 12 seeds"


def test_reproduce_gives_one_record_to_machines(one_check):
    for seeds, code in (("1", 0), ("4", 1)):
        result = call(app, ["reproduce", "tent", "--seeds", seeds, "--json"])
        assert result.exit_code == code
        found = json.loads(result.stdout)
        assert set(found) == {"slug", "claim", "held", "numbers", "seeds"}
        assert found["seeds"] == list(range(int(seeds)))
        assert found["held"] is (code == 0)


def test_reproduce_refuses_a_paper_without_a_check_and_no_seeds(one_check):
    without = call(app, ["reproduce", "simatta"])
    assert (without.exit_code, without.stdout) == (2, "")
    assert "no small check yet; there are: tent" in " ".join(without.stderr.split())
    assert call(app, ["reproduce", "tent", "--seeds", "0"]).exit_code == 2


def test_methods_with_options_are_rows_of_their_own(tmp_path):
    words = ["bench", "--methods", "tent,tent(lr=0.01)", "--seeds", "1", "--out", str(tmp_path),
             "--stream", "continual,domains=fog,samples=40,batch_size=20", "--jobs", "2"]  # fmt: skip
    done = call(app, words, env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert {"source", "tent", "tent(lr=0.01)"} <= set(done.stdout.split())
    assert max(map(len, done.stdout.splitlines()[1:5])) <= 80
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r"\[\d/3\] .+ seed 0: \d+\.\d\d % error", line) for line in lines)


def test_reports_of_what_is_not_whole(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{")
    assert call(app, ["report", str(tmp_path)]).exit_code == 2
    path.write_text('{"0123": {"method": "tent"}}')
    done = call(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "no finished cell yet, of 1" in done.stderr
    done = call(app, ["report", str(tmp_path), "--partial"])
    assert done.exit_code == 2
    assert "--partial" not in done.stderr  # which was given
    assert "it is a file" in call(app, ["report", str(path)]).stderr


def test_a_run_without_a_column_is_told_of(tmp_path):
    rows = [
        {name: row[name] for name in row if name != "scenario"} | {"cell": "0123"} for row in make()
    ]
    write_cell(tmp_path, "0123", rows)
    (tmp_path / "run.json").write_text('{"0123": {}}')
    done = call(app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "rows lack scenario" in done.stderr


def test_a_terminal_without_a_letter_shows_another(tmp_path):
    rows = [row | {"cell": "0123"} for row in make()]
    write_cell(tmp_path, "0123", rows)
    (tmp_path / "run.json").write_text('{"0123": {}}')
    for words in (["report", str(tmp_path)], ["bench", "--help"], ["methods", "roid"]):
        done = CliRunner(charset="ascii").invoke(app, words)
        assert done.exit_code == 0, done.exception


def test_a_full_disk_is_told_in_a_sentence(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("testtime.cli.methods.print_json", full)
    done = call(app, ["methods", "--json"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_no_model_is_a_wrong_call(tmp_path):
    done = call(app, ["bench", "--methods", "tent", "--model", ",", "--out", str(tmp_path / "a")])
    assert done.exit_code == 2
    assert "no model is named" in done.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--methods", ","], "no method is named"),
        (["--methods", "tent", "--device", "meta"], "there is no device 'meta' here"),
        (["--methods", "tent", "--threads", "100000"], "--threads"),
    ],
)
def test_what_no_run_can_be_made_of_is_a_wrong_call(tmp_path, more, says):
    done = call(app, ["bench", "--out", str(tmp_path / "a"), "--seeds", "1", *more])
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "a" / "cells").exists()


def test_a_table_without_its_source(capsys):
    rows = [row for row in make() if row["method"] != "source"]
    print_summary(rows)
    assert "tent" in capsys.readouterr().out


def test_work_that_failed_ends_with_one_and_names_the_cell(tmp_path, monkeypatch):
    def fails(cells, out, **options):
        raise WorkFailed("1 of 2 cells failed:\n  tent[a] on m: memory")

    monkeypatch.setattr("testtime.bench.runner.run", fails)
    done = call(app, ["bench", "--methods", "tent", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert "tent[a] on m: memory" in done.stderr


def test_what_finished_is_shown_beside_what_failed(tmp_path, monkeypatch):
    attempt, failing = runner.attempt, ["tent"]

    def some(cell, notice):
        return Failure(text="no memory") if cell.method in failing else attempt(cell, notice)

    monkeypatch.setattr(runner, "run_all", lambda cells, jobs, notice: (
        (cell, some(cell, notice)) for cell in cells))  # fmt: skip
    words = ["bench", "--methods", "bn-adapt,tent", "--seeds", "1", "--out", str(tmp_path / "run"),
             "--stream", "stationary,samples=20"]  # fmt: skip
    done = call(app, words)
    assert done.exit_code == 1
    assert "1 of 3 cells failed" in done.stderr
    assert "bn-adapt" in done.stdout
    assert "report --partial" in done.stdout
    again = call(app, [*words, "--json"])
    assert again.exit_code == 1
    assert {row["method"] for row in json.loads(again.stdout)} == {"source", "bn-adapt"}


@pytest.mark.parametrize(("name", "says"), [("reproduce", False), ("bench", True)])
def test_a_stopped_command_says_what_is_true(name, says, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("testtime.papers.catalogue.record", stop)
    monkeypatch.setattr("testtime.cli.bench.execute", stop)
    words = {
        "reproduce": ["reproduce", "tent"],
        "bench": ["bench", "--methods", "tent", "--out", str(tmp_path / "run")],
    }[name]
    stopped = call(app, words)
    assert stopped.exit_code == 1
    assert "interrupted" in stopped.stderr
    assert ("goes on from here" in stopped.stderr) == says


def test_the_package_runs_as_a_module():
    call = [sys.executable, "-m", "testtime", "methods", "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert "Usage: testtime methods" in done.stdout
