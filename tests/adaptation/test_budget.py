"""A budget is kept by counting and by the clock; the clock is a list here."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import testtime as tt
from models import batches, tiny
from testtime._core.errors import OptionError, StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation import budget as module
from testtime.adaptation.budget import CHEAPER, PART, entered, executed, later, opened, teaching
from testtime.adaptation.engine import Engine
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import Loan
from testtime.adaptation.methods.tent import tent
from testtime.measures.entropy import entropy


class Deep(nn.Module):
    """Eight equal blocks, registered backwards; by counting each is an eighth of the work."""

    def __init__(self, norm: type[nn.Module] | partial = nn.BatchNorm2d) -> None:
        super().__init__()
        for i in reversed(range(8)):
            setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=1, bias=False))
            setattr(self, f"norm{i}", norm(3))

    def forward(self, x):
        for i in range(8):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)).relu()
        return 9 * x.mean((2, 3))


def deep() -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Deep().eval()


@pytest.fixture
def costs(monkeypatch):
    """Seconds that a sample takes in plain inference and in a step, and that a step takes besides.

    The clock goes by them alone.
    """
    state = {"time": 0.0, "plain": 1.0, "step": 1.0, "fixed": 0.0}

    def spend(kind, run):
        def spending(engine, x, given):
            state["time"] += len(x) * state[kind] + (kind == "step") * state["fixed"]
            return run(engine, x, given)

        return spending

    monkeypatch.setattr(Engine, "steps", spend("step", Engine.steps))
    monkeypatch.setattr(Engine, "predict", spend("plain", Engine.predict))
    monkeypatch.setattr(module, "clock", lambda: state["time"])
    return state


def test_operations_before_each_layer_are_counted_in_order_of_execution():
    model = deep()
    norms = norm_layers(model, [f"norm{i}" for i in range(8)])
    before = executed(Loan(model, norms), batches(1)[0], norms)
    assert before == {f"norm{i}": (i + 1) / 8 for i in range(8)}
    model = tiny()
    norms = norm_layers(model)  # 3 channels to 6 on 8 x 8, 6 to 8 on 4 x 4, 8 to 5
    before = executed(Loan(model, norms), batches(1)[0], norms)
    work = [27 * 6 * 64, 54 * 8 * 16, 8 * 5]
    assert before["norm1"] == pytest.approx(work[0] / sum(work))
    assert before["norm2"] == pytest.approx(sum(work[:2]) / sum(work))


def test_operations_of_a_layer_count_at_every_token():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(28, 5))
    norms = norm_layers(model)
    before = executed(Loan(model, norms), torch.rand(6, 7, 3), norms)
    assert before["1"] == pytest.approx(7 * 12 / (7 * 12 + 140))


@pytest.mark.parametrize(
    ("budget", "layers"), [(2.0, 8), (0.25, 8), (0.2, 7), (0.17, 6), (0.15, 5), (0.1, 5), (0, 5)]
)
def test_the_layers_that_a_backward_reaches_in_time_stay(budget, layers):
    model = deep()
    adapter = tt.adapt(model, "tent", budget=budget)
    adapter(batches(1)[0])
    adapted = {f"norm{i}.{part}" for i in range(8 - layers, 8) for part in ("weight", "bias")}
    assert set(adapter.snapshot().tensors) == set(adapter.plan().tensors) == adapted
    told = adapter.plan().spending
    assert (told.budget, told.layers, told.of) == (budget, layers, 8)
    assert told.counted == pytest.approx((layers - 1) / 8)
    assert str(told) == (f"budget {budget}: {layers} of 8 layers adapt; nothing was measured yet")


def test_a_scope_that_ends_early_keeps_its_last_layer():
    norms = norm_layers(deep(), [f"norm{i}" for i in range(8)])
    before = {f"norm{i}": (i + 1) / 8 for i in range(8)}
    assert later(["norm0.weight", "norm1.bias"], norms, before, 0.02) == (["norm1.bias"], 0.75)
    assert later(["norm0.weight"], norms, {}, 0.1) == (["norm0.weight"], None)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 3), st.floats(0.01, 4), st.integers(1, 64), st.booleans(), st.floats(0, 2))
def test_the_account_never_exceeds_the_budget(budget, extra, size, apart, besides):
    account, taught, spent = opened(), {"whole": 0, "part": 0}, 0.0
    for number in range(200):
        learnt = teaching(account, size, budget, apart=apart)
        kind = "whole" if learnt == size else "part"
        taught[kind] += learnt > 0
        assert kind == "whole" or not learnt or (apart and PART <= learnt <= size // 2)
        more = learnt * extra + besides * size * (kind == "part" and learnt > 0)
        spent += more
        account = entered(account, size, learnt, size + more if number < 30 else None)
        # two of each kind to know what they take
        if learnt and taught["whole"] > 2 and taught["part"] not in (1, 2):
            assert spent <= budget * account["samples"] * (1 + 1e-6)
            # and no part is dearer than whole batches that teach as often
            assert kind == "whole" or more <= CHEAPER * size * extra * (1 + 1e-6)
    assert account["samples"] == 200 * size
    assert (account["updates"], account["parts"]) == (sum(taught.values()), taught["part"])
    # and it is used, but for what the first batches showed
    assert spent >= min(198 * extra, 200 * min(extra, budget)) * size - 4 * size * (extra + besides)
    if apart and size >= 16 and extra > budget > 0.5 * extra and not besides:
        assert sum(taught.values()) > 150  # nearly each batch teaches, most of them in part


def test_updates_thin_out_until_the_budget_is_kept(costs):
    costs.update(plain=1.0, step=3.0)
    adapter = tt.adapt(deep(), "tent", budget=0.5)
    xs = batches(4)
    for number in range(40):
        adapter(xs[number % 4])
    told = adapter.plan().spending
    assert told.update == pytest.approx(2)
    assert told.learnt == told.updates == 0.25
    assert str(adapter.plan()).endswith(
        "; budget 0.5: 8 of 8 layers adapt; 25% of the batches and 25% of the samples taught, which "
        "took 0.50, where all would take 2.00"
    )
    assert told.total == pytest.approx(0.5)
    assert adapter.events[-1].measured["budget"] == pytest.approx(0.5)
    assert adapter.counts.spared == 30
    assert [event.outcome for event in adapter.events][:4] == [
        Outcome.NOT_DUE, Outcome.NOT_DUE, Outcome.ADAPTED, Outcome.ADAPTED
    ]  # fmt: skip


def test_a_large_budget_learns_from_all_but_the_batches_that_are_timed(costs):
    costs.update(plain=1.0, step=2.0)
    plain, adapter = tt.adapt(deep(), "tent"), tt.adapt(deep(), "tent", budget=1.5)
    for number, x in enumerate(batches(10)):
        answer = adapter(x)
        if number > 1:
            assert torch.equal(answer, plain(x))
    assert adapter.counts.spared == 2


@pytest.mark.parametrize("deferred", [False, True])
def test_an_account_is_saved_with_the_state(costs, deferred, tmp_path):
    costs.update(plain=1.0, step=2.0)
    one, two = (tt.adapt(deep(), "tent", budget=0.4, deferred=deferred) for _ in range(2))
    xs = batches(12)
    for x in xs[:8]:
        one(x)
    one.save(tmp_path / "state")
    two.load(tmp_path / "state")
    assert all(torch.equal(one(x), two(x)) for x in xs[8:])
    assert one.plan().spending == two.plan().spending
    assert 0 < one.counts.updates < 8
    one.reset()
    assert one.plan().spending.learnt == 0


def test_methods_that_adapt_other_tensors_are_thinned_alone(costs):
    costs.update(plain=1.0, step=6.0)
    adapter = tt.adapt(deep(), "cotta", views=2, threshold=0.0, budget=1.0)
    xs = batches(2)
    for number in range(30):
        adapter(xs[number % 2])
    assert len(adapter.snapshot().tensors) == len(tt.adapt(deep(), "cotta").plan().tensors)
    assert adapter.plan().spending.total == pytest.approx(1, abs=0.01)


def test_a_teacher_averages_what_is_left_out_with_itself(costs):
    model = deep()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            parameter.add_(10.0 * i) if "norm" in name else None
    adapter = tt.adapt(model, "rotta", capacity=4, every=4, budget=0.4, lr=1e-3)
    for x in batches(6, size=4):
        adapter(x)
    state, own = adapter.snapshot(), dict(model.named_parameters())
    assert adapter.counts.updates
    assert len(state.tensors) < len(state.teacher) == len(own)
    for name, tensor in state.teacher.items():
        torch.testing.assert_close(tensor, own[name].detach(), rtol=1e-3, atol=1e-2)


def test_budgets_that_are_none_are_refused():
    for wrong in (-1, "a", float("nan"), True):
        with pytest.raises(OptionError, match="budget is"):
            tt.adapt(tiny(), "tent", budget=wrong)
    assert tt.adapt(tiny(), "tent").plan().spending is None


def test_what_a_guard_takes_between_answer_and_update_is_no_cost_of_the_update(costs):
    class Slow:
        def update(self, adapted, source):
            costs["time"] += 1000.0
            return False

        def reset(self):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    plain = tt.adapt(tiny("group"), "tent", budget=0.5)
    guarded = tt.adapt(tiny("group"), "tent", budget=0.5, guard=Slow())
    for adapter in (plain, guarded):
        costs["step"] = 2.0
        for x in batches(12):
            adapter(x)
    assert guarded.plan().spending == plain.plan().spending
    assert guarded.counts.updates == plain.counts.updates


def test_updates_that_took_no_longer_than_an_answer_took_nothing(costs):
    costs.update(plain=2.0, step=1.0)
    adapter = tt.adapt(deep(), "tent", budget=0.0)
    for x in batches(6):
        adapter(x)
    told = adapter.plan().spending
    assert (told.update, told.total, told.learnt) == (0, 0, 4 / 6)


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
