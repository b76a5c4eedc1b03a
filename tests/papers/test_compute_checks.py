"""The small checks of test-time compute: their plumbing on tiny sizes, and their thresholds."""

import inspect
import math

import pytest

from edges import assert_edge
from testtime._core.registry import entries
from testtime.papers.catalogue import record

SMALL = {
    "shortest-majority-vote": {"QUESTIONS": 30},
    "kinetics": {"DRAWS": 1},
    "video-t1": {"RUNS": 1},
    "compute-optimal-scaling": {"QUESTIONS": 10, "PROBES": 2, "SAMPLES": 4},
    "llm-uncertainty": {"EPOCHS": 2, "FACTS": 60, "ASKED": 60},
}
EDGES = {
    "shortest-majority-vote": (
        {f"{kind}{name} of {n}": 50.0 + (kind == "" and name != "majority") * 2.1
         for kind in ("", "equal lengths, ") for name in ("majority", "shortest majority")
         for n in (2, 4, 8)},
        [{"shortest majority of 2": 52.0}, {"shortest majority of 8": 52.0},
         {"equal lengths, majority of 4": 53.1}, {"equal lengths, majority of 2": 46.9}],
    ),
    "kinetics": (
        {"largest relative difference, dense": 1e-12, "largest relative difference, top-k": 1e-12,
         "parameters, largest share in percent": 2.99, "14B to 0.6B, 32768 tokens": 1.5,
         "14B to 0.6B, 1024 tokens": 1.9, "1024 keys, percent of full attention": 9.99},
        [{"largest relative difference, dense": 2e-12}, {"largest relative difference, top-k": 1e-9},
         {"parameters, largest share in percent": 3.0}, {"14B to 0.6B, 32768 tokens": 1.51},
         {"14B to 0.6B, 1024 tokens": 1.89}, {"1024 keys, percent of full attention": 10.0}],
    ),
    "video-t1": (
        {"linear, 1 samples": 1.0, "linear, 2 samples": 2.0, "linear, 5 samples": 3.0,
         "linear, 10 samples": 4.0, "linear, 20 samples": 5.0}
        | {f"tree, {n} first frames": 4.1 for n in (8, 16)}
        | {f"linear, as many frames as with {n}": 4.0 for n in (8, 16)},
        [{"linear, 2 samples": 1.0}, {"linear, 20 samples": 4.0}, {"tree, 8 first frames": 4.0},
         {"tree, 16 first frames": 4.0}],
    ),
    "compute-optimal-scaling": (
        {"best-of-N": 50.0, "beams of width 2": 60.0, "beams of width 4": 70.0,
         "compute-optimal, predicted difficulty": 73.0},
        [{"best-of-N": 70.1}, {"beams of width 2": 70.1}, {"beams of width 4": 70.1}],
    ),
    "llm-uncertainty": (
        {"AUROC, knowledge": 0.71, "AUROC, reasoning": 0.6},
        [{"AUROC, knowledge": 0.7}, {"AUROC, reasoning": 0.61, "AUROC, knowledge": 0.9},
         {"AUROC, reasoning": 0.41}],
    ),
}  # fmt: skip
CHECKS = {entry.paper: entry for entry in entries("check").values() if entry.paper in EDGES}


@pytest.mark.parametrize("slug", EDGES)
def test_a_check_gives_the_numbers_that_its_claim_reads(slug, monkeypatch):
    module = inspect.getmodule(CHECKS[slug].factory)
    for name, value in SMALL[slug].items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    found, again = (CHECKS[slug].factory(seeds=(3,)) for _ in range(2))
    assert found == again
    assert found.slug == slug
    assert set(EDGES[slug][0]) <= set(found.numbers)
    assert all(math.isfinite(value) for (value,) in found.numbers.values())


@pytest.mark.parametrize("slug", EDGES)
def test_a_claim_holds_up_to_its_thresholds(slug):
    assert_edge(slug, *EDGES[slug])


@pytest.mark.parametrize("slug", EDGES)
def test_the_catalogue_says_what_the_paper_became(slug):
    assert record(slug).state == "works"
    assert record(slug).check
