"""Moments and normalisation with given moments, against the formulas and their gradients."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import batches, tiny
from testtime.adaptation.kernels.moments import moments, normalise, normalise_blended
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import Loan
from testtime.adaptation.parts.statistics import Moments, RunningStatistics
from testtime.adaptation.ranks import Ranks

SHAPES = [(6, 3), (5, 3, 7), (4, 3, 5, 2), (2, 3, 2, 3, 2)]


def draw(*shape: int, **options) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_mean_and_biased_variance_of_each_channel(shape):
    x = 3 + 2 * draw(*shape, dtype=torch.float64)
    (mean, var), values = moments(x, Ranks())
    channels = x.movedim(1, 0).flatten(1)
    assert values == channels.shape[1]
    torch.testing.assert_close(mean, channels.mean(1))
    torch.testing.assert_close(var, channels.var(1, correction=0))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_right(shape):
    x = draw(*shape, dtype=torch.float64).requires_grad_()
    other = (1 + draw(3, dtype=torch.float64).square()).requires_grad_()

    def mixed(x, other):
        batch, _ = moments(x, Ranks())
        used = Moments(0.7 * other + 0.3 * batch.mean, 0.7 * other.square() + 0.3 * batch.var)
        return normalise(x, used, 1e-3)

    torch.autograd.gradcheck(mixed, (x, other))


@pytest.mark.parametrize("shape", SHAPES)
def test_blended_moments_scale_and_shift_in_one(shape):
    x = draw(*shape, dtype=torch.float64).requires_grad_()
    other = 1 + draw(3, dtype=torch.float64).square()
    weight, bias = (value.requires_grad_() for value in draw(2, 3, dtype=torch.float64).unbind())

    def blend(batch):
        return Moments(0.7 * other + 0.3 * batch.mean, 0.7 * other + 0.3 * batch.var)

    def whole(x, weight, bias):
        return normalise_blended(x, weight, bias, blend, 1e-3)

    def parts(x, weight, bias):
        wide = (1, -1, *[1] * (x.dim() - 2))
        used = blend(moments(x, Ranks())[0])
        return normalise(x, used, 1e-3) * weight.view(wide) + bias.view(wide)

    assert torch.autograd.gradcheck(whole, (x, weight, bias))
    seen = [(made, *torch.autograd.grad(made.cos().sum(), (x, weight, bias)))
            for made in (whole(x, weight, bias), parts(x, weight, bias))]  # fmt: skip
    torch.testing.assert_close(*seen)


def test_a_single_value_has_no_variance():
    (mean, var), values = moments(torch.tensor([[2.0, -1.0]]), Ranks())
    assert values == 1
    assert mean.tolist() == [2.0, -1.0]
    assert var.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype):
    x = (100 + draw(64, 3, 4, 4)).to(dtype)
    used, _ = moments(x, Ranks())
    assert used.var.dtype == torch.float32
    torch.testing.assert_close(used.mean, x.float().mean((0, 2, 3)))
    assert normalise(x, used, 1e-5).dtype == dtype


def test_memory_format_makes_no_difference():
    x = draw(4, 3, 5, 6)
    turned = x.to(memory_format=torch.channels_last)
    used, _ = moments(x, Ranks())
    torch.testing.assert_close(moments(turned, Ranks())[0], used)
    out = normalise(turned, used, 1e-5)
    torch.testing.assert_close(out, normalise(x, used, 1e-5))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_gradients_that_are_not_contiguous():
    x = draw(4, 3, 5, 5, dtype=torch.float64).requires_grad_()
    used = Moments(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    (grad,) = torch.autograd.grad(normalise(x, used, 0.0).mT.sum(), x)
    torch.testing.assert_close(grad, torch.ones_like(x))


class Layouts(TorchDispatchMode):
    """Strides of what torch's backward of batch normalisation is given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket == torch.ops.aten.native_batch_norm_backward:
            self.found.append((args[0].stride(), args[1].stride()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_gradient_goes_back_in_the_layout_of_its_input(layout, given):
    """Of two layouts torch's kernel steps from value to value, seven to twelve times as long."""
    x = draw(4, 3, 5, 6).to(memory_format=layout).requires_grad_()
    weight, bias = (draw(3).requires_grad_() for _ in range(2))
    used, grad = Moments(torch.zeros(3), torch.ones(3)), draw(4, 3, 5, 6)
    for made in (normalise(x, used, 0.1), normalise_blended(x, weight, bias, lambda own: own, 0.1)):
        with Layouts() as seen:
            torch.autograd.grad(made, x, grad.to(memory_format=given))
        assert seen.found == [(x.stride(), x.stride())]


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None, "own"])
@pytest.mark.parametrize("seen", [0, 1, 9])
def test_averages_move_again_by_a_batch_that_is_not_seen_again(momentum, seen):
    statistics, values = RunningStatistics(momentum=momentum), 64.0
    layer = nn.BatchNorm1d(1000, momentum=None)
    layer.num_batches_tracked += 4
    start, shown, other = (Moments(*pair) for pair in 5 * draw(3, 2, 1000).abs())

    def moved(averages: dict, by: Moments) -> dict:
        old = Moments(averages["norm.mean"], averages["norm.var"])
        new = statistics.update(old, by, layer=layer, seen=int(averages["seen"]), values=values)
        return {"seen": averages["seen"] + 1, "norm.mean": new.mean, "norm.var": new.var}

    before = {"seen": torch.tensor(seen), "norm.mean": start.mean, "norm.var": start.var}
    after = moved(before, shown)
    between = moved(after, other)
    again = statistics.repeat(between, before, after, layers={"norm": layer})
    expected = moved(between, shown)
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-6)


