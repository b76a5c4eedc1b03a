"""Methods that work on features, against their references, step by step over ten batches."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.special import softmax
from sklearn import neighbors
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference import features as reference
from testtime._core.errors import (
    InputError,
    NeedsSource,
    OptionError,
    StateError,
)
from testtime._core.outcomes import Outcome
from testtime.adaptation.methods.cafa import ClassAlignment, cafa, intra_and_inter, mahalanobis


def labelled(count: int, *, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes, with all five classes in each."""
    sizes = [16, 11, 20, 13]
    return [
        (x[: sizes[i % 4]], torch.arange(sizes[i % 4]) % 5)
        for i, x in enumerate(batches(count, 20, seed=seed))
    ]


def test_labels_count_whatever_holds_them():
    kinds = [Tensor.tolist, Tensor.numpy, Tensor.short]
    x = torch.cat([x for x, _ in labelled(4)])[:20]
    y = (torch.arange(20) * 3) % 5
    first, *others = [
        tt.fit_source(tiny(), [(x, kind(y))], methods="cafa")["class_moments"]["mean"]
        for kind in (Tensor.clone, *kinds)
    ]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("loader", "methods", "said"),
    [
        ([(torch.rand(2, 3, 8, 8), ["a.png", "b.png"])], "cafa", "the loader gave .'a.png'"),
        (None, "cafa", "loader is of type NoneType; expected batches"),
        ([torch.rand(2, 3, 8, 8), torch.rand(2, 3, 9, 9)], "sqrl", "of one size"),
    ],
)
def test_what_is_no_source_data_is_refused(loader, methods, said):
    with pytest.raises(InputError, match=said):
        tt.fit_source(tiny(), loader, methods=methods)


def test_what_is_no_method_is_refused():
    for wrong in (None, [3], 3, tt.methods(), {"mine": "tent"}):
        with pytest.raises(OptionError, match="names of methods, or recipes"):
            tt.fit_source(tiny(), batches(1), methods=wrong)


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
        assert (value - dict(model.named_parameters())[name]).abs().max() > 1e-3
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


def test_features_that_do_not_vary_at_all_have_a_factor_all_the_same():
    part = ClassAlignment(tied=True, shrinkage=0.01)
    zeros = torch.zeros(2, 2, dtype=torch.double)
    factor = part.factor({"covariance": zeros, "count": torch.ones(3)})
    torch.testing.assert_close(factor, 1e-6 * torch.eye(2, dtype=torch.double))


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


@pytest.mark.parametrize(
    ("confidence", "beta", "measure"),
    [
        ("softmax", 0.27, lambda scores: softmax(scores).max()),
        ("score", 0.5, lambda scores: scores.max()),
    ],
)
def test_adanpc(confidence, beta, measure):
    model, loader = tiny(), labelled(4)
    known = tt.fit_source(model, loader, methods="adanpc")
    other = reference.Adanpc(model, loader, 5, 0.01, beta, measure)
    adapter = tt.adapt(
        model, "adanpc", k=5, tau=0.01, beta=beta, confidence=confidence, source=known
    )
    begin = len(other.memory)
    for x in batches():
        got, expected = adapter(x), other(x)
        torch.testing.assert_close(got.exp(), expected.exp().float(), rtol=0, atol=1e-4)
        memory = adapter.snapshot().memory
        assert memory["labels"].tolist() == [c for _, c in other.memory[begin:]]
        assert adapter.events[-1].measured["remembered"] == len(other.memory) - begin
    assert 0 < len(other.memory) - begin < 160
    directions = np.stack([g for g, _ in other.memory[begin:]])
    np.testing.assert_allclose(memory["features"], directions, atol=1e-4)
    assert sum(event.used for event in adapter.events) == len(directions)


@pytest.mark.parametrize("gamma", [1, 3])
def test_adanpc_behind_a_batch_normalisation(gamma):
    model, loader = tiny(), labelled(4)
    known = tt.fit_source(model, loader, methods="adanpc")
    other = reference.AdanpcBn(model, loader, 5, 0.05, 0.5, lambda s: s.max(), gamma, lr=1e-2)
    options = {"k": 5, "tau": 0.05, "beta": 0.5, "confidence": "score", "gamma": gamma, "lr": 1e-2}
    adapter = tt.adapt(model, "adanpc", source=known, **options)
    begin = len(other.memory)
    for x in batches():
        foretold = adapter.predict(x)
        got, expected = adapter(x), other(x)
        assert torch.equal(foretold, got) == (gamma == 1)  # of the scale and shift before the step
        torch.testing.assert_close(got.exp(), expected.exp().float(), rtol=0, atol=1e-4)
        state = adapter.snapshot()
        assert state.memory["labels"].tolist() == [c for _, c in other.memory[begin:]]
        for name, now in zip(("scale", "shift"), other.norm.parameters(), strict=True):
            torch.testing.assert_close(state.beside[name].double(), now, rtol=0, atol=1e-4)
    assert 0 < len(other.memory) - begin < 160
    assert adapter.counts.forwards == adapter.counts.samples
    assert adapter.counts.backwards == 0  # of the network
    assert {event.outcome for event in adapter.events} == {Outcome.ADAPTED}


