"""VCoTTA: against the reference, its parts against torch, and its warm-up."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import testtime as tt
from models import batches, tiny
from reference.vcotta import Vcotta
from testtime._core.errors import InputError, NeedsSource, ScopeError
from testtime.adaptation.methods.vcotta import certainty, confident_views, vcotta
from testtime.adaptation.parts.gaussians import Gaussians, WarmUp, kl_gaussians
from testtime.adaptation.parts.objective import symmetric_cross_entropy

NOISE = "conv2.bias"  # normalisation removes it: its gradient is rounding noise


def darker(x, generator=None):
    return 0.8 * x


def labelled(count=4):
    random = torch.Generator().manual_seed(5)
    return [(x, torch.randint(0, 5, (16,), generator=random)) for x in batches(count)]


# the margin and the temperature are such that copies are kept, and neither prior is left out
@pytest.mark.parametrize(
    ("margin", "temperature", "weight"), [(0.01, 0.02, 1e-3), (0.3, 8e-4, 2e-6), (0.0, 1.0, 1.0)]
)
def test_vcotta(margin, temperature, weight):
    adapter = tt.adapt(
        tiny(), vcotta(lr=1e-2, momentum=0.9, views=2, margin=margin, temperature=temperature,
                       weight=weight, augment=darker),
    )  # fmt: skip
    generator = torch.Generator()
    generator.set_state(adapter.snapshot().generator)
    other = Vcotta(
        tiny(), lr=1e-2, m=0.9, view=darker, n=2, margin=margin, t=temperature, beta=weight,
        generator=generator,
    )  # fmt: skip
    for x in batches(10):
        torch.testing.assert_close(adapter(x), other(x).detach(), rtol=0, atol=1e-4)
        assert float(adapter.events[-1].measured["trust"]) == pytest.approx(
            other.trust[-1], abs=1e-4
        )
    state = adapter.snapshot()
    assert set(state.memory["rhos"]) == {k[:-4] for k in other.student if k.endswith("rho")}
    for held, theirs in (
        (state.memory["rhos"], other.student),
        (state.memory["teacher"], other.teacher),
    ):
        for name, rho in held.items():
            if name != NOISE:
                torch.testing.assert_close(rho, theirs[f"{name} rho"].detach(), rtol=0, atol=1e-4)
    for held, theirs in ((state.tensors, other.student), (state.teacher, other.teacher)):
        for name, mean in held.items():
            if name != NOISE:
                torch.testing.assert_close(mean, theirs[name].detach(), rtol=0, atol=1e-4)
    if temperature == 1.0:
        assert all(0.4 < trust < 0.6 for trust in other.trust)


def test_kl_is_that_of_torch_and_zero_for_the_same():
    random = torch.Generator().manual_seed(0)
    q, p = (
        Gaussians(*({"w": 2 * torch.randn(7, 3, generator=random)} for _ in range(2)))
        for _ in range(2)
    )
    assert float(kl_gaussians(q, q)) == 0
    theirs = kl_divergence(
        Normal(q.means["w"], F.softplus(q.rhos["w"])), Normal(p.means["w"], F.softplus(p.rhos["w"]))
    )
    torch.testing.assert_close(kl_gaussians(q, p), theirs.sum())


def test_the_symmetric_cross_entropy_of_the_fixture():
    z = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
    t = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]])
    assert float(symmetric_cross_entropy(z, t).mean()) == pytest.approx(0.977513, abs=1e-6)


def test_only_copies_that_are_surer_count_and_the_surer_model_is_trusted():
    plain, sure, unsure = [0.0, 1.0], [9.0, 0.0], [0.0, 0.0]
    views = torch.tensor([[plain, plain], [sure, unsure], [unsure, unsure]])
    torch.testing.assert_close(confident_views(views, 0.2), torch.tensor([[4.5, 0.5], [0.0, 1.0]]))
    assert certainty(torch.tensor([[sure]])) > certainty(torch.tensor([[plain]]))
    broken = views.clone()
    broken[1, 1] = torch.nan  # a copy without an answer is not sure
    torch.testing.assert_close(confident_views(broken, 0.2), confident_views(views, 0.2))
    assert certainty(broken).isfinite().all()


def test_the_divergence_holds_the_student_at_its_priors():
    def drift(weight):
        adapter = tt.adapt(
            tiny(), vcotta(lr=1e-2, momentum=0.9, views=1, weight=weight, augment=darker)
        )
        for x in batches(10):
            adapter(x)
        state, source = adapter.snapshot(), dict(tiny().named_parameters())
        own = Gaussians(state.tensors, state.memory["rhos"])
        rhos = {name: torch.full_like(rho, -4.0) for name, rho in own.rhos.items()}
        return float(kl_gaussians(own, Gaussians(source, rhos)).detach())

    assert drift(1e-2) < 0.7 * drift(0.0)


def test_the_warm_up_trains_the_gaussians_that_a_stream_begins_at(tmp_path):
    recipe = vcotta(warm_up=3, views=1, augment=darker)
    with pytest.raises(NeedsSource):
        tt.adapt(tiny(), recipe)
    loader = labelled()
    source = tt.fit_source(tiny(), loader, methods=recipe)
    again = tt.fit_source(tiny(), loader, methods=recipe)
    known = source["posterior"]
    assert all(torch.equal(value, again["posterior"][name]) for name, value in known.items())
    names = [name for name, _ in tiny().named_parameters()]
    assert set(known) == {f"mean/{n}" for n in names} | {
        f"rho/{n}" for n in names if not n.startswith("norm")
    }
    moved = {n: known[f"mean/{n}"] - p for n, p in tiny().named_parameters()}
    assert all(0 < d.abs().max() < 12 * 2e-3 for d in moved.values())  # twelve steps of Adam
    assert (known["rho/head.weight"] != -4).float().mean() > 0.9
    adapter = tt.adapt(tiny(), recipe, source=source)
    x = batches(1)[0]
    told = adapter.predict(x)
    assert not torch.equal(told, tt.adapt(tiny(), vcotta(views=1, augment=darker)).predict(x))
    source.save(tmp_path / "source")
    loaded = tt.adapt(tiny(), recipe, source=tt.SourceKnowledge.load(tmp_path / "source"))
    for x in batches(3):  # a file gives names in another order
        assert torch.equal(adapter(x), loaded(x))
    assert adapter.counts.updates == 3
    with pytest.raises(InputError, match="labels"):
        tt.fit_source(tiny(), batches(2), methods=recipe)


def test_the_warm_up_lowers_the_loss_on_source_data():
    model, loader = tiny(), labelled(6)

    def loss(means):
        model.load_state_dict({**model.state_dict(), **means})
        for norm in (model.norm1, model.norm2):
            norm.train()
        return sum(float(F.cross_entropy(model(x), y)) for x, y in loader)

    source = tt.fit_source(tiny(), loader, methods=vcotta(warm_up=20))
    known = source["posterior"]
    means = {n.partition("/")[2]: v for n, v in known.items() if n.startswith("mean/")}
    with torch.no_grad():
        assert loss(means) < loss(dict(tiny().named_parameters())) - 1


def test_the_warm_up_is_drawn_to_its_prior():
    recipe = vcotta(warm_up=1)
    near = WarmUp(passes=150, lr=0.05, weight=1e3)
    recipe = replace(recipe, procedure=replace(recipe.procedure, warm_up=near))
    known = tt.fit_source(tiny(), labelled(1), methods=recipe)["posterior"]
    for name, value in known.items():
        if name.startswith("rho/"):
            torch.testing.assert_close(value, torch.full_like(value, 0.1), rtol=0, atol=0.1)
            mean = known[f"mean/{name[4:]}"]
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=0.1)


def test_a_model_without_gaussians_is_refused():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.AvgPool2d(8), torch.nn.Flatten())
    with pytest.raises(ScopeError, match="Gaussians"):
        tt.adapt(model.eval(), "vcotta")(batches(1)[0])
