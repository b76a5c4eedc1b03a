"""Steps of the reliable few: a hundred of them in double precision, and what is told of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import alike
from models import batches, tiny
from reference import methods as reference
from testtime._core.outcomes import Outcome
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.parts.optimizer import SGD, SharpnessAware

LN = math.log(5)


def double(kind: str) -> nn.Module:
    return tiny(kind).double()


def assert_follows(adapter: tt.Adapter, other, model: nn.Module) -> None:
    """Answers and what adapts agree over a hundred batches, to the precision of the numbers."""
    for x in batches(100):
        torch.testing.assert_close(adapter(x.double()), other(x.double()), rtol=0, atol=1e-8)
    learnt = dict(model.named_parameters())
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_eta(kind):
    other = reference.Eata(double(kind), 1e-2, 0.8 * LN, 0.9, None, 0)
    adapter = tt.adapt(double(kind), "eta", lr=1e-2, margin=0.8, redundancy=0.9)
    assert_follows(adapter, other, other.model)
    assert [event.used for event in adapter.events] == other.taught
    assert sum(map(bool, other.taught)) > 10


@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize(("margin", "recover"), [(0.6, 0.0), (0.6, 0.75), (0.3, 0.0)])
def test_sar_and_what_is_told_of_it(kind, margin, recover):
    other = reference.Sar(double(kind), 1e-2, margin * LN, 0.05, recover)
    adapter = tt.adapt(double(kind), "sar", lr=1e-2, margin=margin, recover_below=recover)
    assert_follows(adapter, other, other.model)
    assert [event.used for event in adapter.events] == [used for used, _ in other.told]
    for event, (_, loss) in zip(adapter.events, other.told, strict=True):
        assert event.loss == (None if loss is None else pytest.approx(loss, abs=1e-8))
    outcomes = [event.outcome for event in adapter.events]
    assert adapter.counts.resets == outcomes.count(Outcome.RECOVERED) == other.resets
    assert (other.resets > 3) == (recover > 0)


def test_nothing_reliable_at_the_worst_point_moves_nothing_and_is_told():
    x = batches(1)[0]
    recipe = eta(lr=1e-2, margin=0.5, redundancy=1.0)
    far = replace(recipe, optimizer=SharpnessAware(base=SGD(lr=1e-2, momentum=0.9), rho=0.1))
    adapter = tt.adapt(tiny(), far)
    mark = adapter.snapshot()
    answer: Tensor = adapter(x)
    event, state = adapter.events[-1], adapter.snapshot()
    assert (event.outcome, event.used, event.loss) == (Outcome.NOTHING_RELIABLE, 0, None)
    assert alike(state.tensors, mark.tensors)
    assert alike(state.optimizer, mark.optimizer)
    chosen = reference.entropy(answer) < 0.5 * LN
    assert chosen.any()
    expected = answer.softmax(1)[chosen].mean(0)  # where the batch was, some were reliable
    torch.testing.assert_close(state.selection[0]["mean"], expected)
