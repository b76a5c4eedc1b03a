"""Never worse than frozen: what a guard does with an adapter, and what the default one looks at."""

import math
import random
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

import testtime as tt
from models import Experts, batches, tiny
from testtime._core.errors import OptionError, StateError, TesttimeWarning
from testtime._core.outcomes import Outcome
from testtime.adaptation.guarding import APART, BEGINNING, MARK, PATIENCE
from testtime.adaptation.never_worse import NeverWorse, excess, information
from testtime.guard.collapse import Collapse
from testtime.guard.monitor import Monitor

answers = st.lists(st.integers(0, 3), min_size=4, max_size=40)


def logits(labels: Tensor, classes: int = 10) -> Tensor:
    return 5.0 * nn.functional.one_hot(labels, classes).float()


def drawn(count: int, seed: int = 0, classes: int = 10) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def blurred(labels: Tensor, share: float, seed: int = 1) -> Tensor:
    """The same labels, a share of them drawn anew."""
    chance = torch.Generator().manual_seed(seed)
    anew = torch.rand(len(labels), generator=chance) < share
    return torch.where(anew, drawn(len(labels), seed + 1), labels)


def said(adapted: Tensor, source: Tensor, size: int = 64) -> list[bool | None]:
    guard = NeverWorse()
    pairs = zip(adapted.split(size), source.split(size), strict=True)
    return [guard.update(logits(a), logits(s)) for a, s in pairs]


def trusts(words: list[bool | None]) -> bool:
    return all(word is False for word in words)


# --- what it looks at -------------------------------------------------------------------------


@given(answers, st.randoms(use_true_random=False))
def test_information_is_that_of_counts(a, chance):
    b = [chance.choice([x, 0, 2]) for x in a]
    shared, one, other = information(torch.tensor(a), torch.tensor(b), 4)
    assert shared == pytest.approx(mutual_info_score(a, b), abs=1e-9)
    assert one == pytest.approx(mutual_info_score(a, a), abs=1e-9)
    assert other == pytest.approx(mutual_info_score(b, b), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=5, max_size=12))
def test_the_excess_is_nought_on_the_mean_of_all_orders(a):
    chance = random.Random(0)
    means = [excess(torch.tensor(chance.sample(a, len(a)))) for _ in range(600)]
    assert sum(means) / len(means) == pytest.approx(0, abs=0.06)


def test_answers_that_have_nothing_to_do_with_the_source_s_are_not_trusted():
    labels = drawn(1280)
    assert all(said(drawn(1280, 5), labels)[1:])
    same = blurred(labels, 0.3)
    assert set(said(same, same)) == {None}  # nothing differs, so that nobody knows


def test_where_labels_come_in_order_the_better_follows_it():
    labels = torch.arange(10).repeat_interleave(25).repeat(6)
    for better, worse in ((0.1, 0.3), (0.0, 0.2)):
        good, bad = blurred(labels, better), blurred(labels, worse, 7)
        assert trusts(said(good, bad)[4:])
        assert all(said(bad, good)[4:])


