"""Ctrl-C wherever it falls: the model is given back, and a step was taken as a whole or not at all."""

import threading

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import interrupts
import testtime as tt
from battery import alike
from interrupts import interrupted
from models import batches, tiny
from testtime.adaptation import loan
from testtime.adaptation.kernels import calls
from testtime.adaptation.loan import lock_of


def borrowed() -> nn.Module:
    model = tiny().train()
    model.conv1.weight.requires_grad_(False)
    model.norm1.register_forward_hook(lambda *_: None)
    return model


def told(model: nn.Module):
    """All that a loan could leave behind."""
    return {
        name: {
            key: {k: (id(v), getattr(v, "requires_grad", None)) for k, v in value.items()}
            if isinstance(value, dict)
            else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def free(model: nn.Module) -> bool:
    """Whether another thread may have the model."""
    taken: list[bool] = []

    def take() -> None:
        with lock_of(model):
            taken.append(True)

    other = threading.Thread(target=take, daemon=True)
    other.start()
    other.join(10)
    return taken == [True]


KINDS = {
    "plain": {}, "guard": {"guard": True}, "gate": {"gate": True}, "budget": {"budget": 9.0},
    "deferred": {"deferred": True},
}  # fmt: skip


def test_an_interrupt_leaves_no_mode_of_torch_behind(monkeypatch):
    """Wherever it falls among those who look at calls: all of torch in this thread would pay for it."""
    monkeypatch.setattr(loan, "MANY", 1)
    monkeypatch.setattr(interrupts, "ROOM", calls.__file__)
    xs, adapter = batches(3), tt.adapt(borrowed(), "tent")
    for x in xs[:2]:
        adapter(x)
    mark = adapter.snapshot()
    places = interrupted(lambda: adapter(xs[2]))
    assert places > 50
    for at in range(1, places + 1):
        adapter.restore(mark)
        interrupted(lambda: adapter(xs[2]), at)
        assert not _get_current_function_mode_stack(), at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "seen"), [("tent", 0), ("tent", 2), ("rotta", 1)])
def test_an_interrupt_leaves_all_before_a_step_or_after_it(method, seen, kind, monkeypatch):
    monkeypatch.setattr(loan, "MANY", 1)
    xs, options = batches(seen + 2), KINDS[kind]
    if method == "rotta":
        options = {**options, "capacity": 16, "every": 16}

    def ready():
        model = borrowed()
        adapter = tt.adapt(model, method, **options)
        for x in xs[:seen]:
            adapter(x)
        adapter.flush()
        return model, adapter

    model, adapter = ready()
    before = adapter.snapshot()
    places = interrupted(lambda: adapter(xs[seen]))
    states = {seen: before, seen + 1: adapter.snapshot()}
    last = adapter(xs[seen + 1])
    assert places > 50
    for at in range(1, places, max(places // 24, 1)):
        model, adapter = ready()
        was = told(model)
        interrupted(lambda: adapter(xs[seen]), at)  # noqa: B023
        adapter.flush()
        assert told(model) == was, at
        assert free(model), at
        assert torch.is_autocast_cache_enabled(), at
        assert torch.is_grad_enabled(), at
        steps = adapter.counts.steps
        assert len(adapter.events) == steps, at
        if kind != "budget":  # whose account tells of times
            assert alike(vars(adapter.snapshot()), vars(states[steps])), at
        if steps == seen:
            adapter(xs[seen])
        assert torch.equal(adapter(xs[seen + 1]), last), at
