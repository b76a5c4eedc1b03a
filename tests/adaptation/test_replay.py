"""The second forward of the few that teach takes what the first one knows; numbers stay."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import testtime as tt
from models import batches, tiny, tiny_vit
from testtime.adaptation import shortcuts
from testtime.adaptation.kernels import replay
from testtime.adaptation.kernels.replay import Recorded, Replayed, dear_layers
from testtime.adaptation.methods.deyo import deyo
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.parts.scope import all_parameters, norm_affine

MARGINS = {"group": 0.65, "layer": 0.62, "vit": 0.43}
CHOSEN = torch.tensor([1, 4])


@pytest.fixture
def taken(monkeypatch):
    """Everything is kept, however small; how often it was taken."""
    monkeypatch.setattr(Recorded.__init__, "__kwdefaults__", {"wide": 3, "dear": 1, "least": 1})
    monkeypatch.setattr(shortcuts, "WORTH", 1)
    told = []
    out = Replayed.__exit__

    def leave(self, *error):
        told.append(self.taken)
        return out(self, *error)

    monkeypatch.setattr(Replayed, "__exit__", leave)
    return told


@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize("name", ["eta", "sar", "deyo", "everything"])
def test_steps_are_those_of_one_graph(name, kind, taken, monkeypatch):
    margin = MARGINS[kind]
    own = {
        "eta": eta(lr=0.01, margin=margin, redundancy=1.0),
        "sar": sar(lr=0.01, margin=margin, recover_below=0.0, scope=norm_affine),
        "deyo": deyo(
            lr=0.01, entropy_margin=margin, drop_margin=-0.05, patches=2, scope=norm_affine
        ),
        "everything": replace(eta(lr=0.01, margin=margin, redundancy=1.0), scope=all_parameters),
    }[name]
    model = (tiny_vit() if kind == "vit" else tiny(kind)).double()
    whole, few = tt.adapt(model, own), tt.adapt(model, own)
    xs = [x.double() for x in batches(5)]
    monkeypatch.setattr(shortcuts, "FEW", 0)
    expected = [whole(x) for x in xs]
    assert not taken
    monkeypatch.setattr(shortcuts, "FEW", 2)
    for x, answer in zip(xs, expected, strict=True):
        torch.testing.assert_close(few(x), answer, rtol=1e-9, atol=1e-9)
    for key, value in whole.snapshot().tensors.items():
        torch.testing.assert_close(few.snapshot().tensors[key], value, rtol=1e-9, atol=1e-9)
    assert taken
    assert all(taken) != (name == "everything")  # what learns is computed


def both(model, second=None, *, least=1, layers=()):
    """What a model gives for the chosen: alone, and with the help of a forward of all."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    x = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad(), Recorded(6, layers, dear=1, least=least) as recorded:
        model(x)
    x = x[CHOSEN].requires_grad_()
    with Replayed(recorded, CHOSEN) as replayed:
        found = (second or model)(x)
    expected = (second or model)(x)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), x),
        torch.autograd.grad(expected.square().sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)
    return replayed.taken


class Calls(nn.Module):
    """Some calls, one after another."""

    def __init__(self, *calls):
        super().__init__()
        self.calls, self.weight = calls, nn.Parameter(torch.randn(4, 4, 3, 3).double())
        self.square = nn.Parameter(torch.randn(8, 8).double())

    def forward(self, x):
        for call in self.calls:
            x = call(self, x)
        return x


def conv(self, x):
    return F.conv2d(x, self.weight, stride=1, padding=1)


def linear(self, x):
    return F.linear(x, self.square)


def test_convolutions_and_linear_layers_are_taken():
    assert both(Calls(conv, linear, conv)) == 3
    assert both(Calls(conv, linear, conv), least=1000) == 0


class Layers(nn.Module):
    """Torch's own layers, one of them twice."""

    def __init__(self, first=None):
        super().__init__()
        self.first = first or nn.Conv2d(4, 4, 3, 1, 1)
        self.then, self.last = nn.Linear(8, 8, bias=False), nn.Conv2d(4, 2, 3, groups=2, stride=2)
        self.double()

    def forward(self, x):
        return self.last(self.first(input=self.then(self.first(x).relu())))


def test_layers_are_asked_in_place_of_all_calls():
    model, seen = Layers(), []
    layers = dear_layers(model)
    assert layers == [model.first, model.then, model.last]
    model.first.register_forward_hook(lambda *_: seen.append(len(layers[0].__dict__)))
    assert both(model, layers=layers) == both(model) == 4
    assert "forward" not in vars(model.first)
    model.then.register_forward_hook(lambda _, __, y: 2 * y)  # after what is kept
    assert both(model, layers=layers) == 4
    model.last.forward = lambda x: 3 * nn.Conv2d.forward(model.last, x)
    assert both(model, layers=layers) == 3  # since another has come, it is computed
    assert seen


