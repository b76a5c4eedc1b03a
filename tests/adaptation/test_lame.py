"""LAME against its reference, and on samples that lie close together."""

import pytest
import torch
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference import methods as reference
from testtime.adaptation.methods.lame import affinities


def test_lame():
    model = tiny("group")
    kept: list[Tensor] = []
    for x in batches(3):
        hook = model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        with torch.no_grad():
            logits = model(x)
        hook.remove()
        got = tt.adapt(model, "lame")(x).softmax(1)
        torch.testing.assert_close(
            got, reference.lame(logits, kept[-1], 5).float(), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["knn", "rbf"])
def test_lame_tells_close_samples_apart(kind):
    generator = torch.Generator().manual_seed(0)
    features = 1 + 1e-4 * torch.randn(64, 32, generator=generator)
    close = affinities(features, kind=kind, neighbours=5)
    exact = affinities(features.double(), kind=kind, neighbours=5)
    torch.testing.assert_close(close.double(), exact, rtol=0, atol=1e-2)
