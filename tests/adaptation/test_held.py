"""Beside the model lies only what changed: no copy of the source, nor of what no teacher averages."""

import pytest
import torch

import testtime as tt
from models import batches, tiny

SMALL = {"cotta": {"views": 2}, "rotta": {"capacity": 16, "every": 16}}


def places(tensors) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


@pytest.mark.parametrize("name", ["tent", "sar", "cotta", "rotta", "ostta"])
def test_a_fresh_adapter_holds_no_copy(name):
    model = tiny()
    own = places([*model.parameters(), *model.buffers()])
    state = tt.adapt(model, name, **SMALL.get(name, {})).snapshot()
    assert places(state.tensors.values()) <= own
    assert places((state.teacher or {}).values()) <= own


@pytest.mark.parametrize("name", ["tent", "sar", "cotta", "rotta", "ostta"])
def test_after_steps_only_what_adapts_is_held(name):
    model = tiny()
    own = dict(model.named_parameters())
    adapter = tt.adapt(model, name, **SMALL.get(name, {}))
    for x in batches(4):
        adapter(x)
    state = adapter.snapshot()
    adapted = {key for key in own if key in state.tensors}
    assert state.tensors.keys() == adapted
    for teacher in [state.teacher] if state.teacher else []:
        assert teacher.keys() == (own.keys() if name == "rotta" else adapted)
    if name in ("tent", "rotta", "ostta"):
        assert all(own[key].dim() == 1 for key in adapted)
    adapter.reset()  # the source comes from the model, which was never written to
    again = adapter.snapshot().tensors
    assert all(torch.equal(again[key], own[key]) for key in again)
    assert places(again.values()) <= places(own.values())


@pytest.mark.parametrize(("name", "asked"), [("rotta", False), ("tent", False), ("cotta", True)])
def test_weights_ask_for_a_gradient_only_where_they_adapt(name, asked):
    model, found = tiny(), []
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(
        lambda module, _, out: found.append(module.weight.requires_grad and out.requires_grad)
    )
    adapter = tt.adapt(model, name, **SMALL.get(name, {}))
    for x in batches(4):
        adapter(x)
    assert any(found) == asked
