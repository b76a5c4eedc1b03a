"""The small plots: points where they belong, one for every paper of two families, and none stale."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from scripts import script
from testtime.papers.catalogue import catalogue

ROOT = Path(__file__).parents[2]
FIGURES = {"mine": "information", "minde": "information"}
"""Papers whose plot is a figure of several."""
DRAWN = {
    "mec-bottleneck", "feature-shift", "learning-to-reject", "tarp", "predictive-uncertainty",
}  # fmt: skip
"""Plots that are computed, not read from what the checks found."""


@pytest.fixture(scope="module")
def plots():
    return script("small_plots")


def test_every_measure_and_monitor_has_a_plot_on_its_page(plots):
    for family, page in (("measure", "measures.md"), ("monitor", "monitors.md")):
        shown = re.findall(r"!\[[^]]+]\(images/([\w-]+)\.svg\)", (ROOT / "docs" / page).read_text())
        slugs = [record.slug for record in catalogue() if record.family == family]
        assert len(slugs) > 7
        for slug in slugs:
            assert FIGURES.get(slug, slug) in shown, slug
            assert slug in FIGURES or slug in plots.PLOTS, slug
        for name in shown:
            assert ET.parse(ROOT / f"docs/images/{name}.svg").getroot().tag.endswith("svg")


def test_what_the_checks_found_is_what_is_shown(plots):
    for slug in set(plots.PLOTS) - DRAWN:
        drawn = (ROOT / f"docs/images/{slug}.svg").read_text()
        assert plots.PLOTS[slug]() == drawn, f"python benchmarks/small_plots.py {slug}"


def test_points_lie_where_the_ticks_say():
    charts = script("charts")
    for log, points in (
        (False, [(0, 0), (5, 1), (10, 2)]),
        (True, [(1, 1), (10, 100), (100, 1e4)]),
    ):
        found = charts.chart(
            {"a": points}, x="x", y="y", log=(log, log), across=[p[0] for p in points]
        )
        dots = [
            tuple(map(float, each)) for each in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', found)
        ]
        lines = [float(each) for each in re.findall(r'd="M([\d.]+) \d+V', found)]
        levels = {float(each) for each in re.findall(r'd="M\d+ ([\d.]+)H', found)}
        assert [x for x, _ in dots] == lines
        assert {y for _, y in dots} <= levels
        assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
        assert dots[0][1] > dots[1][1] > dots[2][1]


def test_bars_stand_on_zero_and_are_as_high_as_their_values():
    found = script("charts").bars({"one": {"a": 1.0, "b": 3.0}, "two": {"a": 2.0}}, y="y")
    bars = re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', found)
    heights = [float(height) for _, height in bars]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.2)
    assert len({round(float(top) + float(height)) for top, height in bars}) == 1


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_has_a_few_round_ticks_within_it(log):
    charts = script("charts")
    for values in ([0.003, 0.004], [1, 2], [5, 9e4], [1e-6, 3], [0.5, 0.5]):
        axis = charts.axis(values, log=log)
        ticks = axis.ticks()
        assert 1 <= len(ticks) <= 8, (values, ticks)
        assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in ticks)
