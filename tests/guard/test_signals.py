import math

import pytest
import torch
from torch import nn

from models import ChannelsLayerNorm, ChannelsRMSNorm
from testtime._core.errors import InputError, UnknownName
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.fingerprint import Fingerprint
from testtime.guard.monitor import Monitor
from testtime.guard.signals import read_signals


def small(norm=None):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), norm or nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )  # fmt: skip
    for _ in range(20):
        model(torch.randn(64, 1, 8, 8))
    return model


def test_signals_say_what_they_are_named_and_leave_the_model_alone():
    model, x = small().train(), torch.randn(5, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance, hooks = torch.random.get_rng_state(), [len(m._forward_pre_hooks) for m in model]
    signals = read_signals(model, x)
    assert all(module.training for module in model.modules())
    assert torch.equal(chance, torch.random.get_rng_state())
    assert hooks == [len(m._forward_pre_hooks) for m in model]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    probs = model(x).softmax(1)
    torch.testing.assert_close(signals["confidence"], probs.amax(1))
    torch.testing.assert_close(signals["entropy"], -(probs * probs.log()).sum(1))
    torch.testing.assert_close(signals["features"], model[:5](x).norm(dim=1))
    means, norm = model[0](x).mean((2, 3)), model[1]
    expected = ((means - norm.running_mean) ** 2 / (norm.running_var + norm.eps)).mean(1)
    torch.testing.assert_close(signals["statistics/1"], expected)
    one = read_signals(model, x[2:3])
    for name, value in signals.items():
        torch.testing.assert_close(one[name], value[2:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.BatchNorm2d(4)])
def test_a_shift_of_the_input_shows_in_the_statistics(norm):
    model = small(norm)

    def read(shift):
        found = read_signals(model, torch.randn(256, 1, 8, 8) * (1 + shift))
        return torch.stack(list(found.values()), 1)

    monitor = Monitor(Exchangeability.fit(read(0)))
    assert not monitor.update(read(0))
    assert monitor.update(read(1))


def test_statistics_are_the_variances_that_layers_divide_by():
    x = torch.randn(3, 4, 5, 6)
    for norm, over in (
        (nn.GroupNorm(2, 4), x.reshape(3, 2, -1)), (nn.InstanceNorm2d(4, affine=True), x.flatten(2)),
        (nn.LayerNorm([5, 6]), x.flatten(2)), (nn.LayerNorm(6), x),
    ):  # fmt: skip
        model = nn.Sequential(norm, nn.Flatten(), nn.Linear(120, 2))
        expected = over.var(-1, correction=0).log().flatten(1).mean(1)
        torch.testing.assert_close(read_signals(model, x)["statistics/0"], expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.LayerNorm([4, 6]), nn.RMSNorm(6)], ids=str)
def test_a_layer_that_divides_all_of_a_sample_by_one_number_is_read(norm):
    """As in a network of fully connected layers."""
    x = torch.randn(3, *norm.normalized_shape)
    mean = 0 if isinstance(norm, nn.RMSNorm) else x.flatten(1).mean(1)
    expected = (x.flatten(1).square().mean(1) - mean**2).log()
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(math.prod(norm.normalized_shape), 2))
    torch.testing.assert_close(read_signals(model, x)["statistics/0"], expected)


def test_what_divides_by_mean_squares_or_over_channels_is_read_as_it_divides():
    x = torch.randn(3, 4, 5, 6) + 1
    over = x.movedim(1, -1)
    for norm, divisor in (
        (nn.RMSNorm(6), x.square().mean(-1)), (ChannelsRMSNorm(4), over.square().mean(-1)),
        (ChannelsLayerNorm(4), over.var(-1, correction=0)),
    ):  # fmt: skip
        model = nn.Sequential(norm, nn.Flatten(), nn.Linear(120, 2))
        expected = divisor.log().flatten(1).mean(1)
        torch.testing.assert_close(read_signals(model, x)["statistics/0"], expected)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_a_layer_that_divides_by_its_batch_says_nothing_of_a_sample(shape):
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(math.prod(shape[1:]), 2))
    assert list(read_signals(model, torch.randn(shape))) == ["entropy", "confidence", "features"]


def test_layers_that_are_called_by_name_are_read():
    class ByName(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = layer(input=x)
            return x

    model = small().eval()
    named, x = ByName(*model), torch.randn(40, 1, 8, 8)
    told, plain = read_signals(named, x), read_signals(model, x)
    assert told.keys() == plain.keys()
    assert all(torch.equal(told[key], plain[key]) for key in plain)
    read, known = (Fingerprint.fit(m, [x], epochs=1).read(m, x) for m in (named, model))
    assert torch.equal(read.fingerprint, known.fingerprint)


def test_models_without_a_linear_layer_and_bad_calls():
    model = nn.Sequential(nn.Conv2d(1, 3, 8), nn.Flatten())
    assert list(read_signals(model, torch.randn(4, 1, 8, 8))) == ["entropy", "confidence"]
    with pytest.raises(UnknownName):
        read_signals(model, torch.randn(4, 1, 8, 8), features="head")
    with pytest.raises(InputError, match="classes"):
        read_signals(nn.Conv2d(1, 3, 3), torch.randn(4, 1, 8, 8))


def test_only_the_sample_that_is_nan_has_no_signals_and_a_detector_refuses_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).eval()
    x = torch.randn(6, 3)
    plain = torch.stack(list(read_signals(model, x).values()), 1)
    x[2, 0] = torch.nan
    found = torch.stack(list(read_signals(model, x).values()), 1)
    assert bool(found[2].isnan().all())
    others = torch.arange(6) != 2
    torch.testing.assert_close(found[others], plain[others])
    with pytest.raises(InputError, match="Leave these samples out"):
        Monitor(Exchangeability.fit(plain)).update(found)
