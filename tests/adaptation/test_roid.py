"""ROID against its reference, step by step over ten batches."""

import pytest
import torch

import testtime as tt
from following import T, Z, assert_follows, close, darker
from models import batches, tiny
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
    weights, state = part(Z, entropy(Z), Ranks(), part.init())
    close(weights / 0.5, [3.835425, 0, 20.085537, 0])  # half of the batch teaches
    close(soft_likelihood_ratio(Z), [-0.575430, 0.511337, -1.821900, 0.685637])
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


def test_roid_learns_from_a_batch_of_equal_samples():
    adapter = tt.adapt(tiny("group"), "roid", augment=darker)
    x = batches(1)[0][:1].expand(4, -1, -1, -1)
    assert adapter(x).isfinite().all()
    assert adapter.events[-1].used == 4


def test_roid_view_neither_blurs_nor_adds_noise():
    x = torch.rand(1, 3, 1, 1).expand(2, 3, 12, 10)
    for seed in range(10):
        seen = roid_view(x, torch.Generator().manual_seed(seed))
        assert seen.shape == x.shape
        close(seen, seen[..., :1, :1].expand_as(seen), atol=1e-5)
    seen = cotta_view(x, torch.Generator().manual_seed(0))
    assert float((seen - seen[..., :1, :1]).abs().max()) > 1e-3
