"""A budget that is spent on a part of each batch; the clock is a list here."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import testtime as tt
from interrupts import interrupted
from models import Deep, batches, tiny
from testtime._core.errors import StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation import budget as module
from testtime.adaptation.budget import PART
from testtime.adaptation.engine import Engine
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.outputs import leaves
from testtime.measures.entropy import entropy


def used(adapter: tt.Adapter) -> set[int]:
    """How many samples its updates were of."""
    return {int(event.measured["used"]) for event in adapter.events if event.measured["used"]}


METHODS = {
    "tent": {}, "sar": {"margin": 2.0}, "eta": {"margin": 2.0, "redundancy": 1.0},
    "deyo": {"entropy_margin": 2.0, "drop_margin": -1.0},
}  # fmt: skip
"""With options by which all may teach."""


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_where_samples_are_apart_a_part_of_each_batch_teaches(name, deferred, costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(tiny("group"), name, budget=0.5, deferred=deferred, **METHODS[name])
    xs = batches(40, size=32)
    for x in xs[:-1]:
        adapter(x)
    mark, wanted = adapter.snapshot(), adapter.predict(xs[-1])
    answer = adapter(xs[-1])
    torch.testing.assert_close(answer, wanted)
    told, event = adapter.plan().spending, adapter.events[-1]
    assert told.updates > 0.8
    assert told.learnt == pytest.approx(0.25, abs=0.01)
    assert told.total == pytest.approx(0.5, abs=0.02)
    assert event.samples == 32
    assert event.entropy == pytest.approx(float(entropy(answer).mean()), rel=1e-4)
    assert (adapter.counts.samples, adapter.snapshot().samples) == (40 * 32, 40 * 32)
    assert adapter.snapshot().steps == adapter.counts.steps == 40
    some = xs[-1][mark.account["parts"] % 4 :: 4]
    alone = adapter._engine.step(some, mark).state  # a step of the method on these eight
    for key, tensor in adapter.snapshot().tensors.items():
        assert torch.equal(tensor, alone.tensors[key])
    assert adapter.counts.updates > 30


def test_no_layer_is_left_out_where_samples_are_apart(costs):
    for norm, layers in ((nn.BatchNorm2d, 5), (partial(nn.GroupNorm, 1), 8)):
        adapter = tt.adapt(Deep(norm).eval(), "tent", budget=0.05)
        adapter(batches(1)[0])
        assert adapter.plan().spending.layers == layers


def test_no_layer_is_left_out_while_answers_that_are_no_numbers_hide_it(costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(Deep(partial(nn.GroupNorm, 1)).eval(), "tent", budget=0.05)
    for x in (torch.full((32, 3, 8, 8), 3e38), *batches(4, size=32)):
        adapter(x)
        assert adapter.plan().spending.layers == 8


@pytest.mark.parametrize("deferred", [False, True])
def test_samples_without_an_answer_cost_the_update_of_their_part_alone(deferred, costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(tiny("group"), "tent", budget=0.5, deferred=deferred)
    xs = batches(20, size=32)
    for x in xs[:-4]:
        adapter(x)
    for x in xs[-4:]:
        x[2] = 3e38
        assert adapter(x).isfinite().all(1).sum() == 31
    found = [event.outcome for event in adapter.events][-4:]
    assert sorted(found) == sorted(3 * [Outcome.ADAPTED] + [Outcome.NON_FINITE])
    assert [event.used for event in adapter.events][-4:] == 4 * [8]


def test_parts_are_of_few_sizes_so_that_each_is_prepared_for_once(costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(tiny("group"), "tent", budget=0.7)
    for x in batches(60, size=48):
        adapter(x)
    assert used(adapter) <= {48, 24, 16, 12, 9, 8}
    assert len(used(adapter)) <= 4


class Mixing(nn.Module):
    """A network whose samples see each other, in a layer that is none of normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny("group")

    def forward(self, x):
        return self.body(x - 0.1 * x.mean(0))


class Telling(nn.Module):
    """A network that tells something else beside its logits."""

    def __init__(self, tells) -> None:
        super().__init__()
        self.body, self.tells = tiny("group"), tells

    def forward(self, x):
        logits = self.body(x)
        return {"logits": logits, "more": self.tells(logits), "name": "telling"}


