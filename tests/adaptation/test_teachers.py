"""PSMT and PETAL against their references, step by step over ten batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import testtime as tt
from following import NOISE, T, Z, assert_follows, close, darker, labelled
from models import batches, tiny
from reference import teachers as reference
from reference.methods import configured
from testtime._core.errors import InputError, NeedsSource
from testtime.adaptation.methods.petal import petal
from testtime.adaptation.methods.vcotta import vcotta
from testtime.adaptation.parts.objective import symmetric_cross_entropy, symmetric_with_teacher
from testtime.adaptation.parts.preservation import FisherPenalty, LeastImportant, quantile
from testtime.bench.models import load_model
from testtime.streams.data import load_data, stack


def fisher_of_all(model, xs) -> dict[str, Tensor]:
    own, _ = configured(model)
    own.requires_grad_(True)
    total = {name: torch.zeros_like(p) for name, p in own.named_parameters()}
    for x in xs:
        own.zero_grad()
        z = own(x)
        torch.nn.functional.cross_entropy(z, z.argmax(1)).backward()
        for name, p in own.named_parameters():
            total[name] += p.grad**2 / len(xs)
    return total


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-5, 5, width=32) | st.just(0.0), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_quantile_is_that_of_the_sorted_entries(values, share):
    x = torch.tensor(values)
    place = share * (len(x) - 1)
    ordered = x.sort().values
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(x) - 1)]
    close(quantile([x[:3], x[3:, None]], share), low + (high - low) * (place - int(place)), 1e-6)


@pytest.mark.parametrize("kind", ["drawn", "few values", "periodic", "rising"])
def test_quantile_of_many_entries_is_exact_also_where_a_sample_misleads(kind):
    count = 50_000
    x = {
        "drawn": torch.randn(count, generator=torch.Generator().manual_seed(0)) ** 6,
        "few values": (torch.arange(count) % 3).float(),
        "periodic": torch.where(torch.arange(count) % 37 == 0, 1.0, torch.linspace(2, 3, count)),
        "rising": torch.linspace(0, 1, count),
    }[kind]
    x = x.double()
    for share in (0.0, 1e-5, 0.003, 0.03, 0.5, 0.99999, 1.0):
        found = quantile([x[:7], x[7:]], share)
        torch.testing.assert_close(found, torch.quantile(x, share), rtol=1e-12, atol=0)


def test_the_least_important_are_the_share_that_was_asked_for():
    draws = torch.Generator().manual_seed(0)
    grads = [torch.randn(40, 25, generator=draws), torch.randn(1000, generator=draws)]
    for share in (0.0, 0.003, 0.03, 0.5):
        masks = LeastImportant(share=share).masks(grads)
        assert abs(sum(int(mask.sum()) for mask in masks) - share * 2000) <= 1
    kept = torch.cat([g[~m].abs() for g, m in zip(grads, masks, strict=True)])
    gone = torch.cat([g[m].abs() for g, m in zip(grads, masks, strict=True)])
    assert float(gone.max()) < float(kept.min())


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_psmt(kind):
    model, xs = tiny(kind), batches(3, seed=5)
    known = tt.fit_source(model, xs, methods=["psmt"])
    expected = fisher_of_all(model, xs)
    for name, value in expected.items():
        close(known["fisher"][name], value)
    options = {"momentum": 0.9, "share": 0.2}
    adapter = tt.adapt(
        model, "psmt", source=known, threshold=1.0, views=2, augment=darker, beta=5.0, **options
    )
    other = reference.Psmt(
        tiny(kind), beta=5.0, fisher=expected, lr=1e-3, m=0.9, view=lambda x: 0.8 * x, share=0.2
    )
    assert_follows(adapter, other, other.model, skip=NOISE if kind == "batch" else ())
    for name, value in other.teacher.named_parameters():
        if name not in NOISE or kind == "group":
            close(adapter.snapshot().teacher[name], value)


def same_as_source(adapter) -> float:
    source = dict(adapter.model.named_parameters())
    same = [value == source[name] for name, value in adapter.snapshot().tensors.items()]
    return float(torch.cat([s.flatten() for s in same]).float().mean())


@pytest.mark.parametrize("name", ["psmt", "petal"])
def test_a_share_of_the_weights_returns_to_the_source_bit_for_bit(name):
    model = tiny("group")
    known = tt.fit_source(model, labelled(3, seed=5), methods=[name])
    for share in (0.0, 0.1, 0.5):
        adapter = tt.adapt(model, name, source=known, share=share, augment=darker, views=1)
        for x in batches(2):
            adapter(x)
        assert same_as_source(adapter) == pytest.approx(share, abs=0.02)


def test_psmt_penalty_keeps_what_mattered():
    penalty = FisherPenalty(weight=500.0)
    theta = {"a": torch.tensor([1.0, 1.0], requires_grad=True)}
    value = penalty(theta, {"a": torch.zeros(2)}, {"fisher": {"a": torch.tensor([1.0, 0.01])}})
    assert float(value.detach()) == pytest.approx(505.0)
    close(torch.autograd.grad(value, theta["a"])[0], [1000.0, 10.0])


def test_psmt_asks_for_information_of_all_weights():
    model = tiny()
    known = tt.fit_source(model, batches(2), methods=["eata"])
    with pytest.raises(NeedsSource, match="no fisher of conv"):
        tt.adapt(model, "psmt", source=known)


def test_petal_posterior():
    model, loader = tiny(), labelled(3, seed=5)
    known = tt.fit_source(model, loader, methods=[petal(passes=4, source_lr=1e-2)])
    mean, var = reference.posterior(model, loader, 4, 1e-2)
    assert set(known["weight-posterior"]) == {f"{k} {n}" for k in ("mean", "var") for n in mean}
    for name in mean:
        close(known["weight-posterior"][f"mean {name}"], mean[name], 1e-5)
        torch.testing.assert_close(
            known["weight-posterior"][f"var {name}"], var[name], rtol=1e-2, atol=1e-9
        )
    with pytest.raises(InputError, match="as often as it is read"):
        tt.fit_source(model, iter(loader), methods=["petal"])


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_petal(kind):
    model, loader = tiny(kind), labelled(3, seed=5)
    known = tt.fit_source(model, loader, methods=["petal"])
    found = known["weight-posterior"]
    mean, var = (
        {n: found[f"{k} {n}"] for n in dict(model.named_parameters())} for k in ("mean", "var")
    )
    adapter = tt.adapt(
        model, "petal", source=known, rho=1e-6, momentum=0.9, share=0.2, threshold=1.0, views=2,
        augment=darker,
    )  # fmt: skip
    other = reference.Petal(
        tiny(kind), rho=1e-6, mean=mean, var=var, lr=1e-3, m=0.9, view=lambda x: 0.8 * x, share=0.2
    )
    assert_follows(adapter, other, other.model)
    for name, value in other.teacher.named_parameters():
        close(adapter.snapshot().teacher[name], value)


def test_petal_without_posterior_and_restoration_is_cotta():
    model = tiny()
    known = tt.fit_source(model, labelled(2), methods=["petal"])
    one = tt.adapt(model, "petal", source=known, rho=0.0, share=0.0, views=2)
    other = tt.adapt(model, "cotta", restore=0.0, views=2)
    for x in batches():
        close(one(x), other(x), 1e-6)


def test_petal_symmetric_loss():
    close(symmetric_with_teacher(Z, T), symmetric_cross_entropy(Z, T))
    assert petal(symmetric=True).objective is symmetric_with_teacher


def test_the_weight_posterior_of_a_trained_model_stays_near_it():
    """At the default rate: with stored statistics the same training diverges."""
    model = load_model("embedded:batch")
    images, labels = stack(load_data("fashion-mnist:sample", split="train"), range(320))
    loader = list(zip(images.split(16), labels.split(16), strict=True))
    known = tt.fit_source(model, loader, methods=["petal"])["weight-posterior"]
    for name, weight in model.named_parameters():
        moved = (known[f"mean {name}"] - weight).norm() / weight.norm()
        assert float(moved.detach()) < 0.5, name


def test_petal_and_vcotta_can_be_fitted_at_once():
    recipes = {"petal": petal(), "vcotta": vcotta(warm_up=1)}
    known = tt.fit_source(tiny(), labelled(2), methods=recipes)
    assert set(known.entries) == {"weight-posterior", "posterior"}


def test_what_needs_one_pass_is_the_same_beside_what_needs_several():
    alone = tt.fit_source(tiny(), labelled(2), methods=["psmt"])
    known = tt.fit_source(tiny(), labelled(2), methods=["petal", "psmt"])
    assert known.samples == alone.samples == 32
    for name, value in alone["fisher"].items():
        assert torch.equal(known["fisher"][name], value)


def test_petal_refuses_a_posterior_that_diverged():
    with pytest.raises(InputError, match="source_lr"):
        tt.fit_source(tiny(), labelled(2), methods=petal(source_lr=1e30))
