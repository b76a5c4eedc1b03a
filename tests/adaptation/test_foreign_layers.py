"""Layers as other people set them, and models that they cast between two batches."""

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import WHOLE, adapter_of, each
from models import ChannelsRMSNorm, FrozenNorm, batches, tiny
from testtime._core.errors import InputError, ScopeError
from testtime.adaptation.layers import norm_kind
from testtime.adaptation.outputs import read_logits

REMEMBERING = ("rotta", "stamp", "simatta")
"""Methods that keep samples of the stream."""


def with_eps(eps: float) -> nn.Module:
    model = tiny()
    model.norm1.eps = model.norm2.eps = eps
    return model


@each
def test_nothing_may_be_added_to_the_variance(name):
    """torch itself takes no batch statistics then."""
    one, two = (adapter_of(name, with_eps(eps)) for eps in (0.0, 1e-12))
    *begin, last = batches(3)
    for x in begin:
        torch.testing.assert_close(one(x), two(x), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        one.export()(last)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.1}, {"prior": 16}])
def test_what_is_exported_needs_nothing_added_either(options):
    adapter = tt.adapt(with_eps(0.0), "bn-adapt", **options)
    *begin, last = batches(3)
    for x in begin:
        adapter(x)
    torch.testing.assert_close(adapter.export()(last), adapter.predict(last), rtol=1e-4, atol=1e-4)


@each
def test_a_model_may_be_cast_between_two_batches(name):
    model = tiny()
    adapter = adapter_of(name, model)
    first, second, third = batches(3)
    adapter(first)
    model.double()
    mark = adapter.snapshot()
    if name in REMEMBERING:
        with pytest.raises(InputError, match=r"remembers, of type torch.float32"):
            adapter(second.double())
        assert adapter.snapshot() is mark
        adapter.reset()
    assert adapter(second.double()).dtype == torch.float64
    assert adapter.predict(third.double()).isfinite().all()
    assert read_logits(adapter.export()(third.double())).isfinite().all()


def test_moving_averages_may_be_of_another_type_than_the_batch():
    model = tiny()
    adapter = tt.adapt(model, "bn-adapt", momentum=0.1)
    first, second, third = batches(3)
    adapter(first)
    model.double()
    adapter(second.double())
    other = tt.adapt(tiny().double(), "bn-adapt", momentum=0.1)
    for x in (first, second):
        other(x.double())
    told = adapter.predict(third.double())
    torch.testing.assert_close(told, other.predict(third.double()), rtol=1e-4, atol=1e-4)


class ResponseNorm(nn.Module):
    """Global response normalisation, which adds to its input: no layer that Tent speaks of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.ones(channels)),
        )
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.bias + self.weight * x * size / (size.mean(-1, keepdim=True) + self.eps)


class Residual(ChannelsRMSNorm):
    """Normalises, and adds that to its input where it is told to."""

    def __init__(self, channels: int, *, adds: bool) -> None:
        super().__init__(channels)
        self.adds = adds

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x if self.adds else 0)


class PowerMean(nn.Module):
    """A pooling that learns its exponent, and adds an epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.full((1,), 3.0)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.eps).pow(self.p).mean((1, 2)).pow(1 / self.p)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.LayerNorm(6)
        self.response, self.pool = ResponseNorm(6), PowerMean()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).movedim(1, -1))
        return self.head(self.pool(self.response(x)))


def test_not_all_that_adds_an_epsilon_normalises():
    model = Pooling().eval()
    adapter = tt.adapt(model, "tent")
    assert set(adapter.snapshot().tensors) == {"norm.weight", "norm.bias"}
    assert norm_kind(ChannelsRMSNorm(4)) == "layer"
    assert norm_kind(FrozenNorm(4)) == "batch"


def test_layers_of_one_class_need_not_do_the_same():
    for adds in (True, False, True):
        assert norm_kind(Residual(4, adds=adds)) == (None if adds else "layer")


def test_whole_numbers_may_be_added_to_the_variance():
    model, other = with_eps(1), with_eps(1.0)
    for options in ({}, {"momentum": 0.1}, {"prior": 16}):
        one, two = (tt.adapt(each, "bn-adapt", **options) for each in (model, other))
        for x in batches(2):
            assert torch.equal(one(x), two(x))
        assert torch.equal(one.export()(x), two.export()(x))


