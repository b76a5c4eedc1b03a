"""The report: its numbers are those of the rows, and it asks for nothing and runs nothing."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from rows import make
from testtime._core.errors import MissingExtra, RunError, WorkFailed
from testtime.bench.cells import stream_words
from testtime.bench.metrics import summarise
from testtime.bench.report import write_report
from testtime.bench.section import pooled
from testtime.bench.tables import styles
from testtime.bench.traces import POINTS, error_over_time, visits
from testtime.streams.scenarios import Scenario

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&\u2028'


class Page(HTMLParser):
    """Tags with their attributes, rows of tables, and scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.lines, self.scripts, self.text, self.open = [], [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.open += [tag] if tag not in {"meta", "link", "br", "path", "img"} else []
        if tag == "tr":
            self.lines.append({"name": "", "cells": {}})
        elif tag == "td" and "data-key" in attrs:
            self.lines[-1]["cells"][attrs["data-key"]] = float(attrs["data-value"])
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert tag == "path" or self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
            return
        self.text += data
        if self.open[-1:] == ["th"] and self.lines:
            self.lines[-1]["name"] += data


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Rows -> parsed page; plotly stands there as one word, to keep it small."""
    monkeypatch.setattr("testtime.bench.report._plotly", lambda: "/*plotly*/")

    def build(rows, **options):
        return Page(write_report(rows, tmp_path / "r.html", **options).read_text("utf-8"))

    return build


def test_every_number_of_the_summary_is_that_of_the_rows(page):
    rows = make(seeds=3)
    lines = {line["name"]: line["cells"] for line in page(rows).lines if line["cells"]}

    def mean(method, key):
        return np.mean([r[key] for r in rows if r["method"] == method])

    assert set(lines) == {"source", "tent"}
    for method, cells in lines.items():
        for key in set(cells) - {"gain", "time"}:
            assert cells[key] == pytest.approx(mean(method, key), rel=1e-12), key
        assert cells["gain"] == pytest.approx(mean("source", "error") - mean(method, "error"))
        assert cells["time"] == pytest.approx({"source": 1.0, "tent": 2.0}[method])


def test_numbers_are_shown_as_they_are_kept(page):
    rows = make(seeds=1, domains=("fog",))
    rows[0]["error"], rows[1]["error"] = 40.0, 30.0
    text = page(rows).text
    for shown in ("30.00", "+10.00", "(+25\xa0%)", "2.00"):
        assert shown in text


def test_the_heat_map_has_the_mean_of_each_method_in_each_domain(page):
    rows = make()
    cells = [
        (a["title"], float(a["data-value"]))
        for t, a in page(rows).tags
        if t == "td" and "data-value" in a and "data-key" not in a
    ]
    assert len(cells) == 4
    for title, value in cells:
        method, domain = re.match(r"(\w+), (\w+):", title).groups()
        own = [r["error"] for r in rows if (r["method"], r["domain"]) == (method, domain)]
        assert value == pytest.approx(np.mean(own), rel=1e-12)


def test_nothing_is_fetched(tmp_path):
    text = write_report(make(), tmp_path / "deep" / "r.html").read_text("utf-8")
    found = Page(text)
    loads = [
        v for _, a in found.tags for k, v in a.items() if k in {"src", "href", "srcset", "data"}
    ]
    assert loads == ["data:,"]
    styles_only = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"url\(|@import", styles_only)
    policy = next(a["content"] for _, a in found.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert "connect-src" not in policy
    assert "plotly.js v" in text


@pytest.mark.parametrize(
    "key", ["method", "options", "model", "data", "stream", "scenario", "domain", "version",
            "weights_sha256", "samples_sha256", "severity", "batch_size"],
)  # fmt: skip
def test_no_text_of_a_row_becomes_markup(page, key):
    plain = page(make(("tent",)), title="t")
    evil = page(make(("tent",)), title=EVIL)
    assert [t for t, _ in evil.tags] == [t for t, _ in plain.tags]
    evil = page(make(("tent",), **{key: EVIL}))
    assert {t for t, _ in evil.tags} <= {t for t, _ in plain.tags} | {"p"}
    assert len(evil.scripts) == 3
    assert not [a for _, a in evil.tags if "onerror" in a]
    assert json.loads(evil.scripts[0])["sections"]


def test_each_model_and_stream_has_its_section(page):
    other = Scenario.parse("continual,batch_size=8,domains=fog+snow,severity=3").to_toml()
    rows = make() + make(model="other") + make(severity=3, scenario=other)
    found = page(rows)
    assert sum(t == "section" for t, _ in found.tags) == 3
    assert sum(t == "option" for t, _ in found.tags) == 3
    assert len(json.loads(found.scripts[0])["sections"]) == 3


def test_the_command_repeats_the_stream(page):
    text = "recurring,sorted,rounds=4,severity=3,samples=50,domains=fog+snow"
    scenario = Scenario.parse(text)
    assert Scenario.parse(stream_words(scenario)) == scenario
    found = page(make(scenario=scenario.to_toml()))
    words = stream_words(scenario)
    assert (
        f"testtime bench --data set --model net --methods source,tent --stream {words}"
        in found.text
    )
    assert "--seeds 2 --out DIR" in found.text


@pytest.mark.parametrize(("other", "whole"), [("@299,342,bilinear", True), ("@299", False)])
def test_the_command_names_a_folder_of_which_each_model_sees_its_size(page, other, whole):
    text = page(
        make(model="torchvision:resnet18", data="folder:a b")
        + make(model="torchvision:inception_v3", data=f"folder:a b{other}")
    ).text
    assert ("testtime bench --data 'folder:a b' --model torchvision:resnet18," in text) == whole
    assert ("No single command makes this run" in text) != whole


@pytest.mark.parametrize("change", [{"options": '{"lr": 1}'}, {"seed": 7}, {"scenario": "x = 1"}])
def test_a_run_that_no_command_makes_says_so(page, change):
    text = page(make(**change)).text
    assert "testtime bench --data" not in text
    assert "No single command makes this run" in text


@pytest.mark.parametrize(
    "rows", [make(("tent",), ("fog",), 1, 1), make(("source",), ("fog",), 1), make(batches=0),
             make(error=math.nan, ece=math.inf), make(nll=None, seconds_per_batch=0.0)],
    ids=["one of each", "source alone", "no trace", "not finite", "none"],
)  # fmt: skip
def test_odd_runs_make_a_page_with_valid_data(page, rows):
    found = page(rows)
    assert "nan" not in found.text.lower()
    assert not re.search(r"NaN|Infinity", found.scripts[0])
    json.loads(found.scripts[0])


def test_error_over_time_against_a_loop():
    rng = np.random.default_rng(0)
    rows = [
        {"seed": seed, "trace": [
            {"batch": b, "samples": int(rng.integers(50, 300)), "error": 100 * rng.random()}
            for b in range(40)]}
        for seed in range(3)
    ]  # fmt: skip
    starts = (0, 13, 20)
    got = error_over_time(rows, starts)
    assert got["window"] == math.ceil(
        600 / (sum(t["samples"] for r in rows for t in r["trace"]) / 120)
    )
    for batch, running, cumulative in zip(
        got["batch"], got["running"], got["cumulative"], strict=True
    ):
        first = max(*(s for s in starts if s <= batch), batch - got["window"] + 1)
        for low, value in ((first, running), (0, cumulative)):
            own = [t for r in rows for t in r["trace"] if low <= t["batch"] <= batch]
            want = np.average([t["error"] for t in own], weights=[t["samples"] for t in own])
            assert value == pytest.approx(want, abs=1e-3)


def test_a_batch_without_finite_error_is_left_out():
    trace = [{"batch": i, "samples": 600, "error": e} for i, e in enumerate((50.0, math.nan, 20.0))]
    got = error_over_time([{"seed": 0, "trace": trace}], [0])
    assert got["running"] == [50.0, None, 20.0]
    assert got["cumulative"] == [50.0, 50.0, 35.0]


def test_a_long_stream_is_thinned_and_loses_no_batch():
    trace = [{"batch": i, "samples": 1, "error": 100.0 * (i % 10 == 0)} for i in range(100_000)]
    got = error_over_time([{"seed": 0, "trace": trace}], [0])
    assert len(got["batch"]) == POINTS
    assert got["batch"][-1] == 99_999
    assert got["window"] >= max(np.diff(got["batch"]))
    assert got["cumulative"][-1] == pytest.approx(10.0)


def test_visits_returns_mixtures_and_orders():
    fog = {"seed": 0, "domain": "fog", "trace": [{"batch": 0}, {"batch": 2}]}
    snow = {"seed": 0, "domain": "snow", "trace": [{"batch": 1}]}
    assert visits([fog, snow]).names == ("fog", "snow", "fog")
    assert "mixed" in visits([fog, snow | {"trace": [{"batch": 0}]}]).note
    swapped = [fog | {"seed": 1, "domain": "snow"}, snow | {"seed": 1, "domain": "fog"}]
    assert "another order" in visits([fog, snow, *swapped]).note


def test_pooled_bins_are_those_of_the_joined_samples():
    a = {"reliability": [{"count": 1, "confidence": 0.95, "accuracy": 1.0}]}
    b = {"reliability": [{"count": 3, "confidence": 0.99, "accuracy": 0.0}]}
    assert pooled([a, b]) == [{"count": 4, "confidence": 0.98, "accuracy": 0.25}]


def test_thirty_methods_look_different():
    look = styles(["source", *map(str, range(30))])
    for part in ("dash", "symbol"):  # of lines, and of points
        assert len({(one["slot"], one[part]) for one in look.values()}) == 31


def test_bad_rows_leave_an_old_report_as_it_was(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    broken = make()
    del broken[-1]["trace"]
    told = [*make(), make()[0] | {"error": "x"}]
    for rows, words in (
        ([], "got none"), (broken, "lack trace"), (told, "error of a row is 'x', which is no number"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=words):
            write_report(rows, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_is_told_of(tmp_path):
    (tmp_path / "r.html").mkdir()
    with pytest.raises(WorkFailed, match=r"the report cannot be written to .*r\.html: Is a"):
        write_report(make(), tmp_path / "r.html")


def test_runs_that_differ_in_how_they_were_run_have_names_of_their_own(page):
    rows = make() + make(threads=2) + make(paced=True, device="cuda")
    assert len(summarise(rows)) == 6  # and are never averaged
    text = page(rows).text
    assert all(words in text for words in ("set, 2 threads", "set, cuda, paced"))


def test_without_plotly(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match="bench"):
        write_report(make(), tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.extra
def test_chromium_draws_every_plot_without_an_error(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert not os.environ.get("CI"), "CI is meant to have Chromium"
        pytest.skip("no Chromium here")
    path = write_report(make(), tmp_path / "r.html")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/p",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=8000", "--dump-dom",
         path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count('class="main-svg"') >= 4
    assert re.search(r'<html[^>]* data-drawn="0"', done.stdout)
