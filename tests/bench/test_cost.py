"""The regression check of the cost suite, and what it writes."""

import copy
import json
import math
import re
import shlex
import sys

import pytest
import torch

import testtime as tt
from scripts import BENCHMARKS, script

ROW = {
    "model": "m", "batch": 4, "name": "tent", "machine": "a", "to_inference": [2.0, 1.9, 2.1],
    "megabytes": 100.0, "forwards": 1.0,
}  # fmt: skip
FILE = {"rows": [ROW]}


@pytest.fixture
def cost():
    return script("cost")


def changed(**figures):
    found = copy.deepcopy(FILE)
    found["rows"][0].update(figures)
    return found


@pytest.fixture
def compared(cost, tmp_path, monkeypatch, capsys):
    """The exit code of a comparison, and what it prints."""

    def run(old, new):
        for name, content in (("old", old), ("new", new)):
            (tmp_path / name).write_text(json.dumps(content))
        call = ["cost.py", "--compare", str(tmp_path / "old"), str(tmp_path / "new")]
        monkeypatch.setattr(sys, "argv", call)
        return cost.main(), capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({}, None),
        ({"to_inference": [2.19, 2.0, 9.0]}, None),
        ({"to_inference": [2.21, 2.0, 2.3]}, "2.21 times inference, was 2.00"),
        ({"to_inference": [math.nan, 2.0, 2.3]}, "nan times inference, was 2.00"),
        ({"to_inference": [1.0, 1.0, 1.0], "megabytes": 10.0}, None),
        ({"megabytes": 101.9}, None),
        ({"megabytes": 102.1}, "102 MB, was 100"),
        ({"forwards": 1.05}, None),
        ({"forwards": 2.0}, "2.00 forwards, was 1.00"),
    ],
)
def test_what_is_worse_is_told_and_fails(figures, says, compared):
    code, told = compared(FILE, changed(**figures))
    assert code == (says is not None)
    assert told == [f"tent on m, batch 4: {says}" if says else "of 3 figures nothing is worse"]


def test_what_cannot_be_compared_is_told(compared):
    other = {**ROW, "name": "sar"}
    code, told = compared({"rows": [ROW, other]}, FILE)
    assert code == 0
    assert told[0] == "not compared: only in the old file: sar on m, batch 4"
    code, told = compared(FILE, {"rows": [ROW, {**other, "device": "cuda"}]})
    assert code == 0
    assert told[0] == "not compared: only in the new file: sar on m, batch 4, cuda"
    code, told = compared(FILE, changed(machine="b", to_inference=[9.0, 9.0, 9.0], megabytes=103.0))
    assert code == 1  # a slower machine is no loss, but memory is the same on all
    assert told == [
        "not compared: tent on m, batch 4: times of a and of b",
        "tent on m, batch 4: 103 MB, was 100",
    ]
    less = changed()
    del less["rows"][0]["megabytes"]
    code, told = compared(FILE, less)
    assert (code, told[0]) == (
        0,
        "not compared: tent on m, batch 4: the new file says nothing of MB",
    )


def test_files_without_a_figure_in_common_do_not_pass(compared):
    assert compared(FILE, {"rows": []})[0] == 2
    assert compared(FILE, changed(name="textbook tent", megabytes=900.0))[0] == 2


def test_newer_figures_take_the_place_of_older(cost):
    later = {"rows": [{"model": "m", "batch": 4, "name": "tent", "x": 1}]}
    assert cost.join(FILE, later) == {"rows": [{**ROW, "x": 1}]}
    assert cost.join({}, FILE) == FILE


