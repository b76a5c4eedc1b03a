"""The methods, each with an adapter and a small network, for what is asked of all of them."""

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from models import Experts, batches, tiny
from testtime._core.errors import ScopeError
from testtime._core.registry import find
from testtime.adaptation.recipe import Recipe

SMALL = {
    **{name: {"views": 2} for name in ("memo", "cotta", "psmt", "petal", "vcotta", "tesla")},
    "rotta": {"capacity": 16, "every": 16},
    "stamp": {"views": 2, "capacity": 16, "margin": 0.8},
    "simatta": {"e_low": 2.0, "steps": 3},
}
"""Options with which a method is quick, and learns from small batches."""
ALL = sorted(set(tt.methods()) - {"foa"})
"""FOA takes transformers alone: what is asked here is asked of it in test_foa.py."""
LEARNING = [name for name in ALL if name not in ("source", "bn-adapt", "lame")]
WEIGHING = ("sade",)
"""Methods for models of several experts; they answer with one tensor. See test_experts."""
WHOLE = ("cotta", "memo", "rmt", "psmt", "petal", "sqrl")
"""Methods that adapt all weights."""
each = pytest.mark.parametrize("name", ALL)
KINDS = ["batch", "sync", "group", "layer", "instance", "frozen", "rms"]
"""Kinds of normalisation that a tiny network may have."""


def recipe_of(name: str) -> Recipe:
    return find("method", name).build(**SMALL.get(name, {}))


def suited(name: str, model: nn.Module) -> nn.Module:
    """The model, with experts where the method weighs some."""
    return Experts(model) if name in WEIGHING and type(model) is not Experts else model


def adapter_of(name: str, model: nn.Module | None = None, **more) -> tt.Adapter:
    """The method on a tiny network, or on another, with what it needs of source data."""
    model = suited(name, tiny() if model is None else model)
    where = next(model.parameters())
    loader = [(x.to(where), torch.arange(len(x), device=where.device) % 5) for x in batches(2)]
    source = tt.fit_source(model, loader, methods=[name]) if tt.methods()[name].needs else None
    return tt.adapt(model, name, source=source, **{**SMALL.get(name, {}), **more})


def refuses(name: str, kind: str) -> bool:
    """Whether a method is not for networks of a kind; it then says so when it is built."""
    if name != "bn-adapt" or kind not in ("group", "layer", "rms"):
        return False
    with pytest.raises(ScopeError, match="statistics"):
        adapter_of(name, tiny(kind))
    return True


def alike(one, two) -> bool:
    """Whether two trees hold the same, to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(alike, one, two))
    return one == two


def told(adapter) -> list[tuple]:
    """What the events of an adapter say."""
    return [(e.step, e.outcome, e.samples, e.loss, e.entropy, e.used) for e in adapter.events]
