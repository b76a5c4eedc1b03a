"""Moments that are added up row by row, against sums in double precision and torch's own kernel."""

import subprocess
import sys
from functools import partial
from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import testtime as tt
from testtime.adaptation.kernels import batch_statistics
from testtime.adaptation.kernels.batch_statistics import (
    FAR,
    LONG,
    InGroups,
    Quick,
    of_batch,
    row_sums,
)
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import MANY, Loan
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.ranks import Ranks

SHAPES = [(16, 5, 300), (3, 7, 31, 17), (1, 4, 9, 9), (2, 3, 5, 4, 3)]


def draw(*shape: int, **options) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    channels = x.double().movedim(1, 0).flatten(1)
    return channels.mean(1), channels.var(1, correction=0)


@pytest.mark.parametrize("offset", [0.0, 1.0, 0.99 * FAR, 1.01 * FAR, 100.0, -1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_variance_is_right_however_far_the_mean_is_from_zero(shape, offset):
    x = draw(*shape)
    x[:, 0] += offset
    mean, var = exact(x)
    found = of_batch(x, least=1)
    assert found.mean.dtype == found.var.dtype == torch.float32
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    values=st.integers(2, 2000),
    scale=st.sampled_from([1e-15, 1e-3, 1.0, 1e4, 1e15]),
    offset=st.floats(-50, 50),
)
def test_of_any_size_and_place(values, scale, offset):
    x = scale * (draw(2, 3, values) + offset)
    mean, var = exact(x)
    found = of_batch(x, least=1)
    torch.testing.assert_close(found.mean.double() / scale, mean / scale, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.var.double() / scale**2, var / scale**2, rtol=2e-5, atol=0)


@pytest.mark.parametrize("length", [1, 15, 16, 196, 784, 1031, 12544])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.mT.contiguous().mT, Tensor.double])
def test_sums_of_rows_of_any_length(length, layout):
    x = layout(draw(5, 3, length))
    for found, right in zip(
        row_sums(x), (x.double().sum(2), x.double().square().sum(2)), strict=True
    ):
        assert found.dtype == x.dtype
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5 * length**0.5)


@pytest.mark.parametrize("samples", [0, 1, 7, 11])
def test_sums_of_channels_that_lie_together_in_several_pieces(samples, monkeypatch):
    monkeypatch.setattr(batch_statistics, "CACHED", 3 * 5 * 64)
    x = draw(samples, 64, 5).mT
    for found, right in zip(row_sums(x), (x.sum(2), x.square().sum(2)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 15, 17, 31, 64, 160])
def test_of_any_number_of_samples(samples):
    x = 1 + draw(samples, 3, 8, 5)
    for found, right in zip(of_batch(x, least=1), exact(x), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)


def test_the_default_type_at_an_import_changes_nothing():
    code = (
        "import torch; torch.set_default_dtype(torch.float64)\n"
        "from testtime.adaptation.kernels.batch_statistics import of_batch\n"
        "print(*of_batch(torch.tensor([1.0, 3.0], dtype=torch.float32).repeat(2, 1, 8), least=1))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "tensor([2.], dtype=torch.float32) tensor([1.], dtype=torch.float32)\n"


@pytest.mark.parametrize("length", [512 * 512, 149**2, LONG + 7])
def test_of_rows_as_long_as_any_where_all_squares_are_rounded_to_one_side(length):
    x = torch.where(draw(2, 3, length) < 0, -1.1, 1.1)
    found, (mean, var) = of_batch(x, least=1), exact(x)
    torch.testing.assert_close(found.var.double(), var, rtol=3e-6, atol=0)
    torch.testing.assert_close(found.mean.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("scale", "offset"), [(1e17, 30.0), (1e15, 1e4), (0.0, 1e30)])
def test_channels_whose_squares_are_too_large_to_add_up_are_centred(scale, offset):
    x = scale * draw(20, 3, 500) + (scale or 1.0) * offset
    mean, var = exact(x)
    found = of_batch(x, least=1)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-5, atol=0)


