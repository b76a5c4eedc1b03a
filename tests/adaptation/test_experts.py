"""SADE: weights of experts, learnt without labels."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import nn

import testtime as tt
from models import Experts, batches, tiny
from reference import experts as reference
from testtime._core.errors import ScopeError
from testtime._core.outcomes import Outcome
from testtime.adaptation.methods.sade import aggregate, agreement, read_experts, sade
from testtime.adaptation.parts.optimizer import SGD, Adam
from testtime.adaptation.parts.views import moco_view


def noisy(x, generator):
    return x + 0.5 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


class Table(nn.Module):
    """Three linear experts."""

    def __init__(self, kind="tuple"):
        super().__init__()
        self.kind = kind
        chance = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(3, 6, 4, generator=chance, dtype=torch.float64))

    def forward(self, x):
        experts = torch.einsum("bd,edc->bec", x, self.weight)
        return {"tensor": experts, "tuple": experts.unbind(1), "list": list(experts.unbind(1))}[
            self.kind
        ]


def stream(count, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(count, 20, 6, generator=chance, dtype=torch.float64)


@pytest.mark.parametrize("floor", [0.0, 0.31])
def test_weights_and_answers_follow_the_reference(floor):
    model, pairs = Table(), []

    def recorded(x, generator):
        pairs.append(noisy(x, generator))
        return pairs[-1]

    adapter = tt.adapt(model, sade(lr=0.5, floor=floor, augment=recorded))
    answers = [adapter(x) for x in stream(8)]
    with torch.no_grad():
        seen = [torch.stack(model(x), 1).numpy() for x in pairs]
        plain = [torch.stack(model(x), 1).numpy() for x in stream(8)]
    path = reference.sade(
        list(zip(seen[::2], seen[1::2], strict=True)) + [(None, None)] * (8 - len(seen) // 2),
        experts=3, lr=0.5, momentum=0.9, decay=5e-4, floor=floor,
    )  # fmt: skip
    before = [np.full(3, 1 / 3), *path]
    for step, (one, two) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        expected = -reference.agreement(one, two, before[step])
        assert adapter.events[step].loss == pytest.approx(expected, abs=1e-7)
    for answer, experts, w in zip(answers, plain, path, strict=True):
        expected = np.tensordot(experts, softmax(w), (1, 0))
        np.testing.assert_allclose(answer.numpy(), expected, atol=1e-7)
    if floor:
        assert len(pairs) < 16  # it has stopped
        assert adapter.events[-1].outcome is Outcome.ANSWERED
        assert adapter.counts.updates == len(pairs) // 2
    else:
        assert len(pairs) == 16
        told = [adapter.events[-1].measured[f"expert {e}"] for e in (1, 2, 3)]
        assert sum(told) == pytest.approx(1)
        assert np.ptp(told) > 0.01


@pytest.mark.parametrize("kind", ["tuple", "list", "tensor"])
def test_every_way_to_return_experts_gives_the_same(kind):
    expected = tt.adapt(Table(), "sade", augment=noisy)
    adapter = tt.adapt(Table(kind), "sade", augment=noisy)
    for x in stream(3):
        answer = adapter(x)
        assert answer.shape == (20, 4)
        assert torch.equal(answer, expected(x))


def test_predict_is_the_answer_with_the_weights_so_far():
    adapter, (x, y) = tt.adapt(Table(), "sade", augment=noisy), stream(2)
    experts = read_experts(Table()(x))
    torch.testing.assert_close(adapter.predict(x), experts.mean(1))
    adapter(x)
    w = adapter.snapshot().memory["weights"]
    torch.testing.assert_close(adapter.predict(y), aggregate(read_experts(Table()(y)), w))


def test_experts_whose_answers_stay_the_same_gain_weight():
    class Shaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([8.0, 1.0]))

        def forward(self, x):
            steady = self.scale[0] * torch.stack([x.sum(1), -x.sum(1)], 1)
            shaky = self.scale[1] * torch.stack([(40 * x[:, 0]).sin(), (40 * x[:, 1]).cos()], 1)
            return steady, 4 * shaky

    adapter = tt.adapt(Shaky(), "sade", augment=lambda x, g: x + 0.05 * noisy(0 * x, g))
    for x in stream(30):
        adapter(x.float())
    assert adapter.events[-1].measured["expert 1"] > 0.6


def test_models_without_experts_are_refused_with_the_way_out():
    x = batches(1)[0]
    for spoil, says in (
        (lambda z: z, r"a tensor \(2, 5\)"),
        (lambda z: (z, z[:, :2]), "a tuple of a tensor"),
        (lambda z: z[:, None], r"\(2, 1, 5\)"),
        (lambda z: (z,), "a tuple of"),
        (lambda z: {"logits": z}, "a dictionary of logits"),
    ):
        body = tiny()
        body.head.register_forward_hook(lambda *args, spoil=spoil: spoil(args[2]))
        adapter = tt.adapt(body, "sade")
        with pytest.raises(ScopeError, match=f"(?s){says}.*two or more experts"):
            adapter(x)
        assert adapter.counts.steps == 0


def test_a_copy_that_is_no_number_changes_nothing():
    adapter = tt.adapt(Table(), "sade", augment=lambda x, g: x * torch.inf)
    adapter(stream(1)[0])
    assert adapter.events[-1].outcome is Outcome.NON_FINITE
    assert torch.equal(
        adapter.snapshot().memory["weights"], torch.full((3,), 1 / 3, dtype=torch.float64)
    )


def test_export_keeps_the_experts():
    adapter = tt.adapt(Experts(tiny()).eval(), "sade")
    x = batches(1)[0]
    adapter(x)
    assert all(map(torch.equal, adapter.export()(x), adapter.model(x)))


def test_agreement_of_equal_copies_is_one():
    experts = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(agreement(experts, experts, torch.zeros(3)), torch.ones(5))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (SGD, torch.optim.SGD, {"weight_decay": 0.1}),
        (SGD, torch.optim.SGD, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.3}),
        (Adam, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.0}),
        (Adam, torch.optim.AdamW, {"weight_decay": 0.3}),
    ],
)
def test_steps_reproduce_torch(ours, theirs, options):
    chance = torch.Generator().manual_seed(0)
    tensor = torch.randn(4, generator=chance, dtype=torch.float64)
    leaf = nn.Parameter(tensor.clone())
    theirs, ours = theirs([leaf], lr=0.1, **options), ours(lr=0.1, **options)
    state = ours.init([tensor])
    for _ in range(5):
        leaf.grad = torch.randn(4, generator=chance, dtype=torch.float64)
        before = tensor.clone()
        (moved,), state = ours.step(state, [tensor], [leaf.grad])
        assert torch.equal(tensor, before)
        theirs.step()
        tensor = moved
        torch.testing.assert_close(tensor, leaf.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_moco_views_differ_by_image_and_repeat(channels):
    x = torch.rand(1, channels, 16, 20, generator=torch.Generator().manual_seed(1))
    x = x.expand(64, -1, -1, -1)
    views = moco_view(x, torch.Generator().manual_seed(0))
    assert views.shape == x.shape
    assert 0 <= float(views.min()) <= float(views.max()) <= 1
    assert len(views.flatten(1).unique(dim=0)) > 55  # some are only moved
    assert torch.equal(views, moco_view(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(views, moco_view(x, torch.Generator().manual_seed(1)))
    assert moco_view(x.half(), torch.Generator()).dtype == torch.half
    if channels == 3:
        grey = (views - views.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6
        assert 3 <= int(grey.sum()) <= 25  # a fifth of 64


def test_a_turned_hue_is_that_of_torchvision():
    from torchvision.transforms.v2 import functional as T

    from testtime.adaptation.parts.pixels import turn_hue
    from testtime.adaptation.parts.views import _blur

    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for turn in (-0.1, 0.03, 1 / 6):
        own = turn_hue(x, torch.full((4, 1, 1, 1), turn))
        torch.testing.assert_close(own, T.adjust_hue(x, turn), atol=1e-6, rtol=0)
    own = _blur(x, torch.tensor([[0.5], [1.0], [1.5], [2.0]], dtype=x.dtype))
    for image, blurred, sigma in zip(x, own, (0.5, 1.0, 1.5, 2.0), strict=True):
        inner = T.gaussian_blur(image, [13, 13], [sigma, sigma])[:, 6:-6, 6:-6]
        torch.testing.assert_close(blurred[:, 6:-6, 6:-6], inner, atol=1e-6, rtol=0)
