"""LERM against its reference, and its loss in other methods."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference.lerm import Lerm
from testtime._core.errors import OptionError
from testtime._core.outcomes import Outcome
from testtime._core.registry import find
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.parts.objective import LabelEncoding
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.ranks import Ranks

SMALL = {"memo": {"views": 2}, "cotta": {"views": 2}, "rotta": {"capacity": 16, "every": 16}}
SMALL |= {
    "psmt": {"views": 2},
    "petal": {"views": 2},
    "vcotta": {"views": 2},
    "tesla": {"views": 2},
}
SMALL |= {"stamp": {"views": 2, "margin": 1.0}, "simatta": {"e_low": 2.0, "steps": 3}}


@dataclass(frozen=True)
class Watched:
    """The loss, which notes that it was asked for."""

    asked: list[Tensor]

    def __call__(self, logits: Tensor, ranks: Ranks) -> Tensor:
        self.asked.append(logits)
        return LabelEncoding()(logits, ranks)


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


@pytest.mark.parametrize("name", sorted(set(tt.methods()) - {"foa", "sade"}))
@pytest.mark.parametrize("alone", [False, True])
def test_its_loss_is_minimised_in_any_method_or_refused(name, alone):
    recipe = find("method", name).build(**SMALL.get(name, {}))
    more = {"objective": None} if alone else {}
    more |= {} if recipe.optimizer else {"optimizer": Adam(lr=1e-3), "scope": norm_affine}
    if name in ("adanpc", "simatta", "vcotta"):  # whose loops have a loss of their own
        with pytest.raises(OptionError, match="a loss of its own"):
            replace(recipe, batch_objective=LabelEncoding(), **more)
        return
    asked: list[Tensor] = []
    mixed = replace(recipe, batch_objective=Watched(asked), **more)
    loader = [(x, torch.arange(len(x)) % 5) for x in batches(2)]
    source = tt.fit_source(tiny(), loader, methods=[mixed]) if mixed.needs else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rules of pixels
        adapter = tt.adapt(tiny(), mixed, source=source)
        adapter(batches(1)[0])
    assert asked or adapter.events[-1].outcome is Outcome.NOTHING_RELIABLE


def test_another_distance_is_refused():
    with pytest.raises(OptionError, match="distance is 'cubed'"):
        tt.adapt(tiny(), "lerm", distance="cubed")
