"""What goes wrong in the middle of a stream changes nothing, and the stream goes on."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import LEARNING, WHOLE, adapter_of, alike, each
from models import batches, tiny
from testtime._core.errors import InputError
from testtime._core.outcomes import Outcome


@each
def test_a_failing_model_is_given_back(name):
    model = tiny()
    adapter = adapter_of(name, model)
    for x in batches(2):
        adapter(x)
    before = copy.deepcopy(model.state_dict())
    mark = adapter.snapshot()
    with pytest.raises(InputError, match="could not take"):
        adapter(torch.rand(4, 7, 8, 8))
    assert adapter.snapshot() is mark
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad for p in model.parameters())


@each
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.rand(0, 3, 8, 8), "empty"),
        (torch.full((2, 3, 8, 8), math.nan), "NaN"),
        (torch.full((2, 3, 8, 8), math.inf), "NaN or infinite"),
        (torch.rand(3, 8, 8), "takes"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating point"),
        ([1, 2], "tensor"),
        (torch.rand(2, 3, 8, 8).to_sparse(), "dense"),
        (torch.nested.nested_tensor([torch.rand(3, 8, 8)]), "nested"),
    ],
)
def test_bad_input_changes_nothing(name, bad, says):
    adapter = adapter_of(name)
    x = batches(1)[0]
    adapter(x)
    mark, counts = adapter.snapshot(), adapter.counts
    for call in (adapter, adapter.predict):
        with pytest.raises(InputError, match=says):
            call(bad)
    assert adapter.snapshot() is mark
    assert adapter.counts == counts


@pytest.mark.parametrize("name", [n for n in LEARNING if n not in WHOLE])
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = tiny()
    adapter = adapter_of(name, model)
    xs = batches(3)
    adapter(xs[0])
    mark = adapter.snapshot()
    with torch.no_grad():
        kept = model.head.weight.clone()
        model.head.weight.fill_(math.nan)
    answer = adapter(xs[1])
    with torch.no_grad():
        model.head.weight.copy_(kept)
    assert answer.shape == (16, 5)
    for key, value in adapter.snapshot().tensors.items():
        if key != "head.weight":
            assert torch.equal(value, mark.tensors[key])
    assert adapter(xs[2]).isfinite().all()


def test_non_finite_steps_are_counted():
    model = tiny()
    adapter = tt.adapt(model, "tent")
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    adapter(batches(1)[0])
    assert adapter.events[-1].outcome is Outcome.NON_FINITE
    assert adapter.counts.skipped == 1


class Faulty(nn.Module):
    """Goes wrong on demand: in the answer for one sample, inside, or everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.fault = tiny(), ""

    def forward(self, x):
        if self.fault == "inside":
            x = torch.cat([x[:1] * math.nan, x[1:]])
        logits = self.net(x)
        if self.fault == "sample":
            return torch.cat([logits[:1] * math.nan, logits[1:]])
        return logits * math.nan if self.fault == "everywhere" else logits


EASY = {"eta": {"margin": 0.9, "redundancy": 0.99}, "bn-adapt": {"momentum": 0.1}}
EASY |= {"eata": EASY["eta"], "rdumb": EASY["eta"]}


def all_finite(tree) -> bool:
    if isinstance(tree, Tensor):
        return bool(tree.isfinite().all())
    if isinstance(tree, dict | list | tuple):
        return all(map(all_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


@each
@pytest.mark.parametrize("fault", ["sample", "inside", "everywhere"])
def test_a_stream_survives_answers_that_are_no_numbers(name, fault):
    model = Faulty().eval()
    adapter = adapter_of(name, model, **EASY.get(name, {}))
    xs = batches(8)
    adapter(xs[0])
    model.fault = fault
    assert adapter(xs[1]).shape == (16, 5)
    model.fault = ""
    assert all_finite(vars(adapter.snapshot()))
    assert all(adapter(x).isfinite().all() for x in xs[2:])
    if name in EASY and name != "bn-adapt":  # one bad sample once ended all learning
        assert adapter.counts.updates >= 6


class Bomb(nn.Module):
    """Raises at the n-th forward from now."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.net, self.error, self.left = tiny(), error, math.inf

    def forward(self, x):
        logits = self.net(x)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return logits


@each
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_in_the_middle_of_a_step_changes_nothing(name, error):
    model, xs = Bomb(error("boom")).eval(), batches(3)
    model.train()
    adapter, expected = adapter_of(name, model), adapter_of(name)
    for x in xs[:2]:
        adapter(x)
        expected(x)
    mark, counts, before = adapter.snapshot(), adapter.counts, copy.deepcopy(model.state_dict())
    for forward in (1, 2, 3):
        model.left = forward
        try:
            adapter(xs[2])
        except error:
            assert adapter.snapshot() is mark
            assert adapter.counts == counts
        assert all(module.training for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_pre_hooks for m in model.modules())
        adapter.restore(mark)
    model.left = math.inf
    assert torch.equal(adapter(xs[2]), expected(xs[2]))


def test_a_callback_that_raises_is_heard_after_the_step():
    adapter = tt.adapt(tiny(), "tent", on_event=lambda event: 1 / 0)
    adapter(batches(1)[0])
    with pytest.raises(ZeroDivisionError):
        adapter.flush()
    assert adapter.counts.steps == len(adapter.events) == 1


@pytest.mark.parametrize("deferred", [False, True])
def test_a_callback_that_raises_costs_no_answer(deferred):
    def fail(event):
        raise ConnectionError(f"step {event.step} was not told")

    xs = batches(3)
    adapter = tt.adapt(tiny(), "tent", on_event=fail, deferred=deferred)
    quiet = tt.adapt(tiny(), "tent", deferred=deferred)
    for step, x in enumerate(xs, start=1):
        assert torch.equal(adapter(x), quiet(x))
        with pytest.raises(ConnectionError, match=f"step {step} was not told") as heard:
            adapter(x)  # does nothing itself
        assert heard.value.__notes__ == [f"raised by on_event after step {step}, which stands"]
        assert adapter.counts == quiet.counts
    adapter.flush()
    assert alike(vars(adapter.snapshot()), vars(quiet.snapshot()))


def test_errors_of_callbacks_in_several_threads_are_all_heard():
    together = threading.Barrier(3)

    def fail(event):
        together.wait(timeout=60)  # all have answered before any error is kept
        raise ConnectionError(event.step)

    adapter = tt.adapt(tiny(), "tent", on_event=fail)
    with ThreadPoolExecutor(3) as pool:
        assert all(answer.isfinite().all() for answer in pool.map(adapter, batches(3)))
    heard = set()
    for _ in range(3):
        with pytest.raises(ConnectionError) as error:
            adapter.flush()
        heard.add(error.value.args[0])
    adapter.flush()
    assert heard == {1, 2, 3}


def test_an_interrupt_in_a_callback_is_not_kept():
    def interrupt(event):
        raise KeyboardInterrupt

    adapter = tt.adapt(tiny(), "tent", on_event=interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapter(batches(1)[0])
    adapter.flush()
    assert adapter.counts.steps == 1
