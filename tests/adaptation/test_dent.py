"""DENT against its reference; what its samples share; attacks on it; AdaMod alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from models import batches, tiny
from reference import dent as reference
from testtime._core.errors import ScopeError
from testtime.adaptation.methods.dent import dent
from testtime.adaptation.parts.objective import Diversity, entropy
from testtime.adaptation.parts.optimizer import AdaMod
from testtime.adaptation.ranks import Ranks
from testtime.measures.entropy import entropy as measured
from testtime.papers.attack import projected_gradient
from testtime.papers.checks.dent import through

LOGITS = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])


def test_dent_batch_by_batch():
    model = tiny()
    adapter = tt.adapt(model, "dent", lr=2e-2)
    for x in batches():
        expected, network = reference.dent(model, x, 2e-2, 6)
        torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(adapter.predict(x), expected, rtol=0, atol=1e-4)
        with torch.no_grad():
            assert (expected - model(x)).abs().max() > 1e-2
        assert (network.norm2.weight - model.norm2.weight).abs().max() > 1e-3
    assert adapter.counts.forwards == 7 * 160
    assert adapter.counts.backwards == 6 * 160


def test_the_loss_is_the_recorded_one():
    loss = entropy(measured(LOGITS)).mean() + Diversity(weight=1.0)(LOGITS, Ranks())
    assert float(loss) == pytest.approx(-0.234598, abs=1e-4)


@pytest.mark.parametrize("kind", ["batch", "group", "layer", "rms", "frozen", "instance"])
def test_samples_share_nothing_but_the_diversity(kind):
    x = batches(1, 8)[0]
    plain = replace(dent(lr=2e-2), batch_objective=None)
    together = tt.adapt(tiny(kind), plain)(x)
    alone = torch.cat([tt.adapt(tiny(kind), plain)(image) for image in x.split(1)])
    # gradients differ by the factor 1 / B, which AdaMod divides out but for its eps
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)
    assert not torch.allclose(tt.adapt(tiny(kind), dent(lr=2e-2))(x), together, atol=1e-2)


def test_calls_are_stateless_and_make_the_loss_smaller():
    x, other = batches(2)
    adapter = tt.adapt(tiny(), "dent", lr=2e-2)
    first = adapter(x)
    adapter(other)
    assert torch.equal(adapter(x), first)

    def loss(z):
        return float(measured(z).mean() + Diversity(weight=1.0)(z, Ranks()))

    with torch.no_grad():
        assert loss(first) < loss(tiny()(x)) - 0.05


@pytest.mark.parametrize("unroll", [False, True])
def test_gradients_reach_the_input(unroll):
    x = batches(1)[0].requires_grad_()
    z = through(tiny(), unroll=unroll)(x)
    (grad,) = torch.autograd.grad(z[:, 0].sum(), x)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0
    torch.testing.assert_close(z.detach(), tt.adapt(tiny(), "dent")(x.detach()))


def test_the_unrolled_gradient_is_that_of_the_whole_defence():
    model, x = tiny().double(), batches(1, 4)[0].double()
    answer = through(model, unroll=True)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(answer(leaf)[:, 0].sum(), leaf)
    step = 1e-6 * direction
    slope = (answer(x + step)[:, 0].sum() - answer(x - step)[:, 0].sum()) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), slope.detach(), rtol=1e-3, atol=1e-4)


def test_rows_that_are_no_samples_are_refused():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 5)

        def forward(self, x):
            halves = self.norm(torch.cat(x.chunk(2, 2)))
            return self.head(halves.mean((2, 3)).unflatten(0, (2, -1)).mean(0))

    with pytest.raises(ScopeError, match="32 rows for 16 samples"):
        tt.adapt(Windows().eval(), "dent")(batches(1)[0])


def test_a_loss_that_is_not_finite_is_answered():
    model = tiny()
    adapter = tt.adapt(model, "dent")
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    assert adapter(batches(1)[0]).shape == (16, 5)
    assert adapter.counts.skipped == 1


def test_adamod_entry_by_entry():
    tensors = [torch.ones(3), torch.ones(2, 2)]
    own = [t.clone() for t in tensors]
    other = reference.AdaMod(own, 0.1, (0.9, 0.99, 0.6))
    part = AdaMod(lr=0.1, betas=(0.9, 0.99), beta3=0.6)
    state = part.init(tensors)
    for step in range(10):
        grads = [
            10**-step * torch.sin(step + torch.arange(float(t.numel()))).view_as(t) for t in own
        ]
        for t, g in zip(own, grads, strict=True):
            t.grad = g
        other.step()
        tensors, state = part.step(state, tensors, grads)
        torch.testing.assert_close(tensors, own)


def test_the_attack_stays_in_its_box_and_leads_astray():
    model = tiny()
    x = torch.cat(batches(4))
    with torch.no_grad():
        labels = model(x).argmax(1)
    changed = projected_gradient(
        model, x, labels, radius=0.1, rate=0.02, steps=10, random=torch.Generator().manual_seed(0)
    )
    assert (changed - x).abs().max() <= 0.1 + 1e-6
    assert 0 <= changed.min() <= changed.max() <= 1
    with torch.no_grad():
        assert (model(changed).argmax(1) != labels).float().mean() > 0.5


class Rectified(nn.BatchNorm2d):
    """Batch normalisation and activation in one layer, as timm has them."""

    def forward(self, x):
        return super().forward(x).relu()


class OnePlus(nn.Module):
    """RMS normalisation whose scale is one more than what it stores, as Gemma has it."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(-0.3, 0.3, channels)), 1e-6

    def forward(self, x):
        x = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt()
        return x * (1 + self.weight.view(1, -1, 1, 1))


class Greek(nn.Module):
    """Group normalisation of one group with other names."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.beta, self.eps = nn.Parameter(torch.linspace(-1, 1, channels)), 1e-5

    def forward(self, hidden):
        return nn.functional.group_norm(hidden, 1, self.gamma, self.beta, self.eps)


def with_layers(kind):
    model = tiny()
    model.norm1, model.norm2 = kind(6), kind(8)
    with torch.no_grad():
        for parameter in (*model.norm1.parameters(), *model.norm2.parameters()):
            parameter.add_(torch.linspace(-0.5, 0.5, len(parameter)))
    return model.eval()


def test_an_activation_in_the_layer_comes_after_scale_and_shift():
    model, fused = tiny(), with_layers(Rectified)
    fused.load_state_dict(model.state_dict())
    adapter = tt.adapt(fused, "dent", lr=2e-2)
    for x in batches(2):
        expected, _ = reference.dent(model, x, 2e-2, 6)
        torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-4)
    assert isinstance(fused.norm1.weight, nn.Parameter)


@pytest.mark.parametrize("kind", [Rectified, OnePlus, Greek])
def test_without_a_step_it_is_the_model(kind):
    model, x = with_layers(kind), batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(tt.adapt(model, "dent", lr=0.0)(x), model(x))
    plain = replace(dent(lr=2e-2), batch_objective=None)
    together = tt.adapt(model, plain)(x)
    alone = torch.cat([tt.adapt(model, plain)(image) for image in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)
    assert not torch.allclose(together, model(x), atol=1e-3)


class Interrupted(nn.BatchNorm2d):
    """A layer whose copying somebody interrupts."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
        raise KeyboardInterrupt


def test_an_interrupt_while_a_layer_is_tried_leaves_no_hook():
    model = tiny()
    model.norm2 = Interrupted(8).eval()
    adapter = tt.adapt(model, "dent")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            adapter(batches(1)[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
