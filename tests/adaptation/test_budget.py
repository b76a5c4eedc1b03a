"""A budget is kept by counting and by the clock; the clock is a list here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import testtime as tt
from models import batches, deep, tiny
from testtime._core.errors import OptionError
from testtime._core.outcomes import Outcome
from testtime.adaptation.budget import CHEAPER, PART, entered, executed, later, opened, teaching
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import Loan


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
