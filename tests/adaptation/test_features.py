"""Methods that work on features, against their references, step by step over ten batches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference import features as reference
from testtime._core.errors import InputError, NeedsSource
from testtime.adaptation.methods.cafa import cafa, intra_and_inter, mahalanobis


def labelled(count: int, *, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, with all five classes in each."""
    sizes = [16, 11, 20, 13]
    return [
        (x[: sizes[i % 4]], torch.arange(sizes[i % 4]) % 5)
        for i, x in enumerate(batches(count, 20, seed=seed))
    ]


def test_class_moments_are_those_of_all_samples_at_once():
    for tied in (True, False):
        loader = labelled(7)
        known = tt.fit_source(tiny(), loader, methods=cafa(tied=tied))["class_moments"]
        count, mean, covariance = reference.class_gaussians(tiny(), loader, classes=5, tied=tied)
        np.testing.assert_array_equal(known["count"], count)
        np.testing.assert_allclose(known["mean"], mean, rtol=1e-9)
        np.testing.assert_allclose(known["covariance"], covariance, rtol=0, atol=1e-12)


def test_class_moments_keep_their_digits_far_from_zero():
    model = tiny().double()
    with torch.no_grad():
        model.norm2.bias.add_(1e6)  # features of 1e6 that differ by about 1
    loader = [(x.double(), y) for x, y in labelled(4)]
    known = tt.fit_source(model, loader, methods="cafa")["class_moments"]
    _, _, covariance = reference.class_gaussians(model, loader, classes=5, tied=True)
    np.testing.assert_allclose(known["covariance"], covariance, rtol=0, atol=1e-8)


def test_class_moments_take_predictions_where_there_are_no_labels():
    model, xs = tiny(), batches(3)
    with torch.no_grad():
        guessed = [(x, model(x).argmax(1)) for x in xs]
    with_labels = tt.fit_source(model, guessed, methods="cafa")["class_moments"]
    without = tt.fit_source(model, xs, methods="cafa")["class_moments"]
    assert all(torch.equal(value, without[name]) for name, value in with_labels.items())


@pytest.mark.parametrize(
    "labels", [torch.arange(16), torch.arange(16) - 1, torch.rand(16), torch.zeros(16, 1).long()]
)
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(InputError, match="from 0 to 4"):
        tt.fit_source(tiny(), [(batches(1)[0], labels)], methods="cafa")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_cafa(tied, reduction):
    model, loader = tiny(), labelled(6)
    known = tt.fit_source(model, loader, methods=cafa(tied=tied))
    count, means, covariance = reference.class_gaussians(model, loader, classes=5, tied=tied)
    each = covariance[None].repeat(5, 0) if tied else covariance
    variance = sum(n * np.trace(c) / 8 for n, c in zip(count, each, strict=True)) / count.sum()
    inverses = np.linalg.inv(each + 0.05 * variance * np.eye(8))
    other = reference.Cafa(tiny(), 1e-2, means, inverses, reduction == "sample")
    adapter = tt.adapt(
        model, "cafa", lr=1e-2, tied=tied, reduction=reduction, shrinkage=0.05, source=known
    )
    for x in batches():
        torch.testing.assert_close(adapter(x), other(x), rtol=0, atol=1e-4)
    learnt = dict(other.model.named_parameters())
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-4)
        assert float((value - dict(model.named_parameters())[name]).abs().max()) > 1e-3
    assert [e.loss for e in adapter.events] == pytest.approx(other.losses, abs=1e-4)


@given(seed=st.integers(0, 1000), tied=st.booleans())
@settings(max_examples=20, deadline=None)
def test_distances_are_scipys(seed, tied):
    chance = np.random.default_rng(seed)
    g, means = chance.normal(size=(4, 3)), chance.normal(size=(5, 3))
    roots = chance.normal(size=(5, 3, 6))
    covariances = roots @ roots.transpose(0, 2, 1)
    if tied:
        covariances[:] = covariances[0]
    factors = torch.linalg.cholesky(torch.as_tensor(covariances))
    got = mahalanobis(torch.as_tensor(g), torch.as_tensor(means), factors[0] if tied else factors)
    for n, c in np.ndindex(4, 5):
        expected = scipy_mahalanobis(g[n], means[c], np.linalg.inv(covariances[c])) ** 2
        assert float(got[n, c]) == pytest.approx(expected, rel=1e-6)


def test_a_feature_on_its_mean_has_a_finite_loss_and_gradient():
    g = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.double, requires_grad=True)
    means, unit = g.detach().clone(), torch.eye(2, dtype=torch.double)
    intra, inter = intra_and_inter(mahalanobis(g, means, unit), torch.arange(2))
    loss = (intra.log() - inter.log()).sum()
    assert loss.isfinite()
    assert torch.autograd.grad(loss, g)[0].isfinite().all()


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_cafa_does_not_see_the_scale_of_features(reduction):
    losses = []
    for scale in (1.0, 64.0):
        model = tiny()
        with torch.no_grad():
            model.norm2.weight.mul_(scale)
            model.norm2.bias.mul_(scale)
            model.head.weight.div_(scale)
        known = tt.fit_source(model, labelled(3), methods="cafa")
        adapter = tt.adapt(model, "cafa", reduction=reduction, source=known)
        adapter(batches(1)[0])
        losses.append(adapter.events[-1].loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_cafa_lowers_its_ratio_on_a_batch_that_comes_again():
    model, x = tiny(), batches(1)[0]
    adapter = tt.adapt(model, "cafa", source=tt.fit_source(model, labelled(3), methods="cafa"))
    for _ in range(10):
        adapter(x)
    losses = [event.loss for event in adapter.events]
    assert all(later < before for before, later in itertools.pairwise(losses))


@pytest.mark.parametrize("tied", [True, False])
def test_a_class_that_the_source_did_not_show_has_what_the_others_have_on_average(tied):
    loader = [(x, y % 3) for x, y in labelled(4)]
    known = tt.fit_source(tiny(), loader, methods=cafa(tied=tied))["class_moments"]
    assert known["count"][3:].tolist() == [0, 0]
    all_at_once = [(x, y * 0) for x, y in loader]
    _, mean, _ = reference.class_gaussians(tiny(), all_at_once, classes=1, tied=True)
    torch.testing.assert_close(known["mean"][3:], torch.as_tensor(mean).expand(2, -1))
    if not tied:
        _, _, pooled = reference.class_gaussians(tiny(), loader, classes=5, tied=True)
        torch.testing.assert_close(known["covariance"][4], torch.as_tensor(pooled))


def test_covariances_of_the_other_kind_are_refused():
    known = tt.fit_source(tiny(), labelled(2), methods="cafa")
    with pytest.raises(NeedsSource, match=r"cafa\(tied=False\)"):
        tt.adapt(tiny(), "cafa", tied=False, source=known)(batches(1)[0])