class Calls(TorchDispatchMode):
    """Names of the functions of torch that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("learns", [True, False])
def test_moving_averages_as_in_training_take_torchs_own_kernel(momentum, learns):
    ours, other = tiny(), tiny().train()
    other.drop.eval()
    for layer in (other.norm1, other.norm2):
        layer.momentum, layer.num_batches_tracked = momentum, torch.tensor(1)
    loan, statistics = Loan(ours, norm_layers(ours)), RunningStatistics(momentum=momentum)
    averages = {"seen": torch.tensor(1)}
    for name in ("norm1", "norm2"):
        layer = getattr(ours, name)
        averages |= {f"{name}.mean": layer.running_mean, f"{name}.var": layer.running_var}
    before = {name: value.clone() for name, value in averages.items()}
    fresh = averages
    for x in batches(3):
        x.requires_grad_(learns)
        with Calls() as calls, torch.set_grad_enabled(learns):
            out, fresh = loan.run(x, {}, statistics, averages=fresh, ranks=Ranks())
        assert sum("batch_norm" in name for name in calls.names) == 2
        seen = [out, other(x)]
        if learns:
            seen = [(made, *torch.autograd.grad(made.cos().sum(), x)) for made in seen]
        torch.testing.assert_close(*seen)
    for name in ("norm1", "norm2"):
        layer = getattr(other, name)
        torch.testing.assert_close(fresh[f"{name}.mean"], layer.running_mean)
        torch.testing.assert_close(fresh[f"{name}.var"], layer.running_var)
    assert all(torch.equal(averages[name], value) for name, value in before.items())


def test_other_layers_move_by_their_own_momentum_and_those_without_by_a_tenth():
    model, x = tiny("frozen"), batches(1)[0]
    model.norm1.momentum = 0.01
    averages = {"seen": torch.tensor(0)}
    for name in ("norm1", "norm2"):
        averages |= {f"{name}.mean": torch.zeros(6 + 2 * (name == "norm2"))}
        averages |= {f"{name}.var": torch.ones(6 + 2 * (name == "norm2"))}
    moved = {}
    for momentum in ("own", 1.0):
        statistics = RunningStatistics(momentum=momentum)
        loan = Loan(model, norm_layers(model))
        moved[momentum] = loan.run(x, {}, statistics, averages=averages, ranks=Ranks())[1]
    for name, share in (("norm1", 0.01), ("norm2", 0.1)):
        found, batch = (moved[momentum][f"{name}.mean"] for momentum in ("own", 1.0))
        torch.testing.assert_close(found, share * batch)


def test_without_averages_moving_statistics_are_the_batchs_own_in_torchs_kernel():
    ours, other = tiny(), tiny().train()
    other.drop.eval()
    with Calls() as calls:
        out, _ = Loan(ours, norm_layers(ours)).run(
            x := batches(1)[0], {}, RunningStatistics(), ranks=Ranks()
        )
    assert sum("batch_norm" in name for name in calls.names) == 2
    torch.testing.assert_close(out, other(x))
