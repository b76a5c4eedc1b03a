"""ROID, RMT, PSMT and PETAL against their references, step by step over ten batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import testtime as tt
from models import batches, tiny
from reference import teachers as reference
from reference.methods import configured
from testtime._core.errors import InputError, NeedsSource
from testtime.adaptation.methods.petal import petal
from testtime.adaptation.methods.rmt import contrast, rmt
from testtime.adaptation.methods.roid import (
    CertainAndDiverse,
    PriorCorrection,
    roid,
    soft_likelihood_ratio,
)
from testtime.adaptation.methods.vcotta import vcotta
from testtime.adaptation.parts.objective import symmetric_cross_entropy, symmetric_with_teacher
from testtime.adaptation.parts.preservation import FisherPenalty, LeastImportant, quantile
from testtime.adaptation.parts.views import cotta_view, plain, roid_view
from testtime.adaptation.ranks import Ranks
from testtime.bench.models import load_model
from testtime.measures.entropy import entropy
from testtime.streams.data import load_data, stack

Z = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
T = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]])


def close(got: Tensor, expected: Tensor | list[float], atol: float = 1e-4) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=0, atol=atol)


def darker(x: Tensor, generator: torch.Generator) -> Tensor:
    return 0.8 * x


def assert_follows(adapter, other, learnt, *, skip: tuple[str, ...] = ()) -> None:
    """Answers and adapted tensors agree over ten batches, and something has moved."""
    for x in batches():
        close(adapter(x), other(x))
    source = dict(adapter.model.named_parameters())
    moved = 0.0
    for name, value in adapter.snapshot().tensors.items():
        if name not in skip:
            close(value, dict(learnt.named_parameters())[name].detach())
        moved = max(moved, float((value - source[name].detach()).abs().max()))
    assert moved > 1e-3


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


def labelled(count: int, **more) -> list[tuple[Tensor, Tensor]]:
    xs = batches(count, **more)
    return [(x, (x.mean((1, 2, 3)) * 5).long().clamp(max=3)) for x in xs]  # none of class 4


def projector_of(adapter) -> torch.nn.Module:
    own = adapter.snapshot().beside
    net = torch.nn.Sequential(torch.nn.Linear(8, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128))
    names = ("first.weight", "first.bias", "second.weight", "second.bias")
    with torch.no_grad():
        for parameter, name in zip(net.parameters(), names, strict=True):
            assert 0 < float(own[f"projector/{name}"].abs().max()) <= parameter.shape[
                -1
            ] ** -0.5 or (name.endswith("bias"))
            parameter.copy_(own[f"projector/{name}"])
    return net


NOISE = ("conv2.bias",)  # batch normalisation removes it: its gradient is rounding noise


@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize("replay", [0.0, 1.0])
def test_rmt(kind, replay):
    model, loader = tiny(kind), labelled(2, seed=5)
    recipe = rmt(lr=1e-3, momentum=0.9, replay=replay, augment=darker)
    known = tt.fit_source(model, loader, methods=[recipe])
    mu = reference.prototypes(model, loader, 5)
    assert 2 <= len(mu) < 5
    close(known["prototypes"]["means"], mu)
    adapter = tt.adapt(model, recipe, source=known)
    draws = torch.Generator().set_state(adapter.snapshot().generator.clone())
    xs, ys = (torch.cat(parts) for parts in zip(*loader, strict=True))

    def again() -> tuple[Tensor, Tensor]:
        drawn = torch.randperm(32, generator=draws)[:16]
        return xs[drawn], ys[drawn]

    projector = projector_of(adapter)
    other = reference.Rmt(
        tiny(kind), 1e-3, 0.9, lambda x: 0.8 * x, mu, projector, again if replay else None
    )
    before = {name: tensor.clone() for name, tensor in adapter.snapshot().beside.items()}
    assert_follows(adapter, other, other.model, skip=NOISE if kind == "batch" else ())
    state = adapter.snapshot()
    for name, value in other.teacher.named_parameters():
        if name not in NOISE:
            close(state.teacher[name], value)
    for (name, value), expected in zip(state.beside.items(), projector.parameters(), strict=True):
        close(value, expected.detach())
        assert not torch.equal(value, before[name])


def test_rmt_contrast_is_least_where_views_agree():
    views = torch.nn.functional.normalize(torch.eye(4)[None].expand(3, -1, -1), dim=-1)
    aligned = contrast(views, temperature=0.1).mean()
    mixed = contrast(torch.stack([views[0], views[0].roll(1, 0), views[0]]), temperature=0.1)
    assert float(aligned) == pytest.approx(
        torch.tensor(2 + 9 * torch.e**-10).log().item(), abs=1e-4
    )
    assert float(mixed.mean()) > float(aligned) + 1


def test_rmt_finds_prototypes_by_prediction_where_there_are_no_labels():
    model, xs = tiny(), batches(2, seed=5)
    with torch.no_grad():
        loader = [(x, model(x).argmax(1)) for x in xs]
    known = tt.fit_source(model, xs, methods=["rmt"])
    close(known["prototypes"]["means"], reference.prototypes(model, loader, 5))


def test_rmt_warms_up_on_source_batches():
    model, loader = tiny("group"), labelled(3, seed=5)
    recipe = rmt(lr=1e-2, momentum=0.9, warm_up=3, augment=darker)
    known = tt.fit_source(model, loader, methods=[recipe])
    adapter = tt.adapt(model, recipe, source=known)
    other = reference.Rmt(
        tiny("group"), 1e-2, 0.9, darker, torch.zeros(1, 8), torch.nn.Linear(1, 1)
    )
    other.warm_up([x for x, _ in loader])
    mark = adapter.snapshot()
    for name, value in other.model.named_parameters():
        close(mark.tensors[name], value.detach())
    for name, value in other.teacher.named_parameters():
        close(mark.teacher[name], value)
    x = batches(1)[0]
    with torch.no_grad():
        close(adapter.predict(x), other.model(x) + other.teacher(x))
    adapter(x)
    adapter.reset()
    for name, value in adapter.snapshot().tensors.items():
        assert torch.equal(value, mark.tensors[name])
    with pytest.raises(InputError, match="warm-up takes 3 batches"):
        tt.fit_source(model, loader[:2], methods=[recipe])


def test_rmt_replays_only_labelled_samples():
    with pytest.raises(InputError, match="labels"):
        tt.fit_source(tiny(), batches(2), methods=[rmt(replay=1.0)])
    x = batches(1)[0]
    for wrong in (torch.zeros(15, dtype=torch.long), torch.zeros(16), torch.full((16,), 5)):
        with pytest.raises(InputError, match="whole number from 0 to 4"):
            tt.fit_source(tiny(), [(x, wrong)], methods=["rmt"])


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


def test_petal_refuses_a_posterior_that_diverged():
    with pytest.raises(InputError, match="source_lr"):
        tt.fit_source(tiny(), labelled(2), methods=petal(source_lr=1e30))
