"""Guards and what else an adapter has: states, gates, every method, streams, errors."""

import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from guards import Says, outcomes, same_state
from models import Experts, batches, tiny
from testtime._core.errors import OptionError, StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation.guarding import MARK
from testtime.adaptation.never_worse import NeverWorse
from testtime.guard.collapse import Collapse
from testtime.guard.monitor import Monitor


@pytest.mark.parametrize("deferred", [False, True])
def test_a_guard_is_saved_restored_and_reset_with_the_state(deferred, tmp_path):
    xs = batches(12)
    words = [False] * 4 + [True] * 3 + [False]
    one, two = (tt.adapt(tiny(), "tent", guard=Says(*words), deferred=deferred) for _ in range(2))
    begin = [one(x) for x in xs[:6]]
    mark = one.snapshot()
    one.save(tmp_path / "state")
    later = [one(x) for x in xs[6:]]
    two.load(tmp_path / "state")
    assert all(torch.equal(two(x), y) for x, y in zip(xs[6:], later, strict=True))
    assert same_state(one, two)
    one.restore(mark)
    assert all(torch.equal(one(x), y) for x, y in zip(xs[6:], later, strict=True))
    one.reset()
    assert all(torch.equal(one(x), y) for x, y in zip(xs[:6], begin, strict=True))


@pytest.mark.parametrize("name", sorted(set(tt.methods()) - {"foa"}))
def test_every_method_takes_a_guard(name, tmp_path):
    model = Experts(tiny()) if name == "sade" else tiny()
    entry = tt.methods()[name]
    known = None
    if entry.needs:
        data = [(x, torch.arange(16) % 5) for x in batches(4, seed=9)]
        known = tt.fit_source(model, data, methods=[name])
    more = {"views": 2} if "views" in entry.options else {}
    if "label" in entry.options or name == "simatta":
        more["oracle"] = lambda places, x: torch.zeros(len(x), dtype=torch.long)
    more = {key: value for key, value in more.items() if key in entry.options}

    def make() -> tt.Adapter:
        return tt.adapt(model, name, source=known, guard=NeverWorse(block=16), **more)

    adapter, other = make(), make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in batches(4):
            assert adapter(x).isfinite().all()
        adapter.save(tmp_path / "state")
        other.load(tmp_path / "state")
        x = batches(1, seed=5)[0]
        assert torch.equal(adapter(x), other(x))
    # what is saved holds the marks, and these hold nothing of the stream
    for kept in (adapter.snapshot().guard or {}).get("marks", []):
        assert set(kept) < {f.name for f in fields(adapter.snapshot())} - {"guard", "generator"}


