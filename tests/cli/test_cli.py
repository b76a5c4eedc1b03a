"""The command line, called in this process."""

import json

import pytest
from typer.testing import CliRunner

from testtime.cli.main import app

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