def test_channels_that_are_constant_have_no_variance_and_those_that_are_not_finite_are_torchs():
    x = draw(4, 6, 50)
    x[:, 0], x[:, 1] = 0.3, 0.0
    x[1, 2, 3], x[1, 3, 3] = float("nan"), float("inf")
    mean, var = of_batch(x, least=1)
    assert var[:2].tolist() == [0.0, 0.0]
    assert mean[0] == pytest.approx(0.3, rel=1e-7)
    assert not mean[2].isfinite()
    assert not mean[3].isfinite()
    assert not var[2:4].isfinite().any()
    torch.testing.assert_close(var[4:].double(), exact(x)[1][4:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_normalises_and_learns_as_torch_does(shape, affine):
    def seen(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = (1 + 2 * draw(*shape)).to(dtype).requires_grad_()
        pair = draw(2, shape[1]).to(dtype).unbind() if affine else (None, None)
        weight, bias = (value if value is None else value.requires_grad_() for value in pair)
        learn = [value for value in (x, weight, bias) if value is not None]
        y = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3)
        first = torch.autograd.grad(y.cos().sum(), learn, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), learn)
        return y, *first, *second

    with Quick(least=1):
        ours = seen(torch.float32)
    assert type(ours[0].grad_fn).__name__ == "_OfBatchBackward"
    for found, exact in zip(ours, seen(torch.float64), strict=True):
        assert (found - exact).abs().max() < 2e-6 * exact.abs().max()


def test_parts_of_a_joined_batch_are_what_they_are_alone():
    parts = [draw(4, 3, 8, 8), 5 + draw(4, 3, 8, 8)]
    with Quick(least=1), InGroups(2):
        joined = F.batch_norm(torch.cat(parts), None, None, training=True)
    with Quick(least=1):
        alone = [F.batch_norm(part, None, None, training=True) for part in parts]
    assert torch.equal(joined, torch.cat(alone))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.double(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, 0, 0].contiguous(),
        lambda x: x[:, :, :3, :5].contiguous(),
        lambda x: x[:, :, :1, :1].contiguous(),
        lambda x: x[:, :, :1, :1].repeat(1, 1, 1, LONG + 7),
        lambda x: x.bfloat16(),
    ],
)
def test_what_does_not_lie_in_rows_of_single_precision_is_torchs_to_the_last_bit(other):
    """Nor what lies in short rows, where torch's kernel is the faster one, or in rows without equal parts."""
    x = other(1 + draw(8, 3, 6, 6))
    with Quick(least=1):
        ours = F.batch_norm(x, None, None, training=True)
    assert torch.equal(ours, F.batch_norm(x, None, None, training=True))


def test_calls_that_take_given_moments_or_move_them_are_torchs():
    x, moments = draw(8, 3, 6, 6), [torch.zeros(3), torch.ones(3)]
    theirs = [moment.clone() for moment in moments]
    for training in (False, True):
        with Quick(least=1):
            ours = F.batch_norm(x, *moments, training=training, momentum=0.3)
        assert torch.equal(ours, F.batch_norm(x, *theirs, training=training, momentum=0.3))
    assert torch.equal(torch.stack(moments), torch.stack(theirs))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_results_do_not_depend_on_threads(offset):
    x, found, before = offset + draw(3, 5, 90, 1000), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.stack(of_batch(x)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_batches_that_share_a_run_are_answered_as_alone_where_only_both_are_large():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(100), nn.Flatten()).eval()
    loan, parts = Loan(model, norm_layers(model)), [draw(4, 3, 200, 200), 1 + draw(4, 3, 200, 200)]
    assert parts[0].numel() < MANY < 2 * parts[0].numel()
    run = partial(loan.run, tensors={}, statistics=BatchStatistics(), ranks=Ranks())
    joined, _ = run(torch.cat(parts), groups=2)
    assert torch.equal(joined, torch.cat([run(x)[0] for x in parts]))


def test_a_model_answers_and_learns_by_them_where_a_batch_is_large():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()  # fmt: skip
    x = draw(16, 3, 112, 112)
    seen = []
    for layout in (torch.contiguous_format, torch.channels_last):
        adapter = tt.adapt(model, "tent", lr=0.1)
        answers = [adapter(x.contiguous(memory_format=layout)) for _ in range(3)]
        seen.append(torch.stack([*answers, adapter.predict(x)]))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[0][0], seen[0][2])
    assert torch.equal(tt.adapt(model, "bn-adapt")(x), seen[0][0])
    names: list[str] = []

    class Named(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Named():
        adapter(x)
    assert "aten::native_group_norm_backward" in names


class Elsewhere(nn.Module):
    """Normalises without a layer, and by one that stores nothing, beside one that does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 4)
        self.nothing = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(F.silu(self.norm(self.conv(x))), None, None, training=True)
        return self.head(torch.relu(self.nothing(x)).mean((2, 3)))


class Written(nn.BatchNorm2d):
    """A forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(input, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Written])