def test_dense_logits_and_single_samples_are_guarded():
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    model = Dense().eval()
    adapter = tt.adapt(model, "tent", guard=True)
    for x in batches(6):
        assert adapter(x).shape == (16, 5, 8, 8)
    one = tt.adapt(tiny(), "tent", guard=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in batches(40, size=1):
            assert torch.equal(one(x), tiny()(x).detach())


def test_a_monitor_of_two_models_is_a_guard():
    watch = Collapse(classes=5, share=0.02, narrowness=0.01, disagreement=0.05)
    adapter = tt.adapt(tiny(), "tent", lr=0.1, guard=Monitor(watch))
    got = outcomes(adapter, batches(40, size=64))
    assert Outcome.ROLLED_BACK in got
    assert got[-1] is Outcome.GUARDED  # it stays raised


def test_a_guard_works_beside_a_gate_and_thinning():
    model = tiny()
    known = tt.fit_source(model, batches(8, size=64), methods=["tent"], gate=True)
    adapter = tt.adapt(model, "tent", source=known, gate=True, guard=True, every=2)
    got = outcomes(adapter, [*batches(4, size=64), *(x * 0.3 + 2 for x in batches(8, size=64))])
    assert got[:4] == [Outcome.LIKE_SOURCE] * 4
    assert len(set(got)) > 1


def test_a_state_goes_to_an_adapter_without_a_guard_and_back(tmp_path):
    xs = batches(8)
    one = tt.adapt(tiny(), "tent", lr=1e-2, guard=Says(*[False] * 4, True))
    outcomes(one, xs[:5])
    one.save(tmp_path / "state")
    plain, loaded = (tt.adapt(tiny(), "tent", lr=1e-2) for _ in range(2))
    plain.restore(one.snapshot())
    loaded.load(tmp_path / "state")
    for each in (plain, loaded):  # nobody distrusts it there
        x = xs[5]
        assert torch.equal(each.predict(x), each(x))
        assert each.snapshot().guard is None
    outcomes(plain, xs)
    two = tt.adapt(tiny(), "tent", lr=1e-2, guard=True)
    two.restore(plain.snapshot())
    assert outcomes(two, xs[:2]) == [Outcome.UNSURE] * 2  # too few to judge by, and none is lost
    outcomes(plain, xs[:2])
    assert same_state(two, plain)


def test_a_state_of_another_guard_is_refused_before_anything_changes(tmp_path):
    one = tt.adapt(tiny(), "tent", guard=Says(False))
    outcomes(one, batches(2))
    one.save(tmp_path / "state")
    two = tt.adapt(tiny(), "tent", guard=True)
    for take in (lambda: two.restore(one.snapshot()), lambda: two.load(tmp_path / "state")):
        with pytest.raises(StateError, match="another guard"):
            take()
    assert two.snapshot().steps == 0
    two(batches(1)[0])


def test_a_state_that_an_older_guard_kept_is_refused_on_load(tmp_path):
    one = tt.adapt(tiny(), "tent", guard=True)
    outcomes(one, batches(4))
    mark = one.snapshot()
    memory = dict(mark.guard["memory"])
    for name in ("block", "answers"):
        old = {**mark.guard, "memory": {**memory, name: memory[name][:2]}}
        one._state = replace(mark, guard=old)
        one.save(tmp_path / "state")
        two = tt.adapt(tiny(), "tent", guard=True)
        with pytest.raises(StateError, match="another version"):
            two.load(tmp_path / "state")
        assert two.snapshot().steps == 0
        two(batches(1)[0])


def test_a_state_that_rolls_back_to_what_is_not_known_is_refused_on_load():
    one = tt.adapt(tiny(), "tent", guard=Says(False))
    outcomes(one, batches(4))
    mark = one.snapshot()
    marks = [{**each, "mood": 1} for each in mark.guard["marks"]]
    assert marks
    with pytest.raises(StateError, match="another version"):
        one.restore(replace(mark, guard={**mark.guard, "marks": marks}))
    assert one.snapshot() is mark


class Spoilt(nn.Module):
    """Answers NaN once anything was learnt, or while nothing was."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        self.net, self.learnt = tiny(), learnt
        self.source = self.net.norm2.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        changed = not torch.equal(self.net.norm2.bias, self.source)
        return self.net(x) * (math.nan if changed == self.learnt else 1.0)


@pytest.mark.parametrize(
    "guard", [lambda: True, lambda: Monitor(Collapse(classes=5)), lambda: Says(False)]
)
def test_answers_that_are_no_numbers_are_not_given_whatever_the_guard(guard):
    adapter = tt.adapt(Spoilt(learnt=True), "tent", guard=guard())
    for x in batches(6, size=64):
        assert adapter(x).isfinite().all()
    assert adapter.counts.distrusted > 1
    model = tiny()
    model.norm1.running_var.fill_(math.nan)
    adapter = tt.adapt(model, "bn-adapt", guard=guard())
    for x in batches(6, size=64):  # the source's are no numbers
        assert adapter(x).isfinite().all()
    assert adapter.counts.distrusted == 0


@pytest.mark.parametrize("deferred", [False, True])
def test_they_are_not_given_either_where_nobody_looks(deferred):
    class Later(Spoilt):
        bad = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.bad else self.net(x)

    model = Later(learnt=True)
    adapter = tt.adapt(model, "tent", guard=Says(False), deferred=deferred)
    outcomes(adapter, batches(9, size=64))
    assert adapter.snapshot().guard["left"] > 1
    x = batches(1, size=64)[0]
    model.bad = True
    assert adapter.predict(x).isfinite().all()
    assert adapter(x).isfinite().all()
    assert adapter.events[-1].outcome is Outcome.ROLLED_BACK


def test_harm_that_comes_at_once_reaches_no_answer():
    class Crowds(Spoilt):
        def forward(self, x: Tensor) -> Tensor:
            learnt = not torch.equal(self.net.norm2.bias, self.source)
            return self.net(x) + 100.0 * learnt * torch.eye(5)[0]

    model = Crowds(learnt=True)
    model.net = tiny("group")
    model.source = model.net.norm2.bias.detach().clone()
    adapter = tt.adapt(model, "tent", guard=True)
    for x in batches(300, size=1):
        assert torch.equal(adapter(x), model(x).detach())
    seen = {event.outcome for event in adapter.events}
    assert {Outcome.UNSURE, Outcome.ROLLED_BACK} <= seen


def test_two_streams_may_share_a_guard():
    def end(guard: NeverWorse, seed: int, model: nn.Module) -> Tensor:
        adapter = tt.adapt(model, "tent", guard=guard)
        for x in batches(60, size=32, seed=seed):
            adapter(x)
        return adapter.snapshot().guard["memory"]["answers"]

    class Slow(NeverWorse):
        def update(self, adapted: Tensor, source: Tensor) -> bool:
            time.sleep(1e-3)  # so that the other comes in between
            return super().update(adapted, source)

    shared = Slow(block=16)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(end, [shared, shared], [1, 2], [tiny(), tiny()]))
    for seed, answers in zip((1, 2), got, strict=True):
        assert torch.equal(answers, end(NeverWorse(block=16), seed, tiny()))


def test_what_is_restored_had_been_looked_at_also_in_large_batches():
    adapter = tt.adapt(tiny(), "tent", lr=1e-2, guard=Says(False, False, True))
    xs, states, looked = batches(9, size=MARK), [], []
    for x in xs:
        before = adapter.counts.forwards
        adapter(x)
        looked.append(adapter.counts.forwards - before > MARK)
        states.append(adapter.snapshot().tensors["norm1.weight"])
    assert adapter.events[-1].outcome is Outcome.ROLLED_BACK
    at = next(i for i, state in enumerate(states) if torch.equal(state, states[-1]))
    assert any(looked[at + 1 : -1])


@pytest.mark.parametrize("deferred", [False, True])
def test_an_error_of_a_guard_changes_nothing_and_is_got_over(deferred):
    class Fails(Says):
        bad = False

        def update(self, adapted: Tensor, source: Tensor) -> bool:
            said = super().update(adapted, source)
            if self.bad:
                raise RuntimeError("no guard today")
            return said

    guard, xs = Fails(False), batches(6)
    adapter, plain = (
        tt.adapt(tiny(), "tent", guard=guard, deferred=deferred),
        tt.adapt(tiny(), "tent"),
    )
    outcomes(adapter, xs[:3])
    guard.bad = True
    with pytest.raises(RuntimeError, match="no guard today"):
        adapter(xs[3])
    guard.bad = False
    outcomes(plain, xs[:3])
    assert same_state(adapter, plain)
    assert torch.equal(adapter(xs[3]), plain(xs[3]))
    assert adapter.snapshot().guard["memory"] == {"asked": 4}


def test_what_is_no_guard_is_refused():
    with pytest.raises(OptionError, match="the class NeverWorse; expected an instance"):
        tt.adapt(tiny(), "tent", guard=NeverWorse)
    with pytest.raises(OptionError, match="has no update"):
        tt.adapt(tiny(), "tent", guard=lambda a, b: True)


class Partly(Spoilt):
    """Answers NaN of dark samples once anything was learnt, or while nothing was, or always."""

    def __init__(self, learnt: bool | None) -> None:
        super().__init__(learnt is True)
        self.always = learnt is None

    def forward(self, x: Tensor) -> Tensor:
        changed = not torch.equal(self.net.norm2.bias, self.source)
        spoilt = self.always or changed == self.learnt
        return self.net(x).masked_fill((x.amax((1, 2, 3)) == 0)[:, None] & spoilt, math.nan)


@pytest.mark.parametrize("learnt", [False, None, True])
def test_samples_that_one_model_alone_answers(learnt):
    shown = []

    class Looks(Says):
        def update(self, adapted: Tensor, source: Tensor) -> bool | None:
            shown.append(torch.stack([adapted, source]))
            return super().update(adapted, source)

    (first, x), model = batches(2), Partly(learnt)
    x[3] = 0
    adapter, plain = (tt.adapt(model, "tent", lr=1e-2, guard=g) for g in (Looks(False), None))
    adapter(first)
    plain(first)
    foretold, own, source = adapter.predict(x), plain.predict(x), model(x).detach()
    answer, expected = adapter(x), source if learnt else own
    for given in (foretold, answer):
        torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)
    if learnt:  # what was learnt does not answer where its source does
        assert adapter.events[-1].outcome is Outcome.ROLLED_BACK
        assert len(shown) == 1
    else:
        assert shown[-1].shape == (2, 15, 5)
        assert shown[-1].isfinite().all()
        assert answer[3].isfinite().all() == (learnt is False)


@pytest.mark.parametrize(("correction", "scale"), [("logits", 5), ("probs", 1)])
def test_a_guard_is_shown_answers_on_the_scale_of_logits(correction, scale):
    class Seen(Says):
        def update(self, adapted: Tensor, source: Tensor) -> bool:
            self.adapted = adapted.clone()
            return super().update(adapted, source)

    guard, x = Seen(False), batches(1)[0]
    options = {"augment": lambda x, generator: x, "correction": correction}
    answer = tt.adapt(tiny(), "roid", guard=guard, **options)(x)
    assert answer.shape[1] == 5
    assert torch.equal(guard.adapted, scale * answer)
