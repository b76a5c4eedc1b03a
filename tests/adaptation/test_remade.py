"""What is made again in a backward is what it was, and answers and gradients are torch's to the last bit."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import testtime as tt
from kept import answer_and_gradients, assert_same
from models import batches
from testtime.adaptation import loan
from testtime.adaptation.kernels import lean
from testtime.adaptation.kernels.batch_statistics import norm_of_batch
from testtime.adaptation.kernels.lean import Lean
from testtime.adaptation.kernels.remade import Remade

HALF = torch.bfloat16, torch.float16


class OfBatch(nn.BatchNorm2d):
    """As the engine has torch's own layers normalise; from `least` values on by the quick kernel."""

    def __init__(self, channels: int, least: int) -> None:
        super().__init__(channels)
        self.least = least

    def forward(self, input):
        return norm_of_batch(input, self.weight, self.bias, self.eps, self.least)


NORMS = [
    nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm((4, 5, 5)),
    OfBatch(4, least=1), OfBatch(4, least=1000),
]  # fmt: skip
SMOOTH = [*lean.ACTIVATIONS, F.elu, F.relu, torch.sigmoid]
WRITING = [partial(f, inplace=True) for f in SMOOTH if f not in (F.gelu, torch.sigmoid)]


class Gated(nn.Module):
    """A normalisation, an activation, and gates on what it gives."""

    def __init__(self, norm: nn.Module, activation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.activation = norm, activation
        self.weight = torch.randn(4, 4, 1, 1)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)

    def forward(self, x):
        z = self.activation(self.norm(F.conv2d(x, self.weight)))
        gate = torch.sigmoid(z.mean((2, 3), keepdim=True))
        z = z * gate + gate * torch.mul(z, gate)
        return F.conv2d(z, self.weight)


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("activation", [*SMOOTH, *WRITING])
@pytest.mark.parametrize("first", [False, True])
def test_activations_of_a_normalisation(norm, activation, first):
    model = Gated(norm, activation)
    x = torch.randn(3, 4, 5, 5, requires_grad=not first)  # a first layer's input gets no gradient
    assert_same(model, x, list(norm.parameters()))


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu6])
def test_activations_under_autocast(norm, activation):
    class Inside(Gated):  # the backward runs outside
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    assert_same(Inside(norm, activation), x, list(norm.parameters()))


@pytest.mark.parametrize(
    ("weights", "cast"),  # torch itself has no normalisation of two different short types
    [(torch.float32, torch.float16), *((own, each) for own in HALF for each in (None, own))],
)
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(5, 5), nn.BatchNorm1d(5)], ids=str)
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu])
def test_weights_of_one_type_under_autocast_to_another(weights, cast, norm, activation):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = norm.to(weights), nn.Linear(6, 6).to(weights)
            self.linear.requires_grad_(False)

        def forward(self, x):
            with torch.autocast("cpu", cast, enabled=cast is not None):
                z = activation(self.norm(self.linear(x)))
                return self.linear(z * torch.sigmoid(z.mean(-1, keepdim=True)))

    torch.manual_seed(0)
    model = Cast()
    x = torch.randn(3, 5, 6, dtype=weights, requires_grad=True)
    assert_same(model, x, list(model.norm.parameters()))


def test_what_ran_under_autocast_is_made_again_under_it():
    """On a GPU it casts a normalisation, so that weights of another type fit nowhere else."""
    seen = []

    def norm(x, sizes):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return F.layer_norm(x, sizes)

    remade, x = Remade(), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = norm(x, (3,))
        remade.normalised(y, norm, (3,))
    with torch.no_grad():
        assert torch.equal(remade.way(y)(), y)
    assert seen == [(True, torch.float16)] * 2
    assert not torch.is_autocast_enabled("cpu")


def test_products_are_kept_in_a_shorter_type_as_all_is():
    x, w = torch.randn(2, 3, 4).requires_grad_()
    with lean.kept_as(torch.bfloat16, least=1), Lean(least=1):
        y = x * w
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, w.bfloat16().float())


def test_a_factor_that_lies_otherwise_in_the_same_memory_is_not_taken_for_the_other():
    class Turned(nn.Module):
        def forward(self, x):
            y = F.silu(F.layer_norm(x, (5, 5)))
            return y * y.transpose(1, 2)

    assert_same(Turned(), torch.randn(3, 5, 5, requires_grad=True))


def test_averages_move_once():
    """To make again what a normalisation gave is no second batch for its averages."""
    x = torch.randn(3, 4, 5, 5)
    found = []
    for context in (nullcontext(), Lean(least=1)):
        model = Gated(nn.BatchNorm2d(4), F.silu)
        answer_and_gradients(model, x, list(model.norm.parameters()), context)
        found.append(model.norm.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_what_was_written_to_is_not_made_again():
    class Shifted(nn.Module):
        def forward(self, x):
            y = F.layer_norm(x, (5,))
            y += 1.0
            return F.silu(y) * 2.0

    assert_same(Shifted(), torch.randn(3, 5, requires_grad=True))


class Rest(nn.Module):
    """Normalises, and then has an activation."""

    def __init__(self, activation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5)
        self.activation = activation

    def forward(self, x):
        return self.head(self.activation(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(("activation", "notes"), [(F.relu, [2, 0, 0]), (F.silu, [2, 2, 2])])
def test_nothing_is_noted_once_nothing_was_made_again(activation, notes, monkeypatch):
    """On a GPU it is calls that take time."""
    monkeypatch.setattr(loan, "MANY", 1)
    monkeypatch.setattr(lean, "LEAST", {"cpu": 1})
    found, note = [], Remade.note

    def noted(self, made, way):
        found[-1] += 1
        note(self, made, way)

    monkeypatch.setattr(Remade, "note", noted)
    adapter = tt.adapt(Rest(activation), "tent")
    for x in batches(3):
        found.append(0)
        adapter(x)
    assert found == notes


def test_what_begins_to_be_made_again_is_noted_from_the_next_forward_on(monkeypatch):
    monkeypatch.setattr(loan, "MANY", 1)
    monkeypatch.setattr(lean, "LEAST", {"cpu": 1})
    model = Rest(F.relu)
    adapter, alone = (tt.adapt(model, "tent") for _ in range(2))
    for number, x in enumerate(batches(4)):
        model.activation = F.relu if number < 2 else F.silu
        monkeypatch.setattr(loan, "Lean", partial(Lean, least=1 << 40))  # torch's own
        expected = alone(x)
        monkeypatch.setattr(loan, "Lean", Lean)
        assert torch.equal(adapter(x), expected)
        assert adapter._engine.loan.remakes == (number > 1)