class Mixed(nn.Module):
    """Layers that a second forward computes anew, between two that it does not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 2, 3)
        self.named = nn.Conv2d(4, 4, 3, padding="same")
        self.short, self.mixing = nn.Conv2d(4, 4, 1), nn.Linear(8, 8)

    def forward(self, x):
        x = self.named(self.first(x).relu())
        with torch.autocast("cpu", torch.bfloat16):
            x = self.short(x).float()
        x = self.mixing(x.transpose(2, 3)).contiguous()
        x = self.mixing(torch.stack([self.first(each[None])[0] for each in x]))
        return self.last(x)


def test_layers_are_kept_in_the_order_in_which_they_are_asked_for():
    model = Mixed().requires_grad_(False)
    x = torch.randn(6, 4, 8, 8)
    with torch.no_grad(), Recorded(6, dear_layers(model), dear=1, least=1) as recorded:
        whole = model(x)
    with Replayed(recorded) as replayed:
        again = model(x)
    assert torch.equal(again, whole)
    assert replayed.taken == 3  # the first, the last, and what mixes the second time


class Twice(Layers):
    """The weight of a layer before the layer runs, at other places; then the layer past its hooks."""

    def forward(self, x):
        x = F.conv2d(x, self.first.weight, padding=2, dilation=2)
        return self.last(self.first.forward(self.first(x).relu()))


def test_what_others_compute_with_a_layers_weight_is_none_of_its_calls():
    model = Twice()
    assert both(model, layers=dear_layers(model)) == 3


class Own(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / 2, padding=1)


@pytest.mark.parametrize(
    "other",
    [
        Own(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        Calls(conv),
    ],
)
def test_all_calls_are_watched_where_others_multiply_too(other):
    assert dear_layers(Layers(other)) == []


def test_an_output_that_was_written_to_is_computed():
    assert both(Calls(conv, lambda _, x: x.relu_() if x.grad_fn is None else x.relu(), conv)) == 1
    assert both(Calls(conv, lambda _, x: x.relu(), conv)) == 2


def test_another_order_or_shape_is_computed():
    first = Calls(conv, linear, conv)
    other = Calls(linear, conv)
    other.weight, other.square = first.weight, first.square
    assert both(first, other) == 0
    halved = Calls(conv, lambda _, x: x[:, :, ::2], linear)
    halved.weight, halved.square = first.weight, first.square
    assert both(first, halved) == 1


def test_a_batch_that_is_folded_into_more_rows_is_computed():
    fold = Calls(lambda _, x: x.view(-1, 8), linear, lambda _, x: x.view(-1, 4, 8, 8), conv)
    assert both(fold) == 1


def test_padding_by_name_and_autocast_are_computed():
    assert both(Calls(lambda m, x: F.conv2d(x, m.weight, padding="same"))) == 0
    model = Calls(conv).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), Recorded(6, dear=1, least=1) as recorded:
        model(torch.randn(6, 4, 8, 8).double())
    assert not recorded.told()


@pytest.mark.parametrize("layer", [nn.Linear, partial(nn.Conv1d, kernel_size=1)])
def test_complex_numbers_are_computed(layer):
    layer = layer(8, 8, dtype=torch.complex64).requires_grad_(False)
    x, slope = torch.randn(2, 6, 8, 8, dtype=torch.complex64)
    with torch.no_grad(), Recorded(6, dear=1, least=1) as recorded:
        layer(x)
    with Replayed(recorded):
        y = layer(x.requires_grad_())
    found, expected = (torch.autograd.grad(made, x, slope) for made in (y, layer(x)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("turn", [lambda y: y.transpose(1, 2), lambda y: y.mean(1, keepdim=True)])
def test_gradients_of_linear_layers_are_torchs_whoever_wants_those_of_weights(wanted, turn):
    torch.manual_seed(0)
    layer = nn.Linear(300, 64).requires_grad_(False)
    x = torch.randn(6, 2, 300, requires_grad=True)
    slope = torch.randn(turn(layer(x)).shape)

    def gradient(y):
        layer.requires_grad_(wanted)  # as the caller left it, once the loan is over
        (grad,) = torch.autograd.grad((turn(y) * slope).sum(), x)
        layer.requires_grad_(False)
        return grad

    expected = gradient(layer(x))
    with torch.no_grad(), Recorded(6, dear=1, least=1) as recorded:
        layer(x)
    with Replayed(recorded) as replayed:
        assert torch.equal(gradient(layer(x)), expected)
    assert replayed.taken == 1


def test_linear_layers_of_what_lies_otherwise_are_computed():
    """torch may multiply them sample by sample, and rounds otherwise then."""
    layer = nn.Linear(8, 4).requires_grad_(False)
    with Recorded(6, dear=1, least=1) as recorded:
        layer(torch.randn(6, 8, 2).transpose(1, 2))
    assert not recorded.kept


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "kept"),
    [(32, 256, 1024, 1), (31, 256, 1024, 0), (33, 255, 1020, 0), (32, 256, 1025, 0)],
)
def test_what_is_kept_took_many_multiplications_and_is_not_wide(tokens, inputs, outputs, kept):
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    with torch.no_grad(), Recorded(2) as recorded:
        layer(torch.zeros(2, tokens, inputs))
    assert len(recorded.told()) == kept


class Sudden(nn.Linear):
    """A layer at which an interrupt falls."""

    @property
    def forward(self):
        raise KeyboardInterrupt


def test_an_interrupt_while_layers_are_lent_gives_them_back(monkeypatch):
    layers = [nn.Linear(4, 3), nn.Conv2d(1, 2, 3), Sudden(4, 3)]
    monkeypatch.setitem(replay._LAYERS, Sudden.forward, replay._linear)
    with pytest.raises(KeyboardInterrupt), Recorded(8, layers, dear=1):
        pass
    assert not any("forward" in vars(layer) for layer in layers)
