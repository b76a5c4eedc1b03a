"""The table of what every method costs: its counts, seen from outside the library, and its page."""

import json

import pytest
import torch
from torch import nn

from models import batches, tiny
from scripts import BENCHMARKS, script
from testtime._core.registry import entries, find

NUMBERS = BENCHMARKS / "every.json"
OPEN = ("stamp", "simatta")
"""Methods that learn from what they remember: its size, or when it is learnt, says how often."""
LESS = ("deyo", "roid", "eta", "eata", "rdumb", "sar", "rotta", "sqrl", "cotta", "petal", "psmt")
"""Methods that leave out what a batch does not ask for: samples that may not teach, steps that are
not due, views where the source is sure."""
SIZE = 8


@pytest.fixture(scope="module")
def every():
    return script("every")


class Transformer(nn.Module):
    """One of torchvision's, for images of the same size as the small networks take."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import VisionTransformer

        self.net = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=5)
        nn.init.normal_(self.net.heads[0].weight)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("name", entries("method"))
def test_passes_seen_from_outside_are_those_that_are_told(name, every):
    torch.manual_seed(0)
    model = Transformer().eval() if name == "foa" else tiny()
    x, y, z = batches(3, SIZE)
    model, adapter = every.adapted(name, model, torch.cat([x, y]), SIZE)
    theory = find("method", name).build().passes
    adapter(x)  # with the first batch a look at two samples, to see how the network is made
    before, most = adapter.counts, [2 * SIZE * each for each in theory or ()]
    with every.Passes(model, x) as passes:
        adapter(y)
        adapter(z)
    after, seen = adapter.counts, [passes.forwards, passes.backwards]
    assert seen == [after.forwards - before.forwards, after.backwards - before.backwards]
    assert (theory is None) == (name in OPEN)
    if name in LESS:
        assert all(own <= limit for own, limit in zip(seen, most, strict=True))
    elif theory is not None:
        assert seen == most


def test_every_method_is_measured_and_the_page_is_that_of_the_numbers(every, tmp_path):
    found = json.loads((BENCHMARKS / "every.json").read_text())
    assert {row["name"] for row in found["rows"]} == set(entries("method"))
    for row in found["rows"]:
        assert [row["forwards"], row["backwards"]] == row["told"]
    page, docs = tmp_path / "page.md", BENCHMARKS.parent / "docs" / "performance.md"
    page.write_text(docs.read_text())
    every.page(page, found)
    assert page.read_text() == docs.read_text()
