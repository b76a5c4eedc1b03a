"""ROID against its reference, step by step over ten batches."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import testtime as tt
from following import T, Z, assert_follows, close, darker
from models import batches, tiny, tiny_vit
from reference import teachers as reference
from testtime.adaptation.methods.roid import (
    CertainAndDiverse,
    PriorCorrection,
    roid,
    soft_likelihood_ratio,
)
from testtime.adaptation.parts.objective import symmetric_cross_entropy
from testtime.adaptation.parts.views import cotta_view, plain, roid_view
from testtime.adaptation.ranks import Ranks
from testtime.measures.entropy import entropy


def test_symmetric_cross_entropy():
    assert float(symmetric_cross_entropy(Z, T).mean()) == pytest.approx(0.977513, abs=1e-6)
    close(symmetric_cross_entropy(Z, T), symmetric_cross_entropy(T, Z))


def test_roid_weights_loss_and_prior():
    part = CertainAndDiverse(temperature=1 / 3, momentum=0.9)
    weights, state = part(Z, Z, entropy(Z), Ranks(), part.init())
    close(weights / 0.5, [3.835425, 0, 20.085537, 0])  # half of the batch teaches
    close(soft_likelihood_ratio(Z), [-0.575430, 0.511337, -1.821900, 0.685637])
    certain = soft_likelihood_ratio(torch.tensor([[90.0, 0.0]], dtype=torch.double))
    assert float(certain) == pytest.approx(-0.99 * math.log(99 + 1e-5), abs=1e-9)
    close(Z.softmax(1).mean(0), [0.426478, 0.413843, 0.159680])
    close(state["mean"], 0.9 / 3 + 0.1 * Z.softmax(1).mean(0))
    prior = PriorCorrection(form="logits")
    close(prior.smoothed(Z.softmax(1)), [0.361181, 0.357403, 0.281416])
    few = Z[:2].softmax(1)  # fewer than classes: smoothed by 1 / 2 and not by 1 / 3
    own = 0.5 / few.mean(0).max()
    close(prior.smoothed(few), (few.mean(0) + own) / (1 + 3 * own))
    bayes = PriorCorrection(form="probs")(Z, Ranks()).softmax(1)
    weighed = Z.softmax(1) * prior.smoothed(Z.softmax(1))
    close(bayes, weighed / weighed.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["batch", "group", "layer"])
def test_roid(kind):
    other = reference.Roid(tiny(kind), 1e-2, lambda x: 0.8 * x)
    adapter = tt.adapt(tiny(kind), "roid", lr=1e-2, augment=darker)
    assert_follows(adapter, other, other.model)
    assert [event.used for event in adapter.events] == other.taught
    assert all(0 < used < 16 for used in other.taught)
    assert adapter.counts.forwards == 160 + sum(other.taught)


def rows() -> nn.Module:
    """Batches of equal rows have no variance: what is left of them is rounding, enlarged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(192, 10), nn.BatchNorm1d(10), nn.ReLU()]
        return nn.Sequential(
            *layers, nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 5)
        ).eval()


def test_roid_draws_its_views_from_the_adapters_generator():
    adapter = tt.adapt(tiny(), "roid", lr=1e-2)
    draws = torch.Generator().set_state(adapter.snapshot().generator.clone())
    other = reference.Roid(tiny(), 1e-2, lambda x: roid_view(x, draws))
    assert_follows(adapter, other, other.model)


def test_roid_keeps_to_the_source():
    model, source = tiny(), dict(tiny().named_parameters())

    def distance(**options) -> float:
        adapter = tt.adapt(model, "roid", augment=plain, **options)
        for x in batches():
            adapter(x)
        return max(
            float((value - source[name].detach()).abs().max())
            for name, value in adapter.snapshot().tensors.items()
        )

    assert distance(lr=0.0) < 1e-6
    assert distance(lr=1e-2, momentum=0.5) < distance(lr=1e-2, momentum=1.0)
    assert roid(momentum=1.0).restoration([Z], [T])[0] is Z


@pytest.mark.parametrize("size", [2, 3, 5, 13])
@pytest.mark.parametrize("make", [tiny, partial(tiny, "group"), tiny_vit, rows])
def test_roid_learns_from_a_batch_of_equal_samples(make, size):
    adapter = tt.adapt(make(), "roid", augment=darker)
    for x in batches(2):
        assert adapter(x[:1].expand(size, -1, -1, -1)).isfinite().all()
        assert adapter.events[-1].used == size


def test_samples_that_are_alike_weigh_the_same_however_their_answers_were_rounded():
    part = CertainAndDiverse(temperature=1 / 3, momentum=0.9)
    noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    logits, same = Z[:1] + 1e-3 * noise, torch.rand(1, 3, 8, 8).expand(16, -1, -1, -1).clone()
    weights, _ = part(same, logits, entropy(logits), Ranks(), part.init())
    assert weights.tolist() == [1.0] * 16
    same[3, 2, 1, 0] += 1e-6
    weights, _ = part(same, logits, entropy(logits), Ranks(), part.init())
    assert 0 < int((weights > 0).sum()) < 16
    mirrored = torch.tensor([[2.0, 0.0], [0.0, 2.0]])  # as sure, and as unlike the mean
    weights, _ = part(mirrored, mirrored, entropy(mirrored), Ranks(), part.init())
    assert weights.tolist() == [1.0, 1.0]


def test_roid_view_neither_blurs_nor_adds_noise():
    x = torch.rand(1, 3, 1, 1).expand(2, 3, 12, 10)
    for seed in range(10):
        seen = roid_view(x, torch.Generator().manual_seed(seed))
        assert seen.shape == x.shape
        close(seen, seen[..., :1, :1].expand_as(seen), atol=1e-5)
    seen = cotta_view(x, torch.Generator().manual_seed(0))
    assert float((seen - seen[..., :1, :1]).abs().max()) > 1e-3
