"""The figures of the pages on deploying and on the engine: those of the files, or measured again."""

import json
import re
import shutil

import pytest
import torch

from scripts import BENCHMARKS, script

DOCS = BENCHMARKS.parent / "docs"


@pytest.mark.parametrize(("name", "page"), [("deploying", "deploying.md"), ("pieces", "engine.md")])
def test_figures_of_a_page_are_those_of_the_file(name, page, tmp_path):
    found = json.loads((BENCHMARKS / f"{name}.json").read_text())
    shutil.copy(DOCS / page, tmp_path)
    script(name).write_page(found, tmp_path / page)
    assert (tmp_path / page).read_text() == (DOCS / page).read_text()


def test_a_run_takes_the_place_of_one_of_the_same_settings(tmp_path):
    deploying, path = script("deploying"), tmp_path / "rows.json"
    row = dict.fromkeys(deploying.SETTINGS, "a")
    other = row | {"memory": "kept"}
    for each in (row | {"inference": 1}, other, row | {"inference": 2}):
        deploying.keep(path, each)
    assert json.loads(path.read_text()) == [other, row | {"inference": 2}]


def test_a_stream_is_measured_against_its_parts(monkeypatch):
    """Of a clock that only the parts move on: a copy takes 1, a step 4, and of a stream the copy hides."""
    deploying = script("deploying")
    now, calls = [0.0], []
    adapt = deploying.tt.adapt

    class Timed:
        def __init__(self, model, method, *, deferred):
            self.deferred, self.adapter = deferred, adapt(model, method, deferred=deferred)

        def __call__(self, x):
            calls.append(self.deferred)
            now[0] += 3.0 if self.deferred else 4.0
            return self.adapter(x)

        def flush(self):
            now[0] += 8.0  # the last update, and nothing of the others
            self.adapter.flush()

    monkeypatch.setattr(deploying.tt, "adapt", Timed)
    monkeypatch.setattr(deploying.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(deploying, "wait_for", lambda device: now.__setitem__(0, now[0] + 1.0))
    found = deploying.stream("embedded:batch", 8, 2, torch.device("cpu"), torch.contiguous_format)
    assert found["copy"] == [1.0, 1.0]
    assert found["step"] == [5.0, 5.0]
    assert found["stream"] == [(8 * 3.0 + 8.0 + 1.0) / 8] * 2
    assert found["to its parts"] == [together / 6.0 for together in found["stream"]]
    assert calls.count(True) == calls.count(False) == 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize("model", ["embedded:batch", "embedded:group"])
def test_errors_under_a_gate_are_those_of_the_page(model):
    page = (BENCHMARKS.parent / "docs" / "deploying.md").read_text()
    rows = script("deploying").gate(model, 64, 256)
    for kind in ("15 corruptions", "clean"):
        errors = {way: error for own, way, error, _, _ in rows if own == kind}
        spared, batches = next(row[3:] for row in rows if row[:2] == (kind, "tent, gated"))
        shown = re.search(rf"^\| {model} \| {kind}.*$", page, re.MULTILINE)
        assert shown is not None
        cells = [cell.strip() for cell in shown[0].split("|")[3:-1]]
        assert cells == [f"{e:.2f}" for e in errors.values()] + [f"{spared} of {batches}"]
        # what a gate may cost on a stream that shifts, and that it spares all of one that does not
        assert errors["tent, gated"] <= errors["tent"] + 0.5
        assert kind != "clean" or spared == batches
