"""Hypothesis gives a test the same examples, whatever else is loaded, unless a search is on."""

import importlib.util
import sys

from hypothesis import given, settings
from hypothesis import strategies as st


def drawn() -> list[float]:
    found = []

    @settings(max_examples=300, derandomize=True, database=None)
    @given(st.lists(st.floats(0, 1), max_size=9))
    def keep(values):
        found.extend(values)

    keep()
    return found


def test_examples_do_not_depend_on_what_is_loaded(monkeypatch, tmp_path):
    before = drawn()
    path = tmp_path / "constants.py"
    path.write_text(f"NUMBERS = {[i / 1000 for i in range(1, 500)]}")
    spec = importlib.util.spec_from_file_location("constants", path)
    monkeypatch.setitem(sys.modules, "constants", importlib.util.module_from_spec(spec))
    assert (drawn() == before) is settings.default.derandomize
