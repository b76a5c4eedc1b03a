"""Examples that other runs leave out, as they need the real model, do and print what they show."""

import doctest
import functools
from importlib import import_module
from pathlib import Path

import pytest

from testtime.decode import models

ROOT = Path(__file__).parents[2]


def left_out() -> tuple[list[doctest.DocTest], int]:
    """Docstrings and pages with such examples, and how many of them there are in all files."""
    parse, found, count = doctest.DocTestParser().get_doctest, [], 0
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        text = path.read_text("utf-8")
        if "+SKIP" in text:
            count += text.count("+SKIP")
            if path.suffix == ".md":
                found.append(parse(text, {}, path.name, str(path), 0))
            else:
                name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
                found += doctest.DocTestFinder().find(import_module(name))
    return [t for t in found if any(doctest.SKIP in e.options for e in t.examples)], count


@pytest.mark.extra
def test_what_needs_the_real_model_runs(monkeypatch):
    monkeypatch.setattr(models, "load_language_model", functools.cache(models.load_language_model))
    tests, count = left_out()
    skipped = [e for test in tests for e in test.examples if e.options.pop(doctest.SKIP, False)]
    assert len(skipped) == count > 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert [test.name for test in tests if runner.run(test).failed] == []
