"""SimATTA against its reference, with an oracle, without, and with a budget that ends."""

import math

import pytest
import torch
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference import features as reference
from testtime._core.errors import InputError, MissingExtra, OptionError, TesttimeWarning


def answers(indices: Tensor, inputs: Tensor) -> Tensor:
    """An oracle: label of a place in the stream."""
    assert len(indices) == len(inputs)
    return indices * 7 % 5


def other_answers(indices: Tensor, inputs: Tensor) -> list[int]:
    return answers(indices, inputs).tolist()


ACTIVE = {"lr": 1e-3, "e_high": 0.1, "e_low": 1.25, "clusters": 3}


@pytest.mark.parametrize(("cold_start", "steps"), [(0, 12), (40, None)])
def test_simatta(cold_start, steps):
    model = tiny().double()
    places: list[int] = []

    def oracle(indices: Tensor, inputs: Tensor) -> Tensor:
        places.extend(indices.tolist())
        return answers(indices, inputs)

    adapter = tt.adapt(
        model, "simatta", oracle=oracle, budget=7, cold_start=cold_start, steps=steps, **ACTIVE
    )
    draws = torch.Generator().set_state(adapter.snapshot().generator.clone())
    other = reference.Simatta(
        model, lambda i: i * 7 % 5, 7, *(ACTIVE.values()), cold_start, steps, draws
    )
    xs = [x.double() for x in batches()]
    with pytest.warns(TesttimeWarning, match="all 7 labels") as told:
        given = [adapter(x) for x in xs]
    assert len(told) == 1
    for x, answer in zip(xs, given, strict=True):
        torch.testing.assert_close(answer, other(x), rtol=0, atol=1e-4)
    learnt = dict(other.model.named_parameters())
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-4)
    assert places == other.asked
    assert len(places) == 7 == adapter.events[-1].measured["labels"]
    weights = torch.tensor([w for _, _, w in other.target], dtype=torch.float)
    torch.testing.assert_close(adapter.snapshot().memory["target"]["weights"], weights)
    assert [e.measured["clusters"] for e in adapter.events] == list(range(3, 13))
    assert sum(e.measured["asked"] for e in adapter.events) == 7
    refused = [e.measured["refused"] for e in adapter.events]
    assert refused[0] == 0 < sum(refused)
    assert len(other.sure) == len(adapter.snapshot().memory["sure"]["labels"]) > 20


@pytest.mark.parametrize("options", [{}, {"oracle": answers, "e_high": math.inf}])
def test_simatta_without_labels_learns_from_its_sure_answers(options):
    adapter = tt.adapt(tiny(), "simatta", e_low=1.3, steps=5, **options)
    for x in batches(4):
        adapter(x)
    assert adapter.counts.updates == 4
    assert adapter.events[-1].measured["labels"] == 0
    assert not len(adapter.snapshot().memory["target"]["labels"])


def test_simatta_with_a_budget_of_none_is_simatta_without_an_oracle():
    options = {"e_low": 1.3, "steps": 5}
    asking, alone = (
        tt.adapt(tiny(), "simatta", **options, **more)
        for more in ({"oracle": answers, "budget": 0}, {})
    )
    with pytest.warns(TesttimeWarning, match="all 0 labels"):
        given = [asking(x) for x in batches(3)]
    assert all(torch.equal(alone(x), y) for x, y in zip(batches(3), given, strict=True))


def test_simatta_goes_on_from_a_file_with_another_oracle(tmp_path):
    first = tt.adapt(tiny(), "simatta", oracle=answers, steps=3, **ACTIVE)
    second = tt.adapt(tiny(), "simatta", oracle=other_answers, steps=3, **ACTIVE)
    xs = batches(6)
    for x in xs[:3]:
        first(x)
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    for x in xs[3:]:
        assert torch.equal(first(x), second(x))
    assert second.events[-1].measured["labels"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, x: [0], lambda i, x: i * 0 + 5, lambda i, x: i * 0.5, lambda i, x: i * 0 - 1,
        lambda i, x: None, lambda i, x: ["cat"] * len(i), lambda i, x: i * 1j,
    ],
)  # fmt: skip
def test_what_is_no_label_is_refused_and_changes_nothing(wrong):
    adapter = tt.adapt(tiny(), "simatta", oracle=wrong, e_high=0.1)
    mark = adapter.snapshot()
    with pytest.raises(InputError, match=r"the oracle gave .* from 0 to 4, in their order"):
        adapter(batches(1)[0])
    assert adapter.snapshot() is mark


def test_simatta_comes_to_an_end_where_no_draw_differs():
    adapter = tt.adapt(torch.nn.Linear(4, 3).eval(), "simatta", oracle=lambda i, x: i * 0)
    adapter(torch.ones(1, 4))  # the loss of one sample falls for ever
    assert adapter.events[-1].measured["steps"] == 2000


@pytest.mark.parametrize(("cold_start", "share"), [(0, 0.5), (2, 0.2)])
def test_the_loss_that_is_told_is_the_mean_over_steps_of_both_terms(cold_start, share):
    model, x = torch.nn.Linear(4, 3).eval(), torch.ones(1, 4)
    log_probs = model(x).detach().log_softmax(1)[0]
    sure = int(log_probs.argmax())
    adapter = tt.adapt(
        model, "simatta", oracle=lambda i, x: i * 0 + (sure + 1) % 3, e_high=0.0, e_low=9.0, lr=0.0,
        steps=7, cold_start=cold_start,
    )  # fmt: skip
    adapter(x)  # the only sample of both, so that all draws are alike
    event = adapter.events[-1]
    expected = -(1 - share) * log_probs[sure] - share * log_probs[(sure + 1) % 3]
    assert event.loss == pytest.approx(float(expected), rel=1e-5)
    assert (event.measured["steps"], event.used) == (7, 2)


def test_simatta_keeps_as_many_sure_samples_as_it_may():
    adapter = tt.adapt(tiny(), "simatta", e_low=2.0, steps=1, capacity=24)
    xs = batches(3)
    for x in xs:
        adapter(x)
    kept = adapter.snapshot().memory["sure"]["inputs"]
    assert len(kept) == 24
    assert kept.untyped_storage().nbytes() == kept.numel() * 4
    assert all(any(torch.equal(image, x) for x in xs[2]) for image in kept[-16:])


def test_simatta_names_the_extra_and_refuses_what_is_no_oracle(monkeypatch):
    with pytest.raises(OptionError, match="oracle is 3; expected"):
        tt.adapt(tiny(), "simatta", oracle=3)
    monkeypatch.setattr("testtime.adaptation.methods.simatta.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"testtime\[active\]"):
        tt.adapt(tiny(), "simatta", oracle=answers)
    tt.adapt(tiny(), "simatta")
