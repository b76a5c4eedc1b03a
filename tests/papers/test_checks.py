"""The small checks of papers."""

import pytest

from testtime._core.registry import entries
from testtime.papers.catalogue import catalogue, record, search


def test_the_catalogue_names_each_paper_once():
    slugs = [r.slug for r in catalogue()]
    assert len(slugs) == len(set(slugs)) > 200
    assert record("sar").symbols == ("testtime.adaptation.methods.sar.sar",)
    assert [r.slug for r in search("dynamic wild world")] == ["sar"]


def test_methods_that_have_a_check():
    assert set(entries("check")) >= {"tent", "lame"}


@pytest.mark.slow
def test_tent_holds_on_one_seed():
    result = entries("check")["tent"].factory(seeds=(0,))
    assert result.held
    assert result.seeds == [0] or result.seeds == (0,)
    assert result.numbers["tent"][0] > result.numbers["source"][0] + 30
