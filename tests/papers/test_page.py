"""The page of reproductions, written from the numbers of the checks."""

from scripts import script
from testtime._core.registry import entries

page = script("reproductions").page
CHECKS = {entry.paper: entry for entry in entries("check").values()}


def test_a_page_has_a_line_and_a_part_for_each_paper():
    found = {
        "claim": "n < 2", "held": False, "seeds": [0, 1], "seconds": 12.3, "machine": "a machine",
        "numbers": {"n": [1.0, 2.0], "claim held": [1.0, 0.0]},
    }  # fmt: skip
    text = page({"tent": found}, CHECKS)
    assert "| [tent](#tent) | not held (1 of 2) | 12 |" in text
    assert "| n | 1.00 | 2.00 |" in text
    assert "| **claim held** | yes | no |" in text
    assert "Claim: n < 2" in text
    assert found["numbers"]["claim held"] == [1.0, 0.0]
