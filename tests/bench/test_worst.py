"""The worst class and the worst domain of a stream: counted in parts, stored, and shown."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from rows import make
from testtime._core.errors import InputError
from testtime.bench.cells import plan
from testtime.bench.metrics import (
    ENOUGH,
    NO_CLASS,
    OPEN_SET,
    Score,
    ranked,
    summarise,
    worst_class,
)
from testtime.bench.models import load_model
from testtime.bench.report import write_report
from testtime.bench.runner import run
from testtime.bench.store import piece, read_cell, read_run, write_cell
from testtime.bench.tables import styles, summary
from testtime.bench.trial import Domain
from testtime.cli.bench import print_summary
from testtime.cli.main import app
from testtime.streams.data import load_data
from testtime.streams.scenarios import UNKNOWN, Scenario

STREAM = Scenario(domains=("fog", "contrast"), batch_size=50, samples=400)
COLUMNS = tuple(NO_CLASS)


def cells(stream=STREAM, **options):
    return plan(methods=["bn-adapt"], models=["embedded:batch"], data="fashion-mnist:sample",
                streams=[stream], seeds=1, **options)  # fmt: skip


def reference(logits, labels, enough=ENOUGH):
    logits, labels = np.asarray(logits), np.asarray(labels)
    wrong = (logits.argmax(1) != labels) | ~np.isfinite(logits).all(1)
    seen = [c for c in range(logits.shape[1]) if (labels == c).sum() >= enough]
    if not seen:
        return NO_CLASS
    errors = [100 * wrong[labels == c].mean() for c in seen]
    worst = int(np.argmax(errors))
    return {"worst_class": str(seen[worst]), "worst_class_error": pytest.approx(errors[worst])}


def scored(logits, labels):
    score = Score()
    score.add(logits, labels)
    return score


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 500), st.integers(1, 6), st.integers(0, 2**31), st.data())
def test_parts_give_what_all_at_once_gives(samples, classes, seed, data):
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=chance)
    logits = torch.randn(samples, classes, generator=chance)
    logits[torch.rand(samples, generator=chance) < 0.1] = torch.nan
    domains = [Score() for _ in range(data.draw(st.integers(1, 4)))]
    size = data.draw(st.integers(1, samples))
    for place, (own, answers) in enumerate(
        zip(logits.split(size), labels.split(size), strict=True)
    ):
        domains[place % len(domains)].add(own, answers)
    used = [score for score in domains if score.samples]
    whole = scored(logits, labels)
    assert worst_class(used) == worst_class([whole]) == reference(logits, labels)
    assert all(score.classes.shape == (2, classes) for score in used)


def test_a_class_of_few_samples_does_not_decide():
    labels = torch.tensor([0] * 200 + [1] * (ENOUGH - 1))
    logits = torch.eye(2)[[0] * 180 + [1] * 20 + [0] * (ENOUGH - 1)]  # all of class 1 are wrong
    score = scored(logits, labels)
    assert worst_class([score]) == {"worst_class": "0", "worst_class_error": 10.0}
    score.add(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert worst_class([score], ["cat", "dog"]) == {
        "worst_class": "dog",
        "worst_class_error": 100.0,
    }
    assert worst_class([scored(logits[-9:], labels[-9:]), Score()]) == NO_CLASS
    assert worst_class([Score()]) == NO_CLASS


def test_a_domain_of_unknown_samples_only_has_no_value():
    domain = Domain(opened=True)
    domain.add(0, torch.eye(2), torch.tensor([UNKNOWN, UNKNOWN]), None)
    row = domain.row()
    assert row["samples"] == 0
    assert all(math.isnan(row[name]) for name in ("error", "nll", "brier", "ece"))
    assert all(row[name] is None for name in OPEN_SET)


@pytest.mark.parametrize("value", [0.0, math.nan])
@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_without_a_class_is_refused_before_anything_is_counted(value, label):
    score = scored(torch.eye(2), torch.tensor([0, 0]))
    before = {name: torch.as_tensor(value).clone() for name, value in vars(score).items()}
    with pytest.raises(InputError, match="expected 0 to 1"):
        score.add(torch.full((1, 2), value), torch.tensor([label]))
    for name, kept in before.items():
        assert torch.equal(torch.as_tensor(getattr(score, name)), kept), name


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("paced", [False, True])
def test_rows_of_a_run_have_the_worst_class_of_their_whole_stream(tmp_path, paced):
    rows = read_run(tmp_path) if run(cells(paced=paced), tmp_path, jobs=0) else []
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    sent = list(STREAM.stream(data, seed=0))
    with torch.no_grad():
        logits = torch.cat([model(batch.inputs) for batch in sent])
    expected = reference(logits, torch.cat([batch.labels for batch in sent]))
    assert [{name: row[name] for name in COLUMNS} for row in rows[:2]] == [expected] * 2
    assert rows[2]["worst_class_error"] == rows[3]["worst_class_error"] < 100


@pytest.mark.usefixtures("few_images")
def test_an_open_stream_has_the_worst_of_its_known_classes(tmp_path):
    stream = Scenario(
        domains=("clean",), batch_size=50, samples=600, unknown=("class:9",), unknown_share=0.25
    )
    rows = run(cells(stream), tmp_path, jobs=0)
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    sent = list(stream.stream(data, seed=0))
    labels = torch.cat([batch.labels for batch in sent])
    with torch.no_grad():
        logits = torch.cat([model(batch.inputs) for batch in sent])
    expected = reference(logits[labels >= 0], labels[labels >= 0])
    assert {name: rows[0][name] for name in COLUMNS} == expected


@pytest.mark.usefixtures("few_images")
def test_classes_of_a_folder_have_their_names(tmp_path):
    for name in ("cat", "dog"):
        for number in range(ENOUGH):
            path = tmp_path / "photos" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Cat(nn.Module):\n    def forward(self, x):\n"
        "        return torch.eye(2)[:1].repeat(len(x), 1)\n\ndef build():\n    return Cat()\n"
    )
    done = CliRunner().invoke(app, [
        "bench", "--methods", "source", "--model", f"file:{tmp_path}/net.py@build", "--seeds", "1",
        "--stream", "stationary,domains=clean,batch_size=20", "--out", str(tmp_path / "run"), "--json",
        "--data", f"folder:{tmp_path}/photos@8",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert {name: row[name] for name in COLUMNS} == {
        "worst_class": "dog",
        "worst_class_error": 100.0,
    }


def test_means_over_seeds_are_of_the_worst_of_each():
    rows = make(("tent",), seeds=2, samples=ENOUGH)
    for row, error in zip(rows, (10.0, 80.0, 90.0, 20.0), strict=True):  # by seed, then domain
        row["error"] = error
    for row in rows:
        row["worst_class_error"] = 60.0 + row["seed"]
    (record,) = summarise(rows)
    assert record["worst_domain_error"] == 85.0  # means over seeds alone would hide it: 50 and 50
    assert record["worst_class_error"] == 60.5
    assert record["worst_class"] == "0, 1"
    assert record["error"] == 50.0


@pytest.mark.parametrize(
    "changes", [{"domains": ("fog",)}, {"samples": ENOUGH - 1}, {"error": math.nan}]
)
def test_no_domain_is_the_worst_of_one_of_few_samples_or_without_numbers(changes):
    for record in summarise(make(**{"samples": ENOUGH} | changes)):
        assert "worst_domain_error" not in record


def test_a_domain_of_few_samples_does_not_decide():
    rows = make(("tent",), seeds=1, domains=("fog", "snow", "frost"), samples=ENOUGH)
    for row, error in zip(rows, (10.0, 30.0, 80.0), strict=True):
        row["error"] = error
    rows[2]["samples"] = ENOUGH - 1
    assert summarise(rows)[0]["worst_domain_error"] == 30.0


@pytest.mark.usefixtures("few_images")
def test_runs_of_before_go_on_and_are_shown_without(tmp_path, capsys):
    first = run(cells(), tmp_path, jobs=0)
    for cell in cells():
        old = [
            {name: value for name, value in row.items() if name not in COLUMNS}
            for row in read_cell(tmp_path, cell.key) or ()
        ]
        write_cell(tmp_path, cell.key, old)
    stamps = [piece(tmp_path, cell.key).stat().st_mtime_ns for cell in cells()]
    rows = run(cells(), tmp_path, jobs=0)
    assert [piece(tmp_path, cell.key).stat().st_mtime_ns for cell in cells()] == stamps
    assert rows == read_run(tmp_path)
    assert rows == [{n: v for n, v in row.items() if n not in COLUMNS} for row in first]
    print_summary(rows)
    shown = capsys.readouterr().out
    assert "worst domain: error % there" in shown  # of numbers that were always stored
    assert "class" not in shown
    page = write_report(rows, tmp_path / "r.html").read_text("utf-8")
    assert "worst_domain_error" in page
    assert "worst_class_error" not in page
    new = [row for row in first if row["method"] == "source"] + rows[2:]
    records = {record["method"]: record for record in ranked(new)[0]}
    assert math.isnan(records["bn-adapt"].get("worst_class_error", math.nan))
    assert records["source"]["worst_class_error"] == first[0]["worst_class_error"]
    assert "worst_class_error" in write_report(new, tmp_path / "r.html").read_text("utf-8")


def test_one_seed_of_before_leaves_the_mean_over_seeds_blank():
    rows = make(("tent",), seeds=2)
    for row in rows[:2]:
        del row["worst_class"], row["worst_class_error"]
    (record,) = summarise(rows)
    assert math.isnan(record["worst_class_error"])
    assert "–</td>" in summary([ranked(rows)[0][0]], styles(["tent"]))  # noqa: RUF001


@pytest.mark.parametrize(
    ("width", "opened", "paced"),
    [
        (100, {}, {}),
        (100, dict.fromkeys(("auroc", "fpr95", "oscr", "h_score"), 0.12), {}),
        (80, {}, {"paced_error": None, "paced_share": None}),
    ],
)
def test_the_table_fits_its_terminal(capsys, monkeypatch, width, opened, paced):
    monkeypatch.setenv("COLUMNS", str(width))
    scenario = Scenario(unknown=("noise",) if opened else ()).to_toml()
    rows = make(("source", "bn-adapt"), samples=999, peak_memory_mb=1234.0, scenario=scenario,
                **opened, **paced)  # fmt: skip
    print_summary(rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["error", "method", *sorted(
        ("source", "bn-adapt"), key=[r["method"] for r in ranked(rows)[0]].index
    )]  # fmt: skip
    assert lines[5].startswith("mean over domains")
    assert lines[-1].startswith(f"worst class, worst domain: error % there, of {ENOUGH} samples")
    best = ranked(rows)[0][0]
    for key in ("worst_class_error", "worst_domain_error"):
        assert f" {best[key]:.1f} " in lines[3]


def test_the_report_names_the_class_as_text():
    evil = '"><script>'
    shown = summary(ranked(make(worst_class=evil, samples=99))[0], styles(["source", "tent"]))
    assert 'title="class &quot;&gt;&lt;script&gt;"' in shown
    assert evil not in shown
    assert shown.count('data-key="worst_domain_error"') == 2
