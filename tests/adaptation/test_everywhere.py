"""bfloat16 autocast, channels_last and compiled models: every method that can, within a tolerance.

Tensors that adapt are compared after two steps as a share of how far they moved, so that a step that
went astray is seen beside weights that hardly change.
"""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import testtime as tt
from models import Experts, batches, tiny
from testtime.adaptation.parts.views import (
    augmix_view,
    cotta_view,
    moco_view,
    roid_view,
    small_augmix_view,
    weak_view,
)

HOOKED = ("adanpc", "cafa", "dent", "domainadaptor", "lame", "memo")
"""Methods whose passes all need hooks, which a compiler does not call: these run without it."""
SMALL = {name: {"views": 2} for name in ("memo", "cotta", "psmt", "petal", "vcotta", "tesla")}
SMALL |= {"rotta": {"capacity": 16, "every": 16}, "simatta": {"e_low": 2.0, "steps": 3}}
SMALL |= {"stamp": {"views": 2, "capacity": 16, "margin": 0.8}}
ALL = sorted(set(tt.methods()) - {"foa"})  # foa takes transformers alone, see test_foa.py


def adapter_of(name: str, model: nn.Module):
    """An adapter; for a model of experts where the method weighs some."""
    model = Experts(model) if name == "sade" and not isinstance(model, Experts) else model
    loader = [(x.to(next(model.parameters()).dtype), torch.arange(len(x)) % 5) for x in batches(2)]
    source = tt.fit_source(model, loader, methods=[name]) if tt.methods()[name].needs else None
    return tt.adapt(model, name, source=source, **SMALL.get(name, {}))


def go(adapter, xs: list[Tensor]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [adapter(x) for x in xs]


def model_of() -> nn.Module:
    model = tiny()
    model.conv2.bias = None  # normalisation removes it: Adam would make steps of rounding noise
    return model


def gaps(name: str) -> list[float]:
    """How far probabilities under autocast are from those without, a mean for each batch."""
    xs = batches(3)
    expected = go(adapter_of(name, model_of()), xs)
    adapter = adapter_of(name, model_of())
    with torch.autocast("cpu", torch.bfloat16):
        answers = go(adapter, xs)
    assert all(t.dtype == torch.float32 for t in adapter.snapshot().tensors.values())
    return [
        float((mine.float().softmax(-1) - theirs.softmax(-1)).abs().mean())
        for mine, theirs in zip(answers, expected, strict=True)
    ]


def test_what_a_backward_keeps_may_wait_elsewhere():
    adapter, expected = adapter_of("tent", tiny()), go(adapter_of("tent", tiny()), batches(3))
    with save_on_cpu():
        answers = go(adapter, batches(3))
    assert all(map(torch.equal, answers, expected))


@pytest.mark.parametrize(
    "view", [cotta_view, roid_view, augmix_view, small_augmix_view, weak_view, moco_view]
)
def test_views_are_the_same_under_autocast(view):
    x = batches(1)[0]
    expected = view(x, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(view(x, torch.Generator().manual_seed(0)), expected)


@cache
def gap_of_a_forward() -> float:
    """The same of a forward that learns nothing: logits of size 10 have eight bits of mantissa."""
    return max(gaps("bn-adapt"))


@pytest.mark.parametrize("name", ALL)
def test_autocast_is_off_by_three_times_what_a_forward_is(name):
    assert max(gaps(name)) <= 3 * gap_of_a_forward()


@pytest.mark.parametrize("name", ALL)
def test_channels_last_moves_what_adapts_alike(name):
    # weights in float64, where order of summation shows in no digit that counts
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = model_of().double().to(memory_format=layout)
        adapter = adapter_of(name, model)
        source = {k: v.clone() for k, v in adapter.snapshot().tensors.items()}
        go(adapter, [x.double().contiguous(memory_format=layout) for x in batches(2)])
        now = adapter.snapshot().tensors
        moved.append(torch.cat([(now[k] - source[k]).flatten() for k in source] or [torch.ones(1)]))
    assert (moved[0] - moved[1]).norm() <= 1e-6 * moved[0].norm()


@pytest.mark.parametrize(
    "name",
    [n if n in ("tent", "eta") else pytest.param(n, marks=pytest.mark.slow) for n in ALL],
)
def test_compiled_models_answer_as_others_do(name):
    model, runs = model_of(), []

    def counted(graph, _):
        """The backend `eager`, which tells of each run."""
        return lambda *args: runs.append(graph) or graph(*args)

    adapter, expected = compiled(name, model, counted), adapter_of(name, model)
    runs.clear()
    for mine, theirs in zip(go(adapter, batches(2)), go(expected, batches(2)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert bool(runs) == (name not in HOOKED)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.extra),  # needs a C++ compiler
    ],
)
@pytest.mark.parametrize("name", ["tent", "eta", "sar", "deyo", "rotta", "bn-adapt"])
def test_traced_backwards_learn_as_others_do(name, backend):
    """With torch's compiler down to the traced backward, and to generated code."""
    model = model_of()
    adapter, expected = compiled(name, model, backend), adapter_of(name, model)
    for mine, theirs in zip(go(adapter, batches(3)), go(expected, batches(3)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def compiled(name: str, model: nn.Module, backend: Any):
    torch._dynamo.reset()
    model = Experts(model) if name == "sade" else model
    made = torch.compile(model, backend=backend)
    source = None
    if tt.methods()[name].needs:
        loader = [(x, torch.arange(len(x)) % 5) for x in batches(2)]
        source = tt.fit_source(made, loader, methods=[name])
    return tt.adapt(made, name, source=source, **SMALL.get(name, {}))
