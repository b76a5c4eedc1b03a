"""The report: what it shows, and that nothing in the rows can act in the page."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from testtime._core.errors import MissingExtra, RunError
from testtime.bench.figures import over_time, pooled, running_error, segments, styles
from testtime.bench.report import embed, write_report

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"


def row(method="tent", domain="fog", *, seed=0, start=0, errors=(50.0, 0.0), **changes):
    trace = [{"batch": start + i, "samples": 4, "error": e} for i, e in enumerate(errors)]
    return {
        "cell": f"{method}{seed}", "method": method, "options": "{}", "model": "m", "data": "d",
        "stream": "continual", "scenario": "pattern = 1", "severity": 5, "batch_size": 4,
        "seed": seed, "domain": domain, "position": 0, "samples": 8,
        "error": sum(errors) / len(errors), "nll": 0.5, "brier": 0.25, "ece": 0.125,
        "clean_error": 7.5, "source_clean_error": 7.0, "seconds_per_batch": 0.0123,
        "forwards_per_sample": 1.0, "backwards_per_sample": 0.75, "peak_memory_mb": 12.0,
        "weights_sha256": "a" * 64, "samples_sha256": "b" * 64, "version": "0.1.0", "trace": trace,
        "reliability": [{"count": 8, "confidence": 0.9, "accuracy": 0.75}], **changes,
    }  # fmt: skip


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.cells, self.last = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.last = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.last = ""

    def handle_data(self, data):
        if self.last == "script":
            self.scripts[-1] += data
        if self.last == "td":
            self.cells.append(data)


@pytest.fixture
def light(monkeypatch):
    """plotly as a word, to keep the page small."""
    pytest.importorskip("plotly")
    monkeypatch.setattr("testtime.bench.report._plotly", lambda: "/*plotly*/")


def test_running_error_weighs_batches_by_samples_and_joins_domains():
    one = {"trace": [{"batch": 0, "samples": 3, "error": 100.0}]}
    two = {
        "trace": [
            {"batch": 0, "samples": 1, "error": 0.0},
            {"batch": 1, "samples": 4, "error": 50.0},
        ]
    }
    assert running_error([one, two]) == ([1, 2], [75.0, 62.5])


def test_changes_of_domain_are_marked_and_a_return_too():
    again = row(domain="fog", start=0)
    again["trace"] += [{"batch": 4, "samples": 4, "error": 0.0}]
    rows = [again, row(domain="snow", start=2)]
    assert segments(rows) == [(1, 2, "fog"), (3, 4, "snow"), (5, 5, "fog")]
    shapes = over_time(rows, styles(rows))["layout"]["shapes"]
    assert [s["x0"] for s in shapes] == [2.5, 4.5]


def test_mixed_batches_have_no_changes():
    assert segments([row(domain="fog"), row(domain="snow")]) == []


def test_pooled_bins_are_those_of_the_joined_samples():
    a = row(reliability=[{"count": 1, "confidence": 0.95, "accuracy": 1.0}])
    b = row(reliability=[{"count": 3, "confidence": 0.99, "accuracy": 0.0}])
    assert pooled([a, b]) == [
        {"count": 4, "confidence": pytest.approx(0.98), "accuracy": pytest.approx(0.25)}
    ]


def test_table_shows_the_means(light, tmp_path):
    rows = [row(errors=(40.0,)), row(seed=1, errors=(20.0,)), row("source", errors=(60.0,))]
    page = Page(write_report(rows, tmp_path / "r.html").read_text())
    want = ["30.0 ± 10.0", "7.5", "0.500", "0.250", "12.5", "12.3", "1.00", "0.75", "12"]
    assert page.cells[:9] == want
    assert page.cells[9] == "60.0"


def test_every_setting_has_its_own_section(light, tmp_path):
    rows = [row(), row(severity=3), row(model="n"), row(scenario="pattern = 2")]
    page = Page(write_report(rows, tmp_path / "r.html").read_text())
    assert sum(tag == "section" for tag, _ in page.tags) == 4
    figures = json.loads(page.scripts[1])
    assert [attrs["data-figure"] for _, attrs in page.tags if "data-figure" in attrs] == [
        str(i) for i in range(len(figures))
    ]
    assert len(figures) == 16


@pytest.mark.parametrize(
    "key", ["method", "options", "model", "data", "stream", "scenario", "domain", "version", "cell"]
)
def test_no_text_of_a_row_becomes_markup(light, tmp_path, key):
    plain = Page(write_report([row()], tmp_path / "a.html", title="t").read_text())
    evil = Page(write_report([row(**{key: EVIL})], tmp_path / "b.html", title=EVIL).read_text())
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in plain.tags]
    assert len(evil.scripts) == 3
    assert "<img" not in json.dumps(json.loads(evil.scripts[1]))  # plotly reads text as markup


def test_numbers_that_are_not_finite(light, tmp_path):
    page = Page(write_report([row(nll=float("nan"))], tmp_path / "r.html").read_text())
    assert "not finite" in page.cells
    assert json.loads(embed({"a": [float("inf"), 1.5]})) == {"a": [None, 1.5]}


def test_nothing_is_fetched(tmp_path):
    pytest.importorskip("plotly")
    text = write_report([row()], tmp_path / "deep" / "r.html").read_text()
    page = Page(text)
    assert not [a for _, a in page.tags if "src" in a or "href" in a]
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert len(re.findall(r"plotly\.js v\d", text)) == 1


def test_bad_rows_leave_an_old_report_as_it_was(tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(RunError, match="no rows"):
        write_report([], path)
    broken = row()
    del broken["trace"]
    with pytest.raises(RunError, match="lack trace"):
        write_report([row(), broken], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_plotly(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match="bench"):
        write_report([row()], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
