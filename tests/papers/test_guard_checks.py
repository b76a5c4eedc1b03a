"""The small checks of monitors: their plumbing on small sizes, and what their claims allow."""

import inspect
import math

import pytest

from edges import assert_edge
from testtime._core.registry import entries

SMALL = {
    "skit": {"STREAMS": 3, "POINTS": 40},
    "feature-shift": {"CLEAN": 2, "ATTACKED": 2, "BOOTSTRAP": 5, "SAMPLES": 40},
    "relative-uncertainty": {"SAMPLES": 60, "EPOCHS": 1},
    "predictive-uncertainty": {"MEMBERS": 2, "EPOCHS": 1},
    "tarp": {"SIMULATIONS": 30, "SAMPLES": 10},
    "learning-to-reject": {"SAMPLES": 80, "STEPS": 2},
    "correctness-calibration": {"SAMPLES": 80, "STEPS": 2},
    "uncertainty-fingerprint": {"TRIALS": 2, "EPOCHS": 1},
}
"""Sizes with which a check runs in a moment."""

EDGES = {
    "skit": (
        {"rejected, beta 0.0": 10.0, "points, beta 0.0": 600.0, "rejected, beta 0.5": 90.0,
         "points, beta 0.3": 400.0, "points, beta 0.5": 230.0, "points, beta 1.0": 120.0,
         "rejected by correlation, beta 0": 15.1,
         "rejected by COCO, beta 0.0": 10.0, "rejected by COCO, beta 1.0": 90.0,
         "rejected by KCC, beta 0.0": 10.0, "rejected by KCC, beta 1.0": 90.0},
        [{"rejected, beta 0.0": 10.1}, {"rejected, beta 0.5": 89.9}, {"points, beta 1.0": 230.0},
         {"points, beta 0.3": 600.0}, {"rejected by correlation, beta 0": 15.0},
         {"rejected by COCO, beta 0.0": 10.1}, {"rejected by KCC, beta 1.0": 89.9}],
    ),
    "feature-shift": (
        {f"{what}, correlation {r}": value for r in (0.5, 0.3)
         for what, value in (("false alarms", 12.0), ("detected", 90.0), ("right feature", 90.0))}
        | {"detected by marginals": 20.0},
        [{"detected by marginals": 20.1}, {"false alarms, correlation 0.3": 12.1},
         {"detected, correlation 0.5": 89.9}, {"right feature, correlation 0.3": 89.9}],
    ),
    "relative-uncertainty": (
        {"Rel-U": 80.0, "largest probability": 60.0},
        [{"Rel-U": 79.9}, {"largest probability": 60.1}],
    ),
    "predictive-uncertainty": (
        {"two members, mutual information": 0.6852, "two members, epistemic": 3.4465,
         "two members, total": 3.4544, "largest lead of entropy over total": 0.0,
         "AUROC, total": 90.0, "AUROC, entropy": 90.5},
        [{"two members, epistemic": 3.44}, {"largest lead of entropy over total": 1e-3},
         {"AUROC, entropy": 90.6}],
    ),
    "tarp": (
        {"exact": 0.059, "prior": 0.059, "half width": 0.081, "double width": 0.081,
         "shifted": 0.081, "prior, references near the data": 0.081},
        [{"exact": 0.06}, {"prior": 0.06}, {"half width": 0.08}, {"shifted": 0.08},
         {"prior, references near the data": 0.08}],
    ),
    "learning-to-reject": (
        {"surrogate": 0.108, "Bayes": 0.1, "confidence": 0.117},
        [{"Bayes": 0.099}, {"confidence": 0.116}],
    ),
    "correctness-calibration": (
        {"slope of cross-entropy": 0.346, "slope of correctness": -0.16,
         "ECE, correctness": 5.9, "ECE, cross-entropy": 10.0, "AUROC, correctness": 88.0,
         "AUROC, cross-entropy": 80.0},
        [{"slope of correctness": 0.16}, {"slope of cross-entropy": 0.34},
         {"ECE, correctness": 6.0}, {"AUROC, correctness": 87.9}],
    ),
    "uncertainty-fingerprint": (
        {"same prediction": 100.0, "alarms, healthy": 5.0, "alarms, rate 0.01": 60.0,
         "alarms, rate 0.05": 90.0, "alarms, rate 0.1": 90.0},
        [{"same prediction": 99.9}, {"alarms, healthy": 5.1}, {"alarms, rate 0.05": 89.9},
         {"alarms, rate 0.1": 89.9}, {"alarms, rate 0.01": 90.1}],
    ),
}  # fmt: skip
"""Numbers for which the claim just holds, and changes for which it does not."""


@pytest.mark.parametrize("slug", EDGES)
def test_a_check_gives_the_numbers_that_its_claim_reads(slug, monkeypatch):
    check = entries("check")[slug].factory
    for name, value in SMALL[slug].items():
        monkeypatch.setattr(inspect.getmodule(check), name, value)
    found = check(seeds=(3,))
    assert set(EDGES[slug][0]) <= set(found.numbers)
    assert all(math.isfinite(value) for values in found.numbers.values() for value in values)


@pytest.mark.parametrize("slug", EDGES)
def test_a_claim_holds_up_to_its_thresholds(slug):
    assert_edge(slug, *EDGES[slug])


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["skit", "relative-uncertainty", "tarp"])
def test_the_claim_holds_on_one_seed(slug):
    found = entries("check")[slug].factory(seeds=(0,))
    assert found.held, found.numbers
