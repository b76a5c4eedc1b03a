"""Of every k batches one teaches."""

from pathlib import Path

import pytest
import torch

import testtime as tt
from battery import ALL, adapter_of, alike, recipe_of
from models import batches, tiny
from testtime._core.errors import OptionError
from testtime._core.outcomes import Outcome
from testtime.adaptation.deferred import answers_last

PAGE = Path(__file__, "../../../docs/deploying.md").resolve()


@pytest.mark.parametrize("name", ["tent", "sar", "cotta", "memo", "adanpc"])
@pytest.mark.parametrize("deferred", [False, True])
def test_of_k_batches_the_first_teaches(name, deferred):
    if deferred and answers_last(recipe_of(name)):
        return
    adapter = adapter_of(name, every=3, deferred=deferred)
    plain, xs = adapter_of(name), batches(7)
    for number, x in enumerate(xs):
        if number % 3 == 0:
            assert torch.equal(adapter(x), plain(x))
            continue
        mark, before = adapter.snapshot(), adapter.counts
        told = adapter.predict(x)
        spent = adapter.counts.forwards - before.forwards if name != "memo" else 0
        before = adapter.counts
        assert torch.equal(adapter(x), told)
        assert adapter.counts.backwards == before.backwards
        if name not in ("memo", "cotta"):
            assert adapter.counts.forwards - before.forwards == len(x) == spent or spent == 0
        assert adapter.events[-1].outcome is Outcome.NOT_DUE
        assert alike(mark.tensors, adapter.snapshot().tensors)
        mine = adapter.snapshot()
        plain.restore(mine)
    assert adapter.counts.spared == 4
    assert adapter.counts.steps == 7


MORE = {
    "cotta": 3, "petal": 3, "psmt": 4, "stamp": 3, "vcotta": 6, "rmt": 2, "domainadaptor": 2, "dent": 7,
}  # fmt: skip
"""Methods of which an answer takes more than a forward, with two views where there are any."""


@pytest.mark.parametrize("name", [name for name in ALL if name != "rotta"])  # its own `every`
def test_an_answer_between_updates_costs_a_forward_or_what_the_page_says(name):
    adapter, (x, y) = adapter_of(name, every=3), (x.sigmoid() for x in batches(2))
    adapter(x)
    before = adapter.counts
    adapter(y)
    after = adapter.counts
    assert after.forwards - before.forwards == MORE.get(name, 1) * len(y)
    assert (after.backwards > before.backwards) == (name in ("domainadaptor", "dent"))
    said = PAGE.read_text("utf-8").split("## Every so many batches")[1].split("##")[0]
    assert (f"`{name}`" in said.split("A saved state")[0]) == (name in MORE)


def test_thinning_goes_on_where_a_file_left_off(tmp_path):
    xs = batches(6)
    one, two = (tt.adapt(tiny(), "tent", every=2) for _ in range(2))
    for x in xs[:3]:
        one(x)
    one.save(tmp_path / "state")
    two.load(tmp_path / "state")
    assert all(torch.equal(one(x), two(x)) for x in xs[3:])
    assert [e.outcome for e in two.events] == [Outcome.NOT_DUE, Outcome.ADAPTED, Outcome.NOT_DUE]


def test_a_method_with_an_every_of_its_own_keeps_it():
    assert tt.adapt(tiny(), "rotta", every=16, capacity=16).recipe.procedure.every == 16
    assert tt.adapt(tiny(), "rotta", every=16, capacity=16)._every == 1
    for wrong in (0, 1.5, "a", True):
        with pytest.raises(OptionError, match="every is"):
            tt.adapt(tiny(), "tent", every=wrong)
