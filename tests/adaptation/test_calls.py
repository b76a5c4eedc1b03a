"""Calls are seen by all who look, the last first; what is called inside is not; other threads neither."""

import threading

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from others import Seeing, handling
from testtime.adaptation.kernels.batch_statistics import norm_of_batch
from testtime.adaptation.kernels.calls import Watching, _here
from testtime.adaptation.kernels.lean import Lean


class Noting(Watching):
    """Notes the functions that it sees."""

    def __init__(self, name, told, *functions):
        self.name, self.told, self.functions = name, told, functions

    def see(self, func, go_on, args, kwargs):
        self.told.append((self.name, func))
        return go_on(*args, **kwargs)


X, WEIGHT = torch.randn(2, 3), torch.randn(4, 3)


def test_the_last_sees_a_call_first_and_others_are_left_alone():
    told = []
    with Noting("outer", told, F.linear, torch.relu), Noting("inner", told, F.linear):
        y = torch.relu(F.linear(X, WEIGHT)).exp()
    assert told == [("inner", F.linear), ("outer", F.linear), ("outer", torch.relu)]
    assert torch.equal(y, F.linear(X, WEIGHT).relu().exp())
    F.linear(X, WEIGHT)
    assert len(told) == 3
    assert _here.mode is None


def test_what_one_asks_of_a_tensor_is_no_call_of_the_others():
    class Asking(Noting):
        def see(self, func, go_on, args, kwargs):
            assert args[0].numel() == 6
            torch.relu(args[0])
            return super().see(func, go_on, args, kwargs)

    told = []
    with Noting("outer", told, torch.relu, torch.Tensor.numel), Asking("inner", told, F.linear):
        F.linear(X, WEIGHT)
    assert told == [("inner", F.linear)]


def test_functions_that_others_compiled_are_none_to_trace():
    compiled = torch.compile(lambda x: F.silu(x) * 2, backend="aot_eager", fullgraph=True)
    for number in range(2):  # seen by another each time
        with Noting(number, [], F.silu), Lean(least=1):
            assert torch.equal(compiled(F.linear(X, WEIGHT)), F.silu(F.linear(X, WEIGHT)) * 2)


def test_one_that_begins_inside_of_a_call_sees_its_own():
    class Beginning(Noting):
        def see(self, func, go_on, args, kwargs):
            with Noting("within", self.told, torch.relu):
                torch.relu(args[0])
            return super().see(func, go_on, args, kwargs)

    told = []
    with Beginning("outer", told, F.linear), Noting("last", told, torch.relu):
        F.linear(X, WEIGHT)
        torch.relu(X)
    assert told == [("within", torch.relu), ("outer", F.linear), ("last", torch.relu)]


class InBackward(torch.autograd.Function):
    """Somebody begins to look while a gradient is taken, as an adapter in a backward does."""

    @staticmethod
    def forward(ctx, x, told):
        ctx.told = told
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with Noting("within", ctx.told, torch.relu):
            torch.relu(X)
        return grad, None


def test_one_that_begins_inside_of_a_call_that_nobody_sees_sees_its_own():
    told = []
    x = X.clone().requires_grad_()
    with Noting("outer", told, F.linear):
        torch.autograd.grad(InBackward.apply(x, told).sum(), x)
        InBackward.apply(x, told).sum().backward()
        F.linear(X, WEIGHT)
    assert told == [("within", torch.relu)] * 2 + [("outer", F.linear)]
    assert _here.mode is None


def test_arguments_may_have_any_name():
    def own(x, *, place, func):
        if has_torch_function_unary(x):
            return handle_torch_function(own, (x,), x, place=place, func=func)
        return place, func

    told = []
    with Noting("here", told, own):
        assert own(X, place=1, func=2) == (1, 2)
    assert told == [("here", own)]


def test_an_error_leaves_nothing_behind():
    told = []
    one, two = Noting("outer", told, F.linear), Noting("inner", told, F.linear)
    with pytest.raises(RuntimeError), one, two:
        F.linear(X, WEIGHT.T)
    assert len(told) == 2
    assert _here.mode is None
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_first_may_end_before_the_last():
    told = []
    one, two = Noting("one", told, torch.relu), Noting("two", told, torch.relu)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    torch.relu(X)
    two.__exit__(None, None, None)
    torch.relu(X)
    assert told == [("two", torch.relu)]


def test_other_threads_are_not_seen():
    told = []
    with Noting("here", told, torch.relu):
        other = threading.Thread(target=lambda: torch.relu(X))
        other.start()
        other.join()
    assert told == []


def test_modes_and_tensors_of_others_see_torchs_batch_normalisation():
    x = torch.randn(2, 3, 32)
    assert (
        norm_of_batch(x.as_subclass(handling(F.batch_norm)), None, None, 1e-5, least=1) == "handled"
    )
    with Seeing() as mode:
        norm_of_batch(x, None, None, 1e-5, least=1)
    assert F.batch_norm in mode.seen
