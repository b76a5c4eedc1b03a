"""The small checks of decoding papers: numbers for which a claim just holds, and just fails."""

import importlib

import pytest

from edges import assert_edge
from testtime._core.registry import entries

MODULES = {
    "em-llm": "em_llm", "edt": "edt", "min-p": "min_p", "uscd": "uscd",
    "entropy-adaptive-decoding": "entropy_adaptive_decoding",
}  # fmt: skip
EDGES = {
    "em-llm": (
        {"entropy before": 2.0, "entropy after": 1.9, "best tokens kept": 1.0,
         "right ones likelier, log10": 1.01, "right ones in the tail likelier, log10": -0.1},
        [{"entropy after": 2.0}, {"best tokens kept": 0.9}, {"right ones likelier, log10": 1.0},
         {"right ones in the tail likelier, log10": 0.0}],
    ),
    "edt": (
        {f"{who}, T0 {a}, theta {b}": 0.8 + 0.1 * (who == "edt")
         for who in ("edt", "fixed") for a in (0.6, 0.8, 1.0) for b in (0.5, 1.0, 2.0)},
        [{"edt, T0 0.6, theta 2.0": 0.8}, {"fixed, T0 1.0, theta 0.5": 0.9}],
    ),
    "min-p": (
        {"min-p at 2.0, valid": 0.8, "top-p at 2.0, valid": 0.45, "min-p at 1.0, valid": 0.99,
         "top-p at 1.0, valid": 0.9, "min-p at 2.0, entropy": 2.8, "top-p at 2.0, entropy": 2.84},
        [{"top-p at 2.0, valid": 0.51}, {"top-p at 2.0, entropy": 2.86},
         {"top-p at 1.0, valid": 0.88}],
    ),
    "uscd": (
        {"probability, plain": 0.5, "probability, uscd": 0.56, "accuracy, plain": 0.5,
         "accuracy, uscd": 0.56, "sure rows changed": 0.0},
        [{"probability, uscd": 0.549}, {"accuracy, uscd": 0.549}, {"sure rows changed": 1.0}],
    ),
    "entropy-adaptive-decoding": (
        {"ead": 0.85, "at random": 0.82},
        [{"at random": 0.831}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("slug", EDGES)
def test_a_claim_holds_and_fails_at_its_edges(slug):
    assert_edge(slug, *EDGES[slug])


@pytest.mark.parametrize("slug", EDGES)
def test_the_claim_is_measured_on_a_seed(slug):
    found = entries("check")[slug].factory(seeds=(0,))
    module = importlib.import_module(f"testtime.papers.checks.{MODULES[slug]}")
    values = {name: each[0] for name, each in found.numbers.items()}
    assert found.held == bool(values.pop("claim held")) == module.holds(values)
