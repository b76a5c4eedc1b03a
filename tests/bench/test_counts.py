"""The table of what every method costs in theory: what is held is counted, and the page is that table."""

import pytest
import torch
from torch import nn

from models import batches, tiny
from scripts import BENCHMARKS, script

PAGE = BENCHMARKS.parent / "docs" / "performance.md"


@pytest.fixture(scope="module")
def counts():
    return script("counts")


def test_what_is_held_is_what_is_not_the_models_own(counts):
    model, x = tiny(), batches(1)[0].sigmoid()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    learnt = sum(p.nbytes for norm in norms for p in norm.parameters())
    chance = torch.get_rng_state().nbytes
    assert counts.held("tent", model, x) == (3 * learnt + chance, 0)  # and Adam's two moments
    mean = 5 * 4  # of the probabilities of five classes
    assert counts.held("eata", model, x) == (2 * learnt + mean + chance, learnt)  # Fisher
    assert counts.held("memo", model, x) == (chance, 0)  # every batch begins at the model
    whole = sum(p.nbytes for p in model.parameters())
    assert counts.held("cotta", model, x) == (4 * whole + chance, 0)  # teacher, student, moments


def test_a_method_that_learnt_nothing_is_not_counted(counts, monkeypatch):
    monkeypatch.setitem(counts.SURE, "eta", {"margin": 0.0})
    with pytest.raises(RuntimeError, match="eta did not learn"):
        counts.held("eta", tiny(), batches(1)[0])


@pytest.mark.slow
def test_the_page_shows_the_table(counts):
    shown = PAGE.read_text().split("<!-- counted: begin -->\n")[1].split("\n<!-- counted: end")[0]
    assert shown.splitlines() == counts.table()
