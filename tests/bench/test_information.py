"""The bench of estimators of information: whole, drawn and told as it is, and within its tolerances."""

import json
import math

import pytest

from scripts import script


@pytest.fixture(scope="module")
def bench():
    return script("information")


@pytest.fixture(scope="module")
def rows(bench):
    return json.loads(bench.NUMBERS.read_text())


def test_every_estimator_was_tried_on_every_law_with_every_seed(bench, rows):
    assert bench._left(rows) == []
    for law, levels in bench.LAWS.items():
        own = [row for row in rows if row["law"] == law]
        tried = {n for n in [*bench.ESTIMATORS, *bench.ONLY] if bench.ONLY.get(n, law) == law}
        assert len(own) == len(tried) * len(levels) * len(bench.SEEDS)
        assert len({(row["estimator"], row["truth"], row["seed"]) for row in own}) == len(own)


def test_figure_and_page_show_these_numbers(bench, rows):
    assert bench.FIGURE.read_text() == bench.figure(rows)
    told = bench.PAGE.read_text()
    assert bench.page(told, rows) == told
    assert all(line in told for line in bench.errors(rows))


def test_estimators_are_told_apart_without_their_colours(bench):
    assert set(bench.STYLES) == set(bench.ESTIMATORS) - set(bench.ONLY)
    colours, marks, dashes = zip(*bench.STYLES.values(), strict=True)
    assert len(set(colours)) == len(set(marks)) == len(colours)
    for name, path, dash in zip(bench.STYLES, marks, dashes, strict=True):
        assert path in bench.mark(name, "0,0")
        assert dash in bench.drawn_line(name, ["0,0", "1,1"])


@pytest.mark.parametrize("law", ["Gaussian", "cubed"])
@pytest.mark.parametrize("name", ["MINE", "MINDE"])
def test_at_every_seed_the_checked_estimators_are_within_their_tolerances(bench, rows, name, law):
    own = [row for row in rows if (row["estimator"], row["law"]) == (name, law)]
    assert len(own) == 12
    for row in own:
        assert bench.error(row) <= bench.tolerance(row), row


def test_what_is_told_is_the_error_that_is_largest_for_its_tolerance(bench):
    def row(truth, value):
        return {"estimator": "MINE", "law": "cubed", "truth": truth, "value": value, "seed": 0}

    found = [row(0.0, -0.02), row(4.0, 3.9), row(0.5, 0.51)]
    assert bench.worst(found) == "0.020 / 0.030 at 0.00"
    assert bench.worst([*found, row(4.0, 4.41)]) == "**0.410 / 0.400 at 4.00**"
    assert bench.worst([*found, row(4.0, None)]) == "**diverged / 0.400 at 4.00**"
    assert bench.worst([row(1.0, -1e9)]) == "**1e+09 / 0.100 at 1.00**"
    assert bench.worst([]) == ""
    assert bench.tolerance({"estimator": "MINDE, joint", "truth": 2.0}) == pytest.approx(0.3)
    assert bench.tolerance({"estimator": "KSG, as it is", "truth": 0.1}) == 0.05
    assert math.isinf(bench.error(row(1.0, None)))