def test_answers_are_the_same_with_a_graph_and_without_whoever_normalises(kind, monkeypatch):
    model, x = Elsewhere(kind(8)).eval(), draw(16, 3, 112, 112)
    behind, at_once = (tt.adapt(model, "tent", lr=0.1, deferred=each) for each in (True, False))
    for _ in range(3):
        assert torch.equal(behind(x), at_once(x))
    assert torch.equal(behind.predict(x), at_once.predict(x))
    quick, taken = batch_statistics._by_rows, []
    monkeypatch.setattr(
        batch_statistics, "_by_rows", lambda x, rows: (taken.append(x), quick(x, rows))[1]
    )
    at_once.predict(x)
    # no mode of torch sees who normalises without a layer, unless a layer is not torch's
    assert len(taken) == (2 if kind is nn.BatchNorm2d else 3)


def test_who_waits_for_a_model_on_loan_takes_the_way_that_he_takes_alone(monkeypatch):
    """Layers that another adapter has lent meanwhile are torch's own once it is his turn."""
    model, x = Elsewhere(nn.BatchNorm2d(8)).eval(), draw(16, 3, 112, 112)
    adapter = tt.adapt(model, "bn-adapt")
    alone = adapter.predict(x)
    quick, taken = batch_statistics._by_rows, []
    monkeypatch.setattr(
        batch_statistics, "_by_rows", lambda x, rows: (taken.append(x), quick(x, rows))[1]
    )
    seen: list[Tensor] = []
    waiting = Thread(target=lambda: seen.append(adapter.predict(x)))
    with adapter._engine.loan.lock:
        vars(model.norm)["forward"] = partial(nn.BatchNorm2d.forward, model.norm)
        waiting.start()
        waiting.join(0.5)
        del vars(model.norm)["forward"]
    waiting.join()
    assert len(taken) == 2
    assert torch.equal(seen[0], alone)


@pytest.mark.parametrize(("values", "rows"), [(1 << 14, True), ((1 << 14) - 1, False)])
def test_small_tensors_are_torchs(values, rows):
    x = draw(2, 4, values).requires_grad_()
    with Quick():
        y = F.batch_norm(x, None, None, training=True)
    assert (type(y.grad_fn).__name__ == "_OfBatchBackward") == rows


def test_what_torch_refuses_is_refused():
    with Quick(least=1), pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(draw(1, 3, 1), None, None, training=True)
    with Quick(least=1), pytest.raises(RuntimeError, match="running_mean must be defined"):
        F.batch_norm(draw(2, 3, 4), None, None)


def test_rows_are_joined_in_double_precision():
    values = (256 * (3 + draw(5000, 2, 1))).round() / 256  # of few digits: sums of a row are exact
    x = values.expand(-1, -1, 16).contiguous()
    found = of_batch(x, least=1)
    assert all(torch.equal(one, two.float()) for one, two in zip(found, exact(x), strict=True))


def test_channels_are_centred_where_the_mean_is_far_from_zero_and_constant_ones_are_torchs(
    monkeypatch,
):
    asked, added = [], []
    by_torch, by_rows = batch_statistics._by_torch, batch_statistics.both_sums
    monkeypatch.setattr(batch_statistics, "_by_torch", lambda x: (asked.append(x), by_torch(x))[1])
    monkeypatch.setattr(batch_statistics, "both_sums", lambda x: (added.append(x), by_rows(x))[1])
    x = draw(32, 4, 3000)
    x[:, 1] += 3.8
    x[:, 2] += 4.2
    x[:, 3] = 0.3
    before = x.clone()
    found, (mean, var) = of_batch(x, least=1), exact(x)
    assert [each.numel() // (32 * 3000) for each in added] == [4, 2]
    assert [each.shape for each in asked] == [(32, 1, 3000)]
    assert torch.equal(x, before)
    torch.testing.assert_close(found.var.double(), var, rtol=2e-6, atol=1e-15)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-7, atol=1e-7)
