"""Scales and shifts that torch's parametrisations make of other tensors: these adapt in their place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import testtime as tt
from battery import adapter_of, each, refuses, suited
from models import batches, tiny
from testtime.adaptation.layers import norm_kind, norm_layers


class Positive(nn.Module):
    """The exponential of a tensor."""

    def forward(self, x):
        return x.exp()

    def right_inverse(self, y):
        return y.log()


def parametrised(kind, made=nn.Identity, keys=("weight", "bias")):
    model = tiny(kind)
    for layer in (model.norm1, model.norm2):
        for key in keys:
            if getattr(layer, key, None) is not None:
                register_parametrization(layer, key, made())
    return model.eval()


@pytest.mark.parametrize("kind", ["batch", "layer", "rms", "frozen"])
@each
def test_a_parametrisation_that_changes_nothing_changes_nothing(name, kind):
    if refuses(name, kind) or name == "domainadaptor":  # which folds into no scale that is made
        return
    plain, made = adapter_of(name, tiny(kind)), adapter_of(name, parametrised(kind))
    for x in batches(3):
        torch.testing.assert_close(made(x), plain(x), rtol=1e-3, atol=1e-3)
    assert len(made.snapshot().tensors) == len(plain.snapshot().tensors)


@each
def test_a_model_with_parametrisations_is_given_back(name):
    model = suited(name, parametrised("batch", Positive, ["weight"]))
    before = copy.deepcopy(model.state_dict())
    adapter = adapter_of(name, model)
    x = batches(1)[0]
    adapter(x)
    adapter.export()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_tent_learns_what_a_scale_is_made_of():
    """One step of Tent by hand."""
    model, x = parametrised("batch", Positive, ["weight"]), batches(1)[0]
    adapter = tt.adapt(model, "tent", lr=0.1)
    adapter(x)
    own = copy.deepcopy(model)
    for layer in (own.norm1, own.norm2):
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    learns = {n: p for n, p in own.named_parameters() if n.startswith("norm")}
    optimizer = torch.optim.Adam(learns.values(), lr=0.1)
    logits = own(x)
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    entropy.backward()
    optimizer.step()
    assert set(adapter.snapshot().tensors) == set(learns)
    torch.testing.assert_close(adapter.predict(x), own(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.export()(x), adapter.predict(x))
    assert (adapter.export().norm1.weight > 0).all()


@pytest.mark.parametrize("made", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_torchs_own_parametrisations_of_a_scale_adapt(made):
    model = tiny("layer")
    made(model.norm1)
    adapter = tt.adapt(model.eval(), "tent", lr=0.1)
    x = batches(1)[0]
    adapter(x)
    names = [name for name in adapter.snapshot().tensors if "parametrizations.weight" in name]
    assert any(
        not torch.equal(adapter.snapshot().tensors[name], model.get_parameter(name))
        for name in names
    )
    torch.testing.assert_close(adapter.export()(x), adapter.predict(x))


def test_cotta_adapts_weights_that_a_parametrisation_makes():
    model = tiny("batch")
    plain = set(tt.adapt(model, "cotta").snapshot().tensors)
    parametrizations.weight_norm(model.conv1)
    made = {f"conv1.parametrizations.weight.original{i}" for i in (0, 1)}
    assert set(tt.adapt(model, "cotta").snapshot().tensors) == plain - {"conv1.weight"} | made


def test_a_layer_of_others_is_known_when_it_is_parametrised():
    model = parametrised("rms", Positive)
    assert norm_kind(model.norm1) == "layer"
    assert norm_layers(model)[0].tensors == ("norm1.parametrizations.weight.original",)
