"""The figures of the page on deploying that no clock measures."""

import re

import pytest

from scripts import BENCHMARKS, script


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
