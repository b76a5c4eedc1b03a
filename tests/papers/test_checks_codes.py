"""The small checks of sweet, llmzip, codepromptzip and prp-sorting, at sizes that take a moment."""

import math

import pytest

from testtime._core.registry import find
from testtime.papers.checks import codepromptzip, llmzip, prp_sorting, sweet

EDGES = {
    prp_sorting: (
        {"heapsort": 100.0, "quicksort, batch 2": 64.9, "bubblesort": 100.0,
         "bubblesort, cached": 84.9, "same top 10": 1.0},
        [{"quicksort, batch 2": 65.0}, {"bubblesort, cached": 85.0}, {"same top 10": 0.99}],
    ),
    sweet: (
        {"z, plain": 4.1, "z, sweet": 4.2, "wrong, plain": 0.1, "wrong, sweet": 0.09},
        [{"z, plain": 4.0}, {"z, sweet": 4.1}, {"wrong, sweet": 0.1}],
    ),
    llmzip: (
        {"order 1": 2.2, "order 3": 2.1, "order 5": 2.0, "bz2": 2.1, "zlib": 2.2, "bound": 1.985,
         "whole bits": 2.0, "decoded": 1.0},
        [{"bz2": 2.0}, {"zlib": 2.1}, {"bound": 1.97}, {"bound": 2.03}, {"whole bits": 1.99},
         {"order 3": 2.0}, {"order 1": 2.1}, {"decoded": 0.0}],
    ),
    codepromptzip: (
        {"by kind": 50.0, "random": 46.9, "reverse": 19.9},
        [{"random": 47.0}, {"reverse": 20.0}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("module", EDGES, ids=lambda module: module.__name__.split(".")[-1])
def test_a_claim_holds_up_to_its_edges(module):
    just, broken = EDGES[module]
    assert module.holds(just)
    for change in broken:
        assert not module.holds({**just, **change}), change


def small(module, monkeypatch, **sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    slug = module.__name__.split(".")[-1].replace("_", "-")
    found = find("check", slug).factory(seeds=[0])
    assert set(EDGES[module][0]) <= set(found.numbers)
    assert all(math.isfinite(value) for values in found.numbers.values() for value in values)
    return {name: values[0] for name, values in found.numbers.items()}


def test_sorting(monkeypatch):
    found = small(prp_sorting, monkeypatch, LISTS=3, ITEMS=20, TOP=4)
    assert found["same top 10"] == 1
    assert found["quicksort, batch 2"] < found["quicksort"]
    assert found["bubblesort, cached"] < found["bubblesort"] == 19 + 18 + 17 + 16


def test_watermark(monkeypatch):
    found = small(sweet, monkeypatch)
    assert found["z, sweet"] > 4 > abs(found["z, unmarked"])


def test_text(monkeypatch):
    found = small(llmzip, monkeypatch, KNOWN=6000, HELD=400)
    assert found["decoded"] == 1
    assert found["order 5"] == pytest.approx(found["bound"], rel=0.01, abs=64 / 400)
    assert found["order 5"] <= found["whole bits"]


def test_code(monkeypatch):
    code = [
        "def f{0}(a):\n    return tell{0}(a, {0})",
        "def g{0}(b):\n    for x in b: {1}.append(x)",
    ]
    known = [(name, text.format(n, name)) for n in range(30)
             for name, text in zip(("tell", "list"), code, strict=True)]  # fmt: skip
    monkeypatch.setattr(codepromptzip, "_functions", lambda: known)
    found = small(codepromptzip, monkeypatch, BASE=40, ASKED=20)
    assert found["whole"] == 100
    assert found["by kind"] >= found["reverse"]


def test_functions_of_the_library_are_read_without_their_docstrings(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text(
        'class A:\n    def f(self):\n        """Told."""\n        return self.g(1)  # why\n'
        'def empty():\n    """Told."""\n'
    )
    monkeypatch.setattr(codepromptzip.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(codepromptzip, "SHORTEST", 1)
    monkeypatch.setattr(codepromptzip, "EACH", 1)
    found = codepromptzip._functions.__wrapped__()
    assert found == [
        ("one", "def empty():\n    pass"),
        ("one", "def f(self):\n    return self.g(1)"),
    ]