class Squeezing(nn.Module):
    """A network that takes batches of two and more: it squeezes one of one away."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny("group")

    def forward(self, x):
        return self.body(x).squeeze()


@pytest.mark.parametrize(
    ("model", "name", "size"),
    [
        (lambda: tiny("batch"), "tent", 32),
        (Mixing, "tent", 32),
        (lambda: Telling(lambda logits: torch.arange(5.0)), "tent", 32),
        (lambda: Telling(lambda logits: logits.mean()), "tent", 32),
        (lambda: Telling(lambda logits: torch.tensor(len(logits))), "tent", 32),
        (lambda: Telling(lambda logits: float(logits.detach().mean())), "tent", 32),
        (lambda: Telling(lambda logits: logits @ logits.T), "tent", 32),
        (lambda: Telling(lambda logits: logits.softmax(0)), "tent", 32),
        (lambda: Telling(lambda logits: list(logits.mean(1))), "tent", 32),
        (lambda: Telling(lambda logits: logits.argmax(1).tolist()), "tent", 32),
        (lambda: Telling(lambda logits: logits.detach().numpy()), "tent", 32),
        (lambda: Telling(lambda logits: torch.arange(len(logits))), "tent", 32),
        (lambda: Telling(lambda logits: logits.cumsum(0)), "tent", 32),
        (lambda: Telling(lambda logits: {f"of {len(logits)}": 1}), "tent", 32),
        (lambda: Telling(lambda logits: logits if len(logits) > 10 else None), "tent", 32),
        (lambda: Telling(lambda logits: logits[:, : 1 + len(logits) // 32]), "tent", 32),
        (Squeezing, "tent", 32),
        (lambda: tiny("group"), "lame", 32),
        (lambda: tiny("group"), "cotta", 32),
        (lambda: tiny("group"), "roid", 32),
        (lambda: tiny("group"), "ostta", 32),
        (lambda: tiny("group"), "tent", 2 * PART - 1),
    ],
)
def test_where_they_are_not_whole_batches_teach(model, name, size, costs):
    costs.update(plain=1.0, step=3.0)
    more = {"views": 2, "threshold": 0.0} if name == "cotta" else {}
    adapter = tt.adapt(model(), name, budget=0.5, **more)
    for x in batches(20, size=size):
        adapter(x)
    spending = adapter.plan().spending
    assert spending.learnt == spending.updates
    assert spending.learnt in (0.25, 0.9) or name in ("lame", "cotta")


def test_whole_batches_teach_where_parts_take_as_long(costs):
    costs.update(plain=1.0, step=1.0, fixed=64.0)  # calls outweigh what they compute
    adapter = tt.adapt(tiny("group"), "tent", budget=0.5)
    for x in batches(60, size=32):
        adapter(x)
    told = adapter.plan().spending
    assert [event.measured["used"] for event in adapter.events].count(32) > 12
    assert told.total <= 0.5 + 1e-6
    assert told.learnt == pytest.approx(told.updates, abs=0.05)


TOLD = {
    "rows": lambda logits: logits.softmax(1),
    "whole numbers": lambda logits: logits.argmax(1),
    "nothing in each row": lambda logits: logits[:, :0],
    "one number": lambda _: torch.tensor(2.5),
    "one whole number": lambda _: torch.tensor(3),
}


@pytest.mark.parametrize("tells", TOLD)
def test_all_that_a_model_returns_is_put_together_again(tells, costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(Telling(TOLD[tells]), "tent", budget=0.5)
    for x in batches(20, size=32):
        wanted, answer = adapter.predict(x), adapter(x)
        assert answer["name"] == "telling"
        for key in ("logits", "more"):
            torch.testing.assert_close(answer[key], wanted[key])
            assert not answer[key].requires_grad
    assert used(adapter) == {32, 8}


class Slots:
    """An answer with attributes in slots and beside them."""

    __slots__ = ("__dict__", "__hidden", "late", "logits")

    def __init__(self, logits) -> None:
        self.logits, self.__hidden, self.beside = logits, logits.softmax(1), logits.argmax(1)

    @property
    def hidden(self):
        return self.__hidden


class Answering(nn.Module):
    """A network that puts its logits into something."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.body, self.kind = tiny("group"), kind

    def forward(self, x):
        return self.kind(self.body(x))