def test_a_lead_below_its_error_is_none():
    labels = torch.arange(10).repeat_interleave(25).repeat(6)
    source = blurred(labels, 0.2)
    few = source.clone()
    wrong = (few != labels).nonzero()[:, 0]
    right = wrong[-len(wrong) // 2 :][:: len(wrong) // 4][:2]
    few[right] = labels[right]  # ahead, but by too few to be told from chance
    assert said(few, source)[-1] is None
    few[wrong[::2]] = labels[wrong[::2]]
    assert said(few, source)[-1] is False


def test_what_is_lost_of_late_is_not_made_up_for_by_what_was_gained_before():
    labels = torch.arange(10).repeat_interleave(25).repeat(6)[:1408]
    source, good = blurred(labels, 0.3), blurred(labels, 0.0)
    late = torch.cat([good[:1152], blurred(labels, 0.7, 9)[1152:]])
    words = said(late, source)
    assert words[17] is False
    assert words[-1] is not False


def test_a_few_answers_less_even_are_no_proof_of_harm():
    labels = drawn(256)
    narrower = labels.clone()
    counts = labels[-128:].bincount()  # of those that evenness is judged by
    narrower[(labels == counts.argmin()).nonzero()[-1]] = counts.argmax()
    assert said(narrower, labels)[-1] is None


def test_equal_neighbours_are_not_enough_where_labels_come_in_order():
    labels = drawn(1344 // 4).repeat_interleave(4)
    source, crowded = blurred(labels, 0.1), labels // 2
    blocks = [
        (excess(a), excess(s)) for a, s in zip(crowded.split(64), source.split(64), strict=True)
    ]
    assert sum(a for a, _ in blocks) > sum(s for _, s in blocks)
    assert said(crowded, source)[-1] is not False
    assert said(labels, source)[-1] is False


def test_where_they_do_not_narrower_answers_are_not_trusted():
    labels = drawn(1280)
    crowded = torch.where((labels > 5) & (drawn(1280, 3) < 5), 0, labels)
    assert all(said(crowded, labels)[2:])
    assert trusts(said(labels, crowded))


def test_trust_that_was_earned_lasts_as_long_as_the_lead():
    labels = torch.arange(10).repeat(64)
    crowded, barely = labels.clone(), labels.clone()
    crowded[(labels == 1) & (torch.arange(640) % 3 > 0)] = 0
    barely[600] = 1  # of 0: a lead of the other, below its standard error
    earned = said(torch.cat([labels, labels]), torch.cat([crowded, barely]))
    unearned = said(labels, barely)
    assert trusts(earned)
    assert set(unearned) == {None}
    behind = said(torch.cat([labels, barely]), torch.cat([crowded, labels]))
    assert behind[9] is False
    assert behind[-1] is None


def test_one_answer_for_all_trusts_nobody():
    same = torch.zeros(256, dtype=torch.long)
    assert all(said(drawn(256), same))
    assert set(said(same, same)) == {None}


def test_nobody_is_trusted_before_a_block_was_seen_nor_with_nan():
    guard, labels = NeverWorse(), drawn(48)
    even, crowded = logits(labels), logits(labels // 3)
    parts = zip(even.split(16), crowded.split(16), strict=True)
    assert [guard.update(*part) for part in parts] == [None, None, False]
    assert guard.update(even * math.nan, even) is True
    assert guard.update(even[:1], crowded[:1]) is False


def test_what_is_old_is_forgotten():
    labels, other = drawn(4096), drawn(4096, 3)
    adapted = torch.cat([other[:2048], labels[2048:]])
    got = said(adapted, labels)
    assert all(got[1:32])
    assert True not in got[-16:]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=3, max_size=12), st.integers(0, 99))
def test_it_goes_on_where_its_state_was_taken(sizes, seed):
    labels = drawn(sum(sizes), seed)
    pairs = list(
        zip(
            logits(blurred(labels, 0.6, seed)).split(sizes),
            logits(labels).split(sizes),
            strict=True,
        )
    )
    whole, half = NeverWorse(memory=128), NeverWorse(memory=128)
    want = [whole.update(*pair) for pair in pairs]
    got = []
    for pair in pairs:
        other = NeverWorse(memory=128)
        other.load_state_dict(half.state_dict())
        got.append(other.update(*pair))
        half = other
    assert got == want


def test_a_class_that_is_left_out_is_no_answer_missing():
    labels = drawn(64)
    x = logits(labels).masked_fill(torch.arange(10) == 9, -math.inf)
    assert NeverWorse().update(x, x) is None
    assert NeverWorse().update(torch.full_like(x, -math.inf), x)


@pytest.mark.parametrize(
    "option", [{"kept": -0.1}, {"kept": 2}, {"memory": 1}, {"recent": 0}, {"block": 0}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(OptionError):
        NeverWorse(**option)


# --- what is done -----------------------------------------------------------------------------


class Says:
    """A guard that says what it was told to say, and then repeats the last."""

    def __init__(self, *words: bool | None) -> None:
        self.words = words
        self.reset()

    def update(self, adapted: Tensor, source: Tensor) -> bool | None:
        assert adapted.shape == source.shape
        self.asked += 1
        return self.words[min(self.asked, len(self.words)) - 1]

    def reset(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


def outcomes(adapter: tt.Adapter, xs: list[Tensor]) -> list[Outcome]:
    return [(adapter(x), adapter.events[-1].outcome)[1] for x in xs]


def same_state(one: tt.Adapter, two: tt.Adapter) -> bool:
    a, b = one.snapshot(), two.snapshot()
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_a_model_that_is_trusted_answers_and_learns_as_without_a_guard(kind, deferred):
    plain = tt.adapt(tiny(kind), "tent")
    adapter = tt.adapt(tiny(kind), "tent", guard=Says(False), deferred=deferred)
    for x in batches(6):
        assert torch.equal(adapter(x), plain(x))
    assert same_state(adapter, plain)
    assert adapter.counts.forwards == 2 * plain.counts.forwards
    assert adapter.counts.backwards == plain.counts.backwards


@pytest.mark.parametrize("name", ["tent", "lame", "memo", "cotta"])
def test_a_model_that_is_not_answers_as_its_source_and_learns_nothing(name):
    more = {"views": 2} if name in ("memo", "cotta") else {}
    adapter, model = tt.adapt(tiny(), name, guard=Says(True), **more), tiny()
    for x in batches(5):
        assert torch.equal(adapter(x), model(x).detach())
        assert torch.equal(adapter.predict(x), model(x).detach())
        assert torch.equal(adapter.export()(x), model(x))
    assert set(outcomes(adapter, batches(2))) == {Outcome.GUARDED}
    assert adapter.counts.distrusted == adapter.counts.steps == 7
    assert adapter.counts.updates == 0
    fresh = tt.adapt(tiny(), name, **more)
    assert same_state(adapter, fresh)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("kind", ["batch", "group"])
def test_while_nobody_knows_the_source_answers_and_the_adapter_learns(kind, deferred):
    plain, model = tt.adapt(tiny(kind), "tent"), tiny(kind)
    adapter = tt.adapt(model, "tent", guard=Says(*[None] * 12, False), deferred=deferred)
    for x in batches(12, size=64):  # more than the beginning: all are looked at
        plain(x)
        assert torch.equal(adapter(x), model(x).detach())
        assert adapter.events[-1].outcome is Outcome.UNSURE
    x = batches(1, seed=4)[0]
    assert same_state(adapter, plain)
    assert torch.equal(adapter.predict(x), model(x).detach())
    assert torch.equal(adapter.export()(x), model(x))
    assert adapter.counts.updates == adapter.counts.distrusted == 12
    assert adapter.snapshot().guard["marks"] == []  # nothing that was trusted
    assert torch.equal(adapter(x), plain(x))
    assert adapter.events[-1].outcome is Outcome.ADAPTED


def test_what_is_learnt_unheard_is_dropped_where_it_turns_out_to_be_harm():
    adapter = tt.adapt(tiny(), "tent", lr=1e-2, guard=Says(None, None, True, None, False))
    got = outcomes(adapter, batches(3))
    assert got == [Outcome.UNSURE, Outcome.UNSURE, Outcome.ROLLED_BACK]
    assert same_state(adapter, tt.adapt(tiny(), "tent"))
    assert outcomes(adapter, batches(3)) == [Outcome.GUARDED, Outcome.ADAPTED, Outcome.ADAPTED]


def test_lost_trust_restores_a_state_of_before_and_then_the_source():
    xs = batches(30, size=64)
    looked = [i for i in range(30) if i < BEGINNING // 64 or (i - BEGINNING // 64) % APART == 3]
    asked = 11  # behind the third mark
    adapter = tt.adapt(tiny(), "tent", guard=Says(*[False] * asked, True))
    plain = tt.adapt(tiny(), "tent")
    marks, seen = [], []
    for i, x in enumerate(xs[: looked[asked]]):
        plain(x)
        adapter(x)
        if i % (MARK // 64) == 0:
            marks.append(plain.snapshot())
        seen.append(adapter.events[-1].outcome)
    assert set(seen) == {Outcome.ADAPTED}
    assert outcomes(adapter, [xs[-1]]) == [Outcome.ROLLED_BACK]
    got = adapter.snapshot().tensors
    assert any(all(torch.equal(got[n], mark.tensors[n]) for n in got) for mark in marks[:-1])
    assert not same_state(adapter, tt.adapt(tiny(), "tent"))
    assert set(outcomes(adapter, xs[: PATIENCE // 64 - 4])) == {Outcome.GUARDED}
    assert torch.equal(got["norm1.weight"], adapter.snapshot().tensors["norm1.weight"])
    outcomes(adapter, xs[:12])  # a trial, and the source
    assert same_state(adapter, tt.adapt(tiny(), "tent"))


def test_trust_comes_back_and_learning_with_it():
    adapter = tt.adapt(tiny(), "tent", guard=Says(False, True, True, False))
    got = outcomes(adapter, batches(6))
    assert got == [
        Outcome.ADAPTED, Outcome.ROLLED_BACK, Outcome.GUARDED, Outcome.TRUSTED, Outcome.ADAPTED,
        Outcome.ADAPTED,
    ]  # fmt: skip
    assert adapter.counts.distrusted == 2


def test_labels_that_were_asked_for_outlive_a_loss_of_trust():
    asked: list[int] = []

    def oracle(places: Tensor, x: Tensor) -> Tensor:
        asked.extend(places.tolist())
        return places % 5

    guard = Says(False, False, True, True, False)
    adapter = tt.adapt(
        tiny("group"), "simatta", oracle=oracle, budget=15, clusters=5, steps=1, guard=guard
    )
    got = outcomes(adapter, batches(3))
    assert got == [Outcome.ADAPTED, Outcome.ADAPTED, Outcome.ROLLED_BACK]
    assert max(asked) >= 32  # of the batch that cost the trust, too
    target = adapter.snapshot().memory["target"]
    assert target["labels"].tolist() == [place % 5 for place in asked]
    with pytest.warns(TesttimeWarning, match="all 15 labels"):
        outcomes(adapter, batches(12))
    assert len(asked) == len(set(asked)) == 15


def test_most_batches_are_not_looked_at_once_a_stream_has_begun():
    for word, much, more in ((False, 1.0, 1 / APART), (True, 1.0, 1 / APART)):
        adapter = tt.adapt(tiny("group"), "tent", guard=Says(word))
        outcomes(adapter, batches(BEGINNING // 64, size=64))
        before = adapter.counts
        outcomes(adapter, batches(4 * APART, size=64))
        forwards = adapter.counts.forwards - before.forwards
        assert forwards / (4 * APART * 64) == pytest.approx(much + more)


def test_all_batches_are_looked_at_again_once_trust_has_come_back():
    first = BEGINNING // 64
    adapter = tt.adapt(tiny("group"), "tent", guard=Says(*[False] * first, True, True, False))
    outcomes(adapter, batches(first, size=64))
    seen = 0
    while adapter.events[-1].outcome is not Outcome.TRUSTED:
        outcomes(adapter, batches(1, size=64))
        seen += 1
        assert seen < 4 * APART
    before = adapter.counts.forwards
    outcomes(adapter, batches(first - 1, size=64))
    assert adapter.counts.forwards - before == 2 * 64 * (first - 1)
    before = adapter.counts.forwards
    outcomes(adapter, batches(2 * APART, size=64))
    assert adapter.counts.forwards - before < 1.5 * 2 * APART * 64


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
    model.bad = True
    x = batches(1, size=64)[0]
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
