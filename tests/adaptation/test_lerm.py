"""LERM against its reference, and its loss in other methods."""

from dataclasses import replace

import pytest
import torch

import testtime as tt
from models import batches, tiny
from reference.lerm import Lerm
from testtime._core.errors import OptionError
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.parts.objective import LabelEncoding


@pytest.mark.parametrize(
    ("kind", "distance"),
    [("batch", "absolute"), ("group", "absolute"), ("batch", "squared"), ("batch", "divergence")],
)
def test_lerm_step_by_step(kind, distance):
    other = Lerm(tiny(kind), 1e-2, distance)
    adapter = tt.adapt(tiny(kind), "lerm", lr=1e-2, distance=distance)
    for x in batches():
        torch.testing.assert_close(adapter(x), other(x), rtol=0, atol=1e-4)
    learnt = dict(other.model.named_parameters())
    source = dict(tiny(kind).named_parameters())
    moved = 0.0
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-4)
        moved = max(moved, float((value - source[name].detach()).abs().max()))
    assert moved > 1e-2


@pytest.mark.parametrize("distance", ["absolute", "squared", "divergence"])
def test_its_loss_serves_other_recipes(distance):
    alone = tt.adapt(tiny(), sar(lr=1e-2, margin=2.0))
    adapter = tt.adapt(
        tiny(), replace(sar(lr=1e-2, margin=2.0), batch_objective=LabelEncoding(distance))
    )
    for x in batches(3):
        adapter(x)
        alone(x)
    assert adapter.counts.updates == 3
    for name, value in adapter.snapshot().tensors.items():
        assert not torch.equal(value, alone.snapshot().tensors[name])


def test_another_distance_is_refused():
    with pytest.raises(OptionError, match="distance is 'cubed'"):
        tt.adapt(tiny(), "lerm", distance="cubed")