def test_attributes_are_put_together_wherever_an_object_keeps_them(costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(Answering(Slots), "tent", budget=0.5)
    for x in batches(20, size=32):
        wanted, answer = adapter.predict(x), adapter(x)
        for key in ("logits", "hidden", "beside"):
            torch.testing.assert_close(getattr(answer, key), getattr(wanted, key))
            assert not getattr(answer, key).requires_grad
    assert used(adapter) == {32, 8}


def same(one, other) -> None:
    mine, theirs = leaves(one), leaves(other)
    assert mine.keys() == theirs.keys()
    for place, part in mine.items():
        if isinstance(part, torch.Tensor):
            torch.testing.assert_close(part, theirs[place])
        else:
            assert part == theirs[place]


CHANGES = {
    "another key": lambda logits, late: {
        "logits": logits,
        **({f"of {len(logits)}": 1} if late else {}),
    },
    "another type": lambda logits, late: (logits,) if late and len(logits) > 10 else logits,
    "other rows": lambda logits, late: (logits, logits[:2] if late else logits),
    "a text": lambda logits, late: (logits, f"{len(logits)}" if late else "text"),
}


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_fit_no_longer_are_answered_whole_and_teach_nothing(change, deferred, costs):
    costs.update(plain=1.0, step=3.0)
    late = False
    model = Answering(lambda logits: CHANGES[change](logits, late))
    adapter = tt.adapt(model, "tent", budget=0.5, deferred=deferred)
    xs = batches(40, size=32)
    for x in xs[:20]:
        adapter(x)
    before = adapter.snapshot()
    assert used(adapter) == {32, 8}
    late = True
    wanted, answer = adapter.predict(xs[20]), adapter(xs[20])
    same(answer, wanted)
    after, event = adapter.snapshot(), adapter.events[-1]
    assert (event.outcome, event.used) == (Outcome.NOT_DUE, 0)
    assert all(torch.equal(after.tensors[key], before.tensors[key]) for key in before.tensors)
    assert after.account["learnt"] == before.account["learnt"]
    assert after.account["seconds"] == before.account["seconds"]
    for x in xs[21:]:
        wanted, answer = adapter.predict(x), adapter(x)
        same(answer, wanted)
    assert {event.used for event in adapter.events[-19:]} == {0, 32}


def test_an_object_that_a_model_fills_anew_each_time_is_read_in_time(costs):
    costs.update(plain=1.0, step=3.0)
    kept = Slots(torch.zeros(1, 5))

    def fill(logits):
        kept.logits = logits
        kept.beside = logits.argmax(1)
        return kept

    del kept._Slots__hidden
    adapter = tt.adapt(Answering(fill), "tent", budget=0.5)
    for x in batches(20, size=32):
        wanted, answer = adapter.predict(x), adapter(x)
        torch.testing.assert_close(answer.logits, wanted.logits)
        torch.testing.assert_close(answer.beside, wanted.beside)


def test_what_a_batch_of_one_hides_is_seen(costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(Telling(lambda _: torch.zeros(1, 4)), "tent", budget=0.5)
    for x in [*batches(1, size=1), *batches(20, size=32)]:
        assert adapter(x)["more"].shape == (1, 4)  # no row of a sample
    assert used(adapter) == {32}


def test_samples_of_all_places_teach_in_turn(costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(tiny("group"), "tent", budget=0.5)
    x, places = batches(1, size=32)[0], set[int]()
    run = Engine.steps

    def see(engine, part, state):
        same = (part[:, None] == x).flatten(2).all(2)
        places.update(same.nonzero()[:, 1].tolist() if len(part) < 32 else ())
        return run(engine, part, state)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Engine, "steps", see)
        for _ in range(40):
            adapter(x)
    assert places == set(range(32))


@pytest.mark.parametrize("kind", ["group", "batch"])
def test_a_clock_that_stands_still_stops_nothing(kind, monkeypatch):
    monkeypatch.setattr(module, "clock", lambda: 0.0)
    adapter = tt.adapt(tiny(kind), "tent", budget=0.5)
    for x in batches(8, size=32):
        adapter(x)
    assert adapter.plan().spending.total is None
    assert adapter.counts.updates == 6


def test_pixels_are_put_together_again(costs):
    costs.update(plain=1.0, step=3.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 1)).eval()
    adapter = tt.adapt(model, "tent", budget=0.5)
    for x in batches(20, size=32):
        wanted, answer = adapter.predict(x), adapter(x)
        torch.testing.assert_close(answer, wanted)
        each = adapter.events[-1].entropy
        assert each == pytest.approx(float(entropy(answer.movedim(1, -1)).mean()), rel=1e-4)
    assert used(adapter) == {32 * 36, 8 * 36}


def test_an_outlier_score_is_of_all_samples(costs):
    costs.update(plain=1.0, step=3.0)
    recipe = replace(tent(), outlier=entropy)
    adapter = tt.adapt(tiny("group"), recipe, budget=0.5)
    for x in batches(20, size=32):
        adapter(x)
        assert len(adapter.events[-1].measured["outlier"]) == 32


def test_a_state_of_another_version_is_refused(costs):
    adapter = tt.adapt(tiny("group"), "tent", budget=0.5)
    adapter(batches(1)[0])
    mark = adapter.snapshot()
    with pytest.raises(StateError, match="another version"):
        adapter.restore(
            replace(mark, account={"samples": 16, "learnt": 0, "plain": [], "step": []})
        )
    adapter.restore(mark)


def test_an_interrupt_among_parts_leaves_all_before_a_step_or_after_it(costs):
    costs.update(plain=1.0, step=3.0)
    xs, model = batches(16, size=32), tiny("group")
    adapter = tt.adapt(model, "tent", budget=0.5)
    for x in xs[:14]:
        adapter(x)
    assert adapter.events[-1].used == 8
    was, mark = copy.deepcopy(model.state_dict()), adapter.snapshot()
    places = interrupted(lambda: adapter(xs[14]))
    after, last = adapter.snapshot(), adapter(xs[15])
    taken = set[bool]()
    for at in range(1, places + 1, max(places // 40, 1)):
        adapter.restore(mark)
        interrupted(lambda: adapter(xs[14]), at)
        now = adapter.snapshot()
        taken.add(now.steps == 15)
        wanted = after if now.steps == 15 else mark
        assert now.account["updates"] == wanted.account["updates"], at
        for key, tensor in now.tensors.items():
            assert torch.equal(tensor, wanted.tensors[key]), at
        if now.steps == 14:
            adapter(xs[14])
        assert torch.equal(adapter(xs[15]), last), at
    assert False in taken
    assert all(torch.equal(tensor, was[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
