"""What a step takes: passes, and memory that it gives back."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

import testtime as tt
from battery import adapter_of, each
from models import batches, tiny
from testtime.adaptation.engine import Engine

PASSES = {  # forward and backward passes for each sample, as the algorithms need them
    "source": (1, 0), "bn-adapt": (1, 0), "lame": (1, 0), "tent": (1, 1), "eta": (1, 1),
    "eata": (1, 1), "rdumb": (1, 1), "sar": (2, 2), "deyo": (2, 1), "ostta": (2, 1),
    "cotta": (2 + 1 + 1, 1), "memo": (2 + 1, 2), "rotta": (3, 1), "cafa": (1, 1), "adanpc": (1, 0),
    "vcotta": (2 * 3 + 1, 1), "tesla": (3 + 1 + 1 + 2, 1 + 2),
    "sade": (3, 0), "rmt": (3, 2), "roid": (2, 2), "psmt": (3 + 2, 2), "petal": (2 + 2, 1),
    "lerm": (1, 1), "sqrl": (1, 1), "dent": (7, 6), "domainadaptor": (2, 1),
}  # fmt: skip


EXACT = (
    "tent", "ostta", "cotta", "memo", "vcotta", "tesla", "lerm", "cafa", "dent", "domainadaptor",
    "sade", "rmt",
)  # fmt: skip
"""Methods that leave nothing out, whatever the batch."""


@each
def test_the_plan_says_what_a_step_costs(name):
    adapter = adapter_of(name)
    plan = adapter.plan()
    if name in PASSES:
        assert (plan.forwards, plan.backwards) == PASSES[name]
    for x in batches(3):
        adapter(x)
    counts = adapter.counts
    if plan.forwards is not None and plan.backwards is not None:
        assert counts.samples <= counts.forwards <= plan.forwards * counts.samples
        assert counts.backwards <= plan.backwards * counts.samples
        if name in EXACT:  # nothing is left out
            assert counts.forwards == plan.forwards * counts.samples
            assert counts.backwards == plan.backwards * counts.samples
    adapted = sum(tensor.nbytes for tensor in adapter.snapshot().tensors.values())
    assert plan.bytes >= adapted
    if name == "tent":  # the tensors, two moments, and the random state
        assert plan.bytes == adapter.plan().bytes == 3 * adapted + torch.get_rng_state().nbytes


@each
def test_nothing_but_the_state_outlives_a_step(name, monkeypatch):
    leaves: list[weakref.ref] = []

    def watched(engine, state, make=Engine.leaves):
        made = make(engine, state)
        leaves.extend(weakref.ref(tensor) for tensor in made.values())
        return made

    monkeypatch.setattr(Engine, "leaves", watched)
    adapter = adapter_of(name)
    xs = batches(8, 4)
    with torch.autocast("cpu", torch.bfloat16):  # whose cache lives as long as the region
        for x in xs[:4]:
            adapter(x)
        gc.collect()
        assert not [leaf for leaf in leaves if leaf() is not None]
    for event in adapter.events:
        for key, value in event.measured.items():
            if isinstance(value, Tensor):
                assert value.grad_fn is None
                # a number; of outlier scores, one for each sample
                assert value.untyped_storage().nbytes() <= (32 if key == "outlier" else 8)


@each
def test_memory_is_bounded(name):
    adapter = adapter_of(name)
    xs = batches(4, 4)

    def tensors() -> int:
        gc.collect()
        return sum(type(held) is Tensor for held in gc.get_objects())

    def go(steps: int) -> int:
        for step in range(steps):
            adapter(xs[step % 4])
        adapter._events.clear()
        return tensors()

    go(10)  # fills memories
    assert go(10) >= go(60) - 8


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [("tent", {}, True), ("cotta", {"views": 2}, True), ("tent", {"steps": 2}, False),
     ("memo", {"views": 4}, False)],
)  # fmt: skip
def test_whether_the_answer_comes_before_the_update_is_told(name, options, first):
    adapter = tt.adapt(tiny(), name, **options)
    x = batches(1)[0].sigmoid()
    assert adapter.plan(x).answers_first is first
    assert f"answers {'before' if first else 'after'} the update" in str(adapter.plan())
    assert torch.equal(adapter.predict(x), adapter(x)) is first
    assert "update" not in str(tt.adapt(tiny(), "bn-adapt").plan())