def test_a_vote_that_is_no_number_teaches_nothing():
    known = tt.fit_source(tiny(), labelled(2), methods="adanpc")
    adapter = tt.adapt(tiny(), "adanpc", source=known, gamma=2, k=5)
    x, y = batches(2)
    adapter(x)
    state = adapter.snapshot()
    huge = {**state.beside, "scale": torch.full((8,), 3e38)}
    adapter.restore(replace(state, beside=huge))
    assert adapter(100 * y).shape == (16, 5)
    assert adapter.events[-1].outcome is Outcome.NON_FINITE
    after = adapter.snapshot()
    assert torch.equal(after.beside["shift"], state.beside["shift"])
    assert torch.equal(after.memory["labels"], state.memory["labels"])


def test_adanpc_that_remembers_nothing_is_scikit_learns_classifier():
    model, loader = tiny(), labelled(4)
    known = tt.fit_source(model, loader, methods="adanpc")
    judge = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: softmax((1 - d) / 0.1, axis=1)
    ).fit(known["feature_memory"]["features"], torch.cat([y for _, y in loader]))
    adapter = tt.adapt(model, "adanpc", k=20, beta=1.1, source=known)
    for x in batches(4):
        with torch.no_grad():
            g, _ = reference.features_and_logits(model, x)
        got = adapter(x).softmax(1)
        np.testing.assert_allclose(got, judge.predict_proba(g), rtol=0, atol=1e-4)
    assert len(adapter.snapshot().memory["labels"]) == 0
    assert {event.outcome for event in adapter.events} == {Outcome.NOTHING_RELIABLE}


def test_adanpc_forgets_the_oldest_and_reset_brings_the_source_back():
    model = tiny()
    known = tt.fit_source(model, labelled(2), methods="adanpc")
    adapter, unbounded = (
        tt.adapt(model, "adanpc", beta=0.0, capacity=capacity, source=known)
        for capacity in (40, None)
    )
    first = adapter(batches(1)[0])
    unbounded(batches(1)[0])
    for x in batches(4, seed=3):
        adapter(x)
        unbounded(x)
    kept, everything = adapter.snapshot().memory, unbounded.snapshot().memory
    assert len(everything["labels"]) == 80
    assert torch.equal(kept["features"], everything["features"][-40:])
    assert kept["features"].untyped_storage().nbytes() == kept["features"].numel() * 4
    adapter.reset()
    assert adapter.snapshot().memory is None
    assert torch.equal(adapter(batches(1)[0]), first)


def test_few_memories_all_vote():
    model = tiny()
    known = tt.fit_source(model, [batches(1, 3)[0]], methods="adanpc")
    answer = tt.adapt(model, "adanpc", source=known)(batches(1)[0])
    torch.testing.assert_close(answer.exp().sum(1), torch.ones(16), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["cafa", "adanpc", "rmt"])
def test_an_adapter_reads_the_features_that_its_knowledge_is_of(method, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.BatchNorm1d(192),
        *(torch.nn.Linear(192, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)),
    ).eval()  # fmt: skip
    x, y = batches(1)[0], torch.arange(16) % 5
    tt.fit_source(model, [(x, y)], methods=method, features="2").save(tmp_path / "known")
    known = tt.SourceKnowledge.load(tmp_path / "known")
    for chosen in (None, "2"):
        adapter = tt.adapt(model, method, source=known, features=chosen)
        adapter(x)
        assert adapter.snapshot().steps == 1
    with pytest.raises(StateError, match="features of layer '2', and features='4'"):
        tt.adapt(model, method, source=known, features="4")
    other = tt.fit_source(model, [(x, y)], methods=method)
    assert other.features == "5"
    tt.adapt(model, method, source=other, features="5")
    with pytest.raises(StateError, match="features of layer '5', and features='4'"):  # as wide
        tt.adapt(model, method, source=other, features="4")
    tent = tt.fit_source(model, [x], methods="tent")
    tt.adapt(model, "tent", source=tent, features="4")


def test_knowledge_says_for_each_method_what_it_holds_and_how_large_it_is():
    known = tt.fit_source(tiny(), labelled(2), methods=["cafa", "adanpc", "tent"], gate=True)
    first, *lines = str(known).splitlines()
    total = sum(t.nbytes for own in known.entries.values() for t in own.values())
    assert first == f"of 27 source samples, {total / 1024:.1f} KB:"
    assert lines[:3] == [
        "  cafa: class_moments (count 5, mean 5 x 8, covariance 8 x 8; 872 bytes)",
        "  adanpc: feature_memory (features 27 x 8, labels 27; 1.1 KB)",
        "  tent: needs nothing",
    ]
    assert lines[3].startswith("  gate=True: signals (")