def test_tables_are_written_between_the_marks(cost, tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nafter\n")
    for _ in range(2):
        other = {**ROW, "name": "sar", "machine": "b"}
        overhead = {"machine": "a", "tent": 0.25}
        cost.page(path, {"rows": [ROW, other], "overhead_ms": overhead})
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("| tent | 2.00 (1.90 to 2.10) | 100 |") == 1
    assert text.index("**m, batch 4** (a)") < text.index("| tent |")
    assert text.index("**m, batch 4** (b)") < text.index("| sar |")
    assert "0.25 for `tent` (a)" in text


@pytest.mark.slow
def test_every_textbook_form_takes_a_step_as_the_method_counts(cost):
    torch.manual_seed(0)
    model, x = cost.make("embedded", 8)
    methods = [name for name in cost.METHODS if name != "source"]
    steps = cost.contestants(model, x, 8, methods)
    assert {f"textbook {name}" for name in methods} < steps.keys()
    for name in methods:
        assert steps[f"textbook {name}"](x[:8]).shape == (8, 10)


@pytest.mark.slow
def test_a_third_teaches_and_rows_are_whole(cost):
    rows = cost.measure("embedded", 9, ["tent", "eta", "deyo"], 1, ["seconds", "memory"])
    assert [row["name"] for row in rows[:3]] == ["inference", "minimal step", "textbook tent"]
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["megabytes"] > 0
    model, x = cost.make("embedded", 9)
    steps = cost.contestants(model, x, 9, ["eta", "sar", "deyo"])
    for name in ("eta", "sar", "deyo"):
        steps[name](x[9:])
        assert int(steps[name].events[-1].used) == 3


def test_what_takes_one_image_at_a_time_is_set_against_one_image(cost):
    rows = cost.measure("embedded", 8, ["memo"], 1, ["seconds", "memory"])
    memo, book = ({row["name"]: row for row in rows}[name] for name in ("memo", "textbook memo"))
    assert memo["batch"] == book["batch"] == 1
    assert memo["to_textbook"][0] == pytest.approx(memo["milliseconds"] / book["milliseconds"])
    assert all(len(cost.taken(name, torch.zeros(8, 1))) == 1 for name in ("memo", "textbook memo"))
    assert memo["memory_to_textbook"] > 0


@pytest.mark.parametrize(("rounds", "plain", "slow"), [(None, 5, 1), (2, 2, 2)])
def test_methods_of_many_passes_are_repeated_if_that_is_asked(
    rounds, plain, slow, cost, monkeypatch
):
    timed = []
    monkeypatch.setattr(cost, "seconds", lambda step, x: timed.append(len(x)) or 1.0)
    cost.measure("embedded", 4, ["roid"], rounds, ["seconds"])
    assert timed.count(1) == plain  # inference of one image
    assert timed.count(4) == 2 * plain + 2 * slow  # the floors, and roid with its textbook form


def test_the_page_is_that_of_the_numbers(cost, tmp_path):
    page, docs = tmp_path / "page.md", BENCHMARKS.parent / "docs" / "performance.md"
    page.write_text(docs.read_text())
    cost.page(page, json.loads((BENCHMARKS / "cost.json").read_text()))
    assert page.read_text() == docs.read_text()


def test_every_row_has_its_command_on_the_page(cost, monkeypatch, tmp_path):
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text().replace("\\\n", " ")
    made = set()

    def measure(name, size, methods, rounds, wanted, device):
        made.update((name, 1 if m in cost.ALONE else size, m, device) for m in methods)
        return []

    monkeypatch.setattr(cost, "measure", measure)
    monkeypatch.setattr(cost, "keep", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for line in re.findall(r"^python benchmarks/(cost.py .*--models.*)", page, re.MULTILINE):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        assert cost.main() == 0
    for row in json.loads((BENCHMARKS / "cost.json").read_text())["rows"]:
        model, batch, name, device = script("compare").key_of(row)
        name = name.removeprefix("textbook ").partition(",")[0]
        if name in tt.methods():
            assert (model, batch, name, device) in made


@pytest.mark.parametrize(("there", "devices"), [(False, ["cpu"]), (True, ["cpu", "cuda"])])
def test_a_gpu_is_measured_where_there_is_one(there, devices, cost, monkeypatch):
    seen = []
    monkeypatch.setattr(cost, "measure", lambda *args: seen.append(args[-1]) or [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(sys, "argv", ["cost.py", "--models", "embedded"])
    assert cost.main() == 0
    assert seen == devices


@pytest.mark.parametrize(
    ("name", "option", "known"),
    [
        ("cost", "--measure", "seconds,memory"),
        ("cost", "--methods", "tent"),
        ("every", "--networks", "resnet18"),
        ("every", "--methods", "tent"),
        ("held_out", "--tables", "wine"),
        ("other_networks", "--networks", "expected some of"),
        ("guard", "--methods", "tent"),
        ("many_classes", "--methods", "tent"),
        ("reproductions", "--only", "tent"),
        ("compression", "--texts", "english"),
        ("answer_entropy", "--topics", "expected some of"),
    ],
)
def test_names_that_are_not_known_are_refused(name, option, known, monkeypatch, capsys):
    """And not run as nothing, to print or write an empty table."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", option, "tempo"])
    with pytest.raises(SystemExit) as said:
        script(name).main()
    assert said.value.code == 2
    told = capsys.readouterr().err
    assert "tempo" in told
    assert known in told
