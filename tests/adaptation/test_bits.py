"""To the last bit as one writes it down: Adam makes whole steps of rounding where a gradient is zero."""

import copy

import pytest
import torch
from torch import Tensor

import testtime as tt
from models import batches, tiny
from testtime.adaptation.kernels import as_written
from testtime.adaptation.methods.rotta import BalancedMemory
from testtime.adaptation.parts.statistics import Moments
from testtime.adaptation.parts.views import plain


class RobustNorm(torch.nn.Module):
    """RoTTA's layer, by the operations that its code is made of."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(p.clone()) for p in layer.parameters())
        self.mean, self.var, self.eps = layer.running_mean, layer.running_var, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            var, mean = torch.var_mean(x, dim=[0, 2, 3], unbiased=False)
            mean, var = 0.95 * self.mean + 0.05 * mean, 0.95 * self.var + 0.05 * var
            self.mean, self.var = mean.detach(), var.detach()
        else:
            mean, var = self.mean, self.var
        mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, var, self.weight, self.bias))
        return (x - mean) / torch.sqrt(var + self.eps) * weight + bias


def test_rotta(monkeypatch):
    banks = []

    def learn(self, engine, state, items, clock):
        items = sorted(items, key=lambda item: item.label)
        ages = torch.tensor([(clock - item.born) / self.capacity for item in items])
        banks.append((torch.stack([item.image for item in items]), ages))
        return inner(self, engine, state, items, clock)

    inner = BalancedMemory._learn
    monkeypatch.setattr(BalancedMemory, "_learn", learn)
    model = tiny()
    adapter = tt.adapt(model, "rotta", augment=plain, capacity=16, every=16)
    student = copy.deepcopy(model).requires_grad_(False)
    student.norm1, student.norm2 = RobustNorm(model.norm1), RobustNorm(model.norm2)
    teacher = copy.deepcopy(student).requires_grad_(False)
    learnt = [f"{norm}.{key}" for norm in ("norm1", "norm2") for key in ("weight", "bias")]
    optimizer = torch.optim.Adam([student.get_parameter(name) for name in learnt], lr=1e-3)
    for x in batches(8):
        assert torch.equal(adapter(x), teacher.eval()(x))
        bank, ages = banks.pop()
        for network in (student, teacher):
            network.train()
            network.drop.eval()
        s, t, fresh = student(bank), teacher(bank), torch.exp(-ages)
        optimizer.zero_grad()
        loss = -(t.softmax(1) * s.log_softmax(1)).sum(1)
        (loss * (fresh / (1 + fresh))).mean().backward()
        optimizer.step()
        for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
            own.copy_((1 - 0.001) * own + 0.001 * other.detach())
    state = adapter.snapshot()
    assert all(torch.equal(value, student.get_parameter(n)) for n, value in state.tensors.items())
    assert state.teacher.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, teacher.get_parameter(n)) for n, value in state.teacher.items())
    for name in ("norm1", "norm2"):
        assert torch.equal(state.averages[f"{name}.mean"], getattr(student, name).mean)
        assert torch.equal(state.averages[f"{name}.var"], getattr(student, name).var)


SHAPES = [(64, 40), (64, 40, 1, 1), (5, 3, 7), (16, 6, 24, 24), (1, 3, 80, 90), (2, 3, 6, 30, 30)]


def written(x: Tensor, weight: Tensor, bias: Tensor, blend, eps: float) -> Tensor:
    wide = (1, -1, *[1] * (x.dim() - 2))
    others = [d for d in range(x.dim()) if d != 1]
    used = blend(Moments(*reversed(torch.var_mean(x, dim=others, unbiased=False))))
    x = (x - used.mean.view(wide)) / torch.sqrt(used.var.view(wide) + eps)
    return x * weight.view(wide) + bias.view(wide)


@pytest.mark.parametrize("layout", ["contiguous", "turned", "both turned", "expanded"])
@pytest.mark.parametrize("size", [1 << 18, 700])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer(shape, size, layout, monkeypatch):
    monkeypatch.setattr(as_written, "CACHED", size)
    chance = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(shape, generator=chance) for _ in range(2))
    mean, var, weight, bias = torch.randn(4, shape[1], generator=chance)
    x, var = x + 3 * mean.view(1, -1, *[1] * (x.dim() - 2)), 0.1 + var.square()
    if "turned" in layout:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "both turned":
        slope = slope.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "expanded":  # what a mean over pixels hands back
        slope = slope.flatten(1)[:, : shape[1]].view(*shape[:2], *[1] * (x.dim() - 2))
        slope = slope.expand(shape)

    def blend(batch: Moments) -> Moments:
        return Moments(0.9 * mean + 0.1 * batch.mean, 0.9 * var + 0.1 * batch.var)

    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    ours, theirs = (
        (made, *torch.autograd.grad(made, leaves, slope))
        for made in (f(*leaves, blend, 1e-5) for f in (as_written.normalise_as_written, written))
    )
    assert all(map(torch.equal, ours, theirs))
    assert ours[0].stride() == x.stride()


def test_a_gradient_that_others_hold_stays(monkeypatch):
    chance = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(4, 3, 9, 9, generator=chance).requires_grad_() for _ in range(2))
    scale = torch.randn(3, generator=chance).requires_grad_()
    given, made = [], []
    inner = as_written._backward

    def backward(ctx, grad, ours):
        found = inner(ctx, grad, ours)
        given.append(grad.data_ptr())
        made.append(found[0].data_ptr())
        return found

    monkeypatch.setattr(as_written, "_backward", backward)

    def gradients(function):
        once = function(x, scale, scale, lambda batch: Moments(0.3 * batch.mean, batch.var), 1e-3)
        twice = function(once * slope, scale, scale, lambda batch: batch, 1e-3)
        return torch.autograd.grad(((once + twice) * slope).sum(), [x, slope, scale])

    # where gradients meet, torch adds them up in an order of its own
    torch.testing.assert_close(gradients(as_written.normalise_as_written), gradients(written))
    assert [a == b for a, b in zip(given, made, strict=True)] == [False, True]


def test_an_input_that_needs_no_gradient():
    chance = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(4, 3, 9, 9, generator=chance) for _ in range(2))
    leaves = [value.requires_grad_() for value in torch.randn(2, 3, generator=chance)]
    ours, theirs = (
        torch.autograd.grad(f(x, *leaves, lambda batch: batch, 1e-3), leaves, slope)
        for f in (as_written.normalise_as_written, written)
    )
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.slow
def test_on_two_threads(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(as_written, "CACHED", 1 << 15)
        for shape in ((3, 3, 200, 250), (2, 3, 300, 301), (1, 5, 260, 260)):
            test_a_layer(shape, 1 << 15, "contiguous", monkeypatch)
    finally:
        torch.set_num_threads(threads)


def test_gradients_in_double():
    x = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (x, *torch.rand(2, 3, dtype=torch.float64))]

    def made(x, weight, bias):
        return as_written.normalise_as_written(
            x, weight, bias, lambda batch: Moments(0.3 * batch.mean, 1 + 0.3 * batch.var), 1e-3
        )

    assert torch.autograd.gradcheck(made, leaves)


@pytest.mark.parametrize(
    "x",
    [
        torch.full((8, 2, 60, 60), 0.1),
        torch.tensor([[1.0], [1.0 + 2**-23]]).repeat(64, 3),  # means just between two numbers
        1000 + torch.randn(64, 5, 40, generator=torch.Generator().manual_seed(0)),
        torch.rand(64, 50, 9, 9, generator=torch.Generator().manual_seed(0)),
    ],
    ids=["constant", "between", "far", "many"],
)
def test_moments(x):
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    assert all(map(torch.equal, as_written.exact_moments(x), (mean, var)))