class Filter(nn.Module):
    """Weighs frequencies by complex numbers, which it holds as such or as pairs of real ones."""

    def __init__(self, *, pairs: bool) -> None:
        super().__init__()
        weight = torch.randn(6, 8, 5, dtype=torch.complex64).conj()
        self.weight = nn.Parameter(torch.view_as_real(weight.resolve_conj()) if pairs else weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return torch.fft.irfft2(torch.fft.rfft2(x) * weight, s=x.shape[-2:])


def spectral(*, pairs: bool) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), Filter(pairs=pairs), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()


@pytest.mark.parametrize("name", WHOLE)
def test_complex_weights_adapt_as_pairs_of_real_ones(name, tmp_path):
    one, two = (adapter_of(name, spectral(pairs=pairs)) for pairs in (False, True))
    assert str(one.plan()) == str(two.plan())
    *begin, last = batches(4)
    for x in begin:
        assert torch.equal(one(x), two(x))
    assert torch.equal(one.export()(last), two.export()(last))
    assert one.export().get_parameter("2.weight").is_complex()
    one.save(tmp_path / "state")
    again = adapter_of(name, spectral(pairs=False))
    again.load(tmp_path / "state")
    assert torch.equal(again(last), two(last))


class Prepared(nn.Module):
    """Scales its input where torch's record of what to differentiate is off."""

    def __init__(self, off) -> None:
        super().__init__()
        self.inner, self.off = tiny(), off

    def forward(self, x: Tensor) -> Tensor:
        with self.off():
            x = 2 * x - 1
        return self.inner(x)


@pytest.mark.parametrize("name", WHOLE)
def test_parts_that_forbid_to_learn_are_told_of(name):
    def learn(off) -> None:
        adapter = adapter_of(name, Prepared(off).eval())
        for x in batches(2):
            adapter(x)

    learn(torch.no_grad)
    with pytest.raises(ScopeError, match=r"torch\.inference_mode\(\).*torch\.no_grad\(\)"):
        learn(torch.inference_mode)


class Frames(nn.Module):
    """Answers each frame of a clip, and averages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.clip, self.head = nn.Identity(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([x, x.flip(-1), 0.9 * x], 1).flatten(0, 1)
        features = self.norm(self.stem(frames)).relu().mean((2, 3))
        self.clip(features.unflatten(0, (len(x), -1)).mean(1))
        return self.head(features).unflatten(0, (len(x), -1)).mean(1)


READING = {name: {} for name in ("lame", "adanpc", "cafa", "rmt")}
READING |= {"simatta": {"oracle": lambda i, x: i * 0, "e_high": 0.0}, "tesla": {"queue": 2}}
"""Methods that read features, with options under which they do."""


@pytest.mark.parametrize("name", READING)
def test_features_of_frames_are_not_those_of_samples(name):
    model, xs = Frames().eval(), batches(2)

    def begin(features: str | None) -> tt.Adapter:
        loader = [(x, torch.arange(len(x)) % 5) for x in xs]
        needs = tt.methods()[name].needs
        source = tt.fit_source(model, loader, methods=[name], features=features) if needs else None
        return tt.adapt(model, name, source=source, features=features, **READING[name])

    def answer(features: str | None) -> Tensor:
        return begin(features)(xs[0])

    with pytest.raises(ScopeError, match=r"\(48, 6\) for 16 samples.*features='...'"):
        answer(None)
    assert answer("clip").isfinite().all()


class Places(nn.Module):
    """Answers each place of an image, and averages: its features are as many as there are places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x).flatten(2).mT)).mean(1)


@pytest.mark.parametrize("name", ["cafa", "adanpc", "rmt"])
def test_features_of_source_samples_are_of_one_shape(name):
    loader = [(x, torch.arange(16) % 5) for x in (*batches(1), torch.rand(16, 3, 9, 9))]
    with pytest.raises(InputError, match="samples of one size"):
        tt.fit_source(Places().eval(), loader, methods=[name])


@pytest.mark.parametrize("name", ["dent", "domainadaptor", "rotta"])
def test_batch_normalisation_without_a_scale_leaves_the_others_to_learn(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.GroupNorm(2, 6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).eval()  # fmt: skip
    adapter = adapter_of(name, model)
    assert adapter.plan().tensors == ("3.weight", "3.bias")
    for x in batches(2):
        assert adapter(x).isfinite().all()
