"""How cost grows: plots and sentences of the page are those of the file, and counts are counted again."""

import json
import re

import pytest
from torch import nn

from scripts import BENCHMARKS, script

DOCS = BENCHMARKS.parent / "docs"
FOUND = json.loads((BENCHMARKS / "scale.json").read_text())


@pytest.fixture(scope="module")
def scale():
    return script("scale")


def told(text):
    """What the page says of how cost grows, on one line, without what stands out."""
    page = (DOCS / "performance.md").read_text().partition("## How it grows")[2]
    assert text in re.sub(r"\s+", " ", page.replace("*", ""))


def test_plots_are_those_of_the_numbers(scale, tmp_path):
    scale.draw(FOUND, tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(made) == 5
    assert made == {name: (DOCS / "plots" / name).read_text() for name in made}


def test_sentences_are_those_of_the_numbers():
    few, *_, many = FOUND["classes"]
    inference, step = (100 * (many[name] / few[name] - 1) for name in ("inference", "tent"))
    told(f"make inference {inference:.0f}% slower, and a step of `tent` {step:.0f}%")
    one = {row["ranks"]: row for row in FOUND["ranks"]}
    told(f"take {one[2]['together']:.0f} ms on two ranks ({one[2]['apart']:.0f} if they adapt")
    told(f"and {one[4]['together']:.0f} ms on four ({one[4]['apart']:.0f})")
    rows = {row["model"]: row for row in FOUND["parameters"]}
    ratios = [row["minimal step"] / row["inference"] for row in rows.values()]
    told(f"takes {min(ratios):.2f} to {max(ratios):.2f} times the multiplications of inference")
    small, large, huge = (rows[name] for name in ("resnet18", "vit_l_16", "vit_h_14"))
    told(f"has {huge['parameters'] / small['parameters']:.0f} times as many")
    told(f"{large['adapted']:,} values of {large['parameters'] / 1e6:.0f} million")
    assert max(row["adapted"] / row["parameters"] for row in rows.values()) < 0.003


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vit_b_16", marks=pytest.mark.slow)])
def test_multiplications_are_counted_again(scale, name):
    (row,) = scale.counted([name])
    assert row == next(row for row in FOUND["parameters"] if row["model"] == name)


def test_multiplications_of_a_network_known_by_hand(scale, monkeypatch):
    """Of a frozen layer the backward costs one forward; that of the first reaches nothing to learn."""

    def built(*_, **__):
        first, second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)
        return nn.Sequential(
            first, nn.GroupNorm(1, 8), second, nn.Flatten(), nn.Linear(4 * 224**2, 2)
        )

    monkeypatch.setattr(scale.torchvision.models, "get_model", built)
    (row,) = scale.counted(["any"])
    first, rest = 3 * 8 * 224**2, (8 * 4 + 2 * 4) * 224**2
    assert row["inference"] * 1e9 == pytest.approx(first + rest)
    assert row["minimal step"] * 1e9 == pytest.approx(first + 2 * rest)
