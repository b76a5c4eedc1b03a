"""RMT against its reference, step by step over ten batches."""

import pytest
import torch
from torch import Tensor

import testtime as tt
from following import NOISE, assert_follows, close, darker, labelled
from models import batches, tiny
from reference import teachers as reference
from testtime._core.errors import InputError
from testtime.adaptation.methods.rmt import contrast, rmt


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


def test_rmt_weighs_its_terms():
    loader, x = labelled(2, seed=5), batches(1)[0]

    def loss(**options) -> float:
        recipe = rmt(augment=darker, **options)
        adapter = tt.adapt(tiny(), recipe, source=tt.fit_source(tiny(), loader, methods=[recipe]))
        adapter(x)
        return adapter.events[-1].loss

    alone = loss(contrast=0.0)
    for part in ({"contrast": 1.0}, {"contrast": 0.0, "replay": 1.0}):
        whole = loss(**part) - alone
        assert whole > 0.1
        assert loss(**{name: 0.3 * value for name, value in part.items()}) - alone == pytest.approx(
            0.3 * whole, rel=1e-4
        )


def test_rmt_contrast_is_its_definition_at_any_temperature():
    views = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    views = torch.nn.functional.normalize(views, dim=-1)
    flat, expected = views.flatten(0, 1), []
    for a in range(12):
        log_p = (flat @ flat[a] / 0.7)[[b for b in range(12) if b != a]].log_softmax(0)
        places = [b for b in range(12) if b != a]
        expected.append(-sum(log_p[places.index(b)] for b in places if b % 4 == a % 4) / 2)
    close(contrast(views, temperature=0.7), torch.stack(expected), 1e-12)
