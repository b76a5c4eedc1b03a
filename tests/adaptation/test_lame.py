"""LAME against its reference, and on samples that lie close together."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference import methods as reference
from testtime.adaptation.methods.lame import affinities, laplacian_assignments


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


@pytest.mark.parametrize("count", [12, 3])
@pytest.mark.parametrize("kind", ["knn", "rbf", "linear"])
def test_affinities_are_their_definitions_also_of_fewer_samples_than_neighbours(kind, count):
    features = torch.randn(count, 4, generator=torch.Generator().manual_seed(0)).double()
    unit = (features / features.norm(dim=1, keepdim=True)).numpy()
    apart = cdist(unit, unit)
    order, nearest = apart.argsort(1), np.zeros_like(apart)
    for i in range(count):
        nearest[i, order[i, 1:6]] = 1
    width = np.sort(apart, 1)[:, min(5, count) - 1].mean()
    expected = torch.as_tensor({
        "knn": nearest, "rbf": np.exp(-(apart**2) / (2 * width**2)), "linear": unit @ unit.T
    }[kind])  # fmt: skip
    close = affinities(features, kind=kind, neighbours=5)
    torch.testing.assert_close(close, expected, rtol=0, atol=1e-7)
    both = affinities(features, kind=kind, neighbours=5, symmetric=True)
    torch.testing.assert_close(both, (expected + expected.T) / 2, rtol=0, atol=1e-7)


def test_lame_takes_the_affinity_that_it_was_given():
    features, x = torch.nn.Identity(), torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(features, torch.nn.Linear(4, 3)).requires_grad_(False)
    for options in ({"affinity": "rbf"}, {"affinity": "linear"}, {"neighbours": 2},
                    {"neighbours": 2, "symmetric": True}):  # fmt: skip
        told = {"kind": "knn", "neighbours": 5, **options}
        told["kind"] = told.pop("affinity", told["kind"])
        expected = laplacian_assignments(model(x).log_softmax(1), affinities(x, **told))
        torch.testing.assert_close(tt.adapt(model, "lame", **options)(x), expected)
