"""Linear layers by convolutions, against torch's own in double precision."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import testtime as tt
from others import Seeing, handling
from testtime._core.outcomes import Outcome
from testtime.adaptation.kernels import linear as kernel
from testtime.adaptation.kernels import replay
from testtime.adaptation.kernels.linear import forward_of_linear, linear, to_input, unfilled
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.scope import all_parameters
from testtime.adaptation.source_like import SourceLike


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def convolved(monkeypatch):
    """Every layer is worth it, whatever the processor; how many rows each had."""
    rows, convolve = [], kernel._convolved
    monkeypatch.setattr(kernel, "WORK", 1)
    monkeypatch.setattr(kernel, "ROWS", 1)
    monkeypatch.setattr(kernel, "unfilled", lambda: True)
    monkeypatch.setattr(
        kernel, "_convolved", lambda x, *more: (rows.append(x.numel()), convolve(x, *more))[1]
    )
    return rows


def layer(learns: bool = False, bias: bool = True) -> list[Tensor]:
    weight = draw(7, 12).requires_grad_(learns)
    return [weight, draw(7).requires_grad_(learns)] if bias else [weight]


def slopes(function, x: Tensor, *more: Tensor, times: int = 1) -> list[Tensor]:
    """What it gives, and gradients of whatever wants one; a second time of these in turn."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in (x, *more)]
    made = [function(*leaves)]
    wanting = [t for t in leaves if t.requires_grad]
    for number in range(times):
        loss = made[-1].square().sum() if number else made[-1].sin().sum()
        grads = torch.autograd.grad(loss, wanting, create_graph=number + 1 < times)
        made.extend(grads[::-1])
    return [each.detach() for each in made]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("shape", [(32, 12), (16, 5, 12), (4, 6, 2, 12), (2, 2, 2, 2, 12)])
def test_answers_and_gradients_are_right(shape, learns, bias, times, threads, convolved):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        given = draw(*shape).requires_grad_(), *layer(learns, bias)
        found = slopes(linear, *given, times=times)
        exact = slopes(
            F.linear,
            *(t.detach().double().requires_grad_(t.requires_grad) for t in given),
            times=times,
        )
    finally:
        torch.set_num_threads(before)
    assert len(convolved) >= 1 + (not learns)
    for one, two in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - two).abs().max() <= 2e-6 * two.abs().max()


@pytest.mark.parametrize("learns", [True, False])
def test_a_frozen_weight_is_all_that_is_kept(learns, convolved):
    x, (weight, bias) = draw(32, 12).requires_grad_(), layer()
    made = linear(x, weight, bias.requires_grad_(learns))
    assert [kept.data_ptr() for kept in made.grad_fn.saved_tensors] == [weight.data_ptr()]
    assert made.is_contiguous()
    assert convolved == [x.numel()]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "other",
    [
        lambda x, weight, bias: (x.double(), weight.double(), bias.double()),
        lambda x, weight, bias: (x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        lambda x, weight, bias: (x.mT.contiguous().mT, weight, bias),
        lambda x, weight, bias: (x, weight, bias[:1]),
        lambda x, weight, bias: (x[0, 0], weight, bias),
        lambda x, weight, bias: (x[:0], weight, bias),
        lambda x, weight, bias: (x[:, :, :0], weight[:, :0], bias),
        lambda x, weight, bias: (x, weight.as_subclass(Named), bias),
        lambda x, weight, bias: (
            torch.nested.nested_tensor([*x], layout=torch.strided), weight, bias
        ),
    ],
)  # fmt: skip
def test_what_is_no_matrix_of_single_precision_is_torchs_to_the_last_bit(other, threads, convolved):
    before, given = torch.get_num_threads(), other(draw(16, 5, 12), *layer())
    try:
        torch.set_num_threads(threads)
        ours, theirs = linear(*given), F.linear(*given)
    finally:
        torch.set_num_threads(before)
    parts = zip(ours.unbind(), theirs.unbind(), strict=True) if ours.dim() else [(ours, theirs)]
    assert all(torch.equal(one, two) for one, two in parts)
    assert not convolved


class Named(Tensor):
    """A tensor of another's making."""


@pytest.mark.parametrize("before", ["learns", "frozen", "inference"])
def test_a_bias_that_learns_alone_gets_its_gradient(before, convolved):
    x, (weight, bias) = draw(16, 2, 12), layer()
    with torch.inference_mode(before == "inference"):  # of which torch keeps nothing for a backward
        x = x.clone()
    if before == "learns":
        x.requires_grad_()
    made = linear(x, weight, bias.requires_grad_())
    (grad,) = torch.autograd.grad(made.sin().sum(), bias)
    exact = F.linear(x.double(), weight.double(), bias.double()).detach()
    torch.testing.assert_close(grad.double(), exact.cos().sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert convolved


@pytest.mark.parametrize("grads", [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 1, 1)])
def test_what_it_gives_may_be_written_to(grads, convolved):
    """As `nn.ReLU(inplace=True)` does, also with a graph where the layer ran without one."""
    x, weight, bias = (
        t.requires_grad_(bool(wants))
        for t, wants in zip((draw(32, 12), *layer()), grads, strict=True)
    )
    scale = torch.full((7,), 2.0, requires_grad=True)
    with torch.set_grad_enabled(any(grads)):
        made = linear(x, weight, bias)
    assert not made._is_view()
    right = F.relu(2 * F.linear(x, weight, bias))
    wanting = [t for t in (x, weight, bias, scale) if t.requires_grad]
    found = torch.autograd.grad(made.mul_(scale).relu_().sum(), wanting)
    exact = torch.autograd.grad(right.sum(), wanting[:-1]) if any(grads) else ()
    torch.testing.assert_close(made, right)
    for one, two in zip(found, exact, strict=False):
        torch.testing.assert_close(one, two)
    assert convolved


def test_modes_and_tensors_of_others_see_torchs_function(convolved):
    x, given = draw(32, 12), layer()
    assert linear(x.as_subclass(handling(F.linear)), *given) == "handled"
    with Seeing() as mode:
        linear(x, *given)
    assert F.linear in mode.seen
    assert not convolved
    with torch.device("cpu"):
        linear(x, *given)
    assert convolved


def test_where_torch_multiplies_well_kept_outputs_are_differentiated_by_its_product(
    convolved, monkeypatch
):
    monkeypatch.setattr(kernel, "unfilled", lambda: False)
    grad, (weight,) = draw(32, 7), layer(bias=False)
    assert torch.equal(to_input(grad, weight), grad @ weight)
    assert not convolved


def test_few_rows_and_little_work_are_torchs(monkeypatch):
    monkeypatch.setattr(kernel, "_convolved", None)
    monkeypatch.setattr(kernel, "unfilled", lambda: True)
    for rows, width in [(kernel.ROWS - 1, 512), (kernel.ROWS, 64)]:
        linear(draw(rows, width), draw(width, width))
    with pytest.raises(TypeError):
        linear(draw(kernel.ROWS, 512), draw(512, 512))


def test_in_one_thread_it_is_done_where_torch_convolves_by_the_same_kernel(convolved):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        linear(draw(17, 12), *layer())
        assert not convolved
        linear(draw(32, 12), *layer())
        assert len(convolved) == 1
    finally:
        torch.set_num_threads(before)


def test_what_is_asked_of_torch_is_heeded(convolved):
    x, given = draw(32, 12), layer()
    with torch.autocast("cpu"):
        assert linear(x, *given).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(linear(x, *given), F.linear(x, *given))
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(linear(x, *given), F.linear(x, *given))
    finally:
        torch.set_float32_matmul_precision("highest")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        linear(x, given[0][:, :11])
    assert torch.equal(torch.func.vmap(partial(linear, weight=given[0]))(x), F.linear(x, given[0]))
    with forward_ad.dual_level():
        made = linear(forward_ad.make_dual(x, torch.ones_like(x)), *given)
        slope = forward_ad.unpack_dual(made).tangent
    torch.testing.assert_close(slope, given[0].sum(1).expand(32, -1))
    assert not convolved


@contextmanager
def coarser(kind: str) -> Iterator[None]:
    """While it lasts, one kind of kernel may round; where torch has a switch for all, all may."""
    switch = getattr(torch.backends.mkldnn, kind, None)
    if switch is None:
        torch.set_float32_matmul_precision("medium")
    else:
        before, switch.fp32_precision = switch.fp32_precision, "bf16"
    try:
        yield
    finally:
        if switch is None:
            torch.set_float32_matmul_precision("highest")
        else:
            switch.fp32_precision = before


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_a_precision_asked_of_one_kind_of_kernel_is_heeded(kind, convolved):
    x, given = draw(32, 12), layer()
    with coarser(kind):
        assert torch.equal(linear(x, *given), F.linear(x, *given))
    assert not convolved


@pytest.mark.parametrize(
    ("maker", "capability", "mkl", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True, True),
        ("vendor_id : GenuineIntel", "AVX512", True, False),
        ("vendor_id : AuthenticAMD", "AVX2", True, False),
        ("vendor_id : AuthenticAMD", "AVX512", False, False),
        ("", "AVX512", True, False),
    ],
)
def test_processors_of_other_makers_than_mkls_are_served(
    maker, capability, mkl, expected, monkeypatch
):
    monkeypatch.setattr(Path, "read_text", lambda self: maker)
    monkeypatch.setattr(kernel.platform, "processor", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert unfilled.__wrapped__() == expected


class Words(nn.Module):
    """A small transformer without attention: tokens in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.begin = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 16))
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


METHODS = {
    "tent": tent(lr=0.1), "eta": eta(lr=0.1, margin=1.2), "sar": sar(lr=0.1, margin=1.3),
    "everything": replace(tent(lr=0.01), scope=all_parameters),
}  # fmt: skip


def batches() -> list[Tensor]:
    return [draw(16, 8 + number, 12)[:, :8].contiguous() * 3 for number in range(4)]


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_torchs_layers(name, convolved):
    model, method = Words().eval(), METHODS[name]
    before = copy.deepcopy(model.state_dict())
    ours = tt.adapt(model, method)
    found = [ours(x) for x in batches()]
    assert convolved
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    exact = tt.adapt(copy.deepcopy(model).double(), method)
    for x, answer in zip(batches(), found, strict=True):
        torch.testing.assert_close(answer.double(), exact(x.double()), rtol=2e-4, atol=2e-4)
    assert [e.outcome for e in ours.events] == [e.outcome for e in exact.events]


@pytest.mark.parametrize("name", METHODS)
def test_deferred_updates_and_those_from_kept_outputs_are_the_same(name, convolved, monkeypatch):
    monkeypatch.setattr(replay, "DEAR", 1)
    monkeypatch.setattr(replay, "LEAST", 1)
    model, method = Words().eval(), METHODS[name]
    behind, at_once = (tt.adapt(model, method, deferred=each) for each in (True, False))
    for x in batches():
        assert torch.equal(behind(x), at_once(x))
    assert torch.equal(behind.predict(x), at_once.predict(x))


def test_what_a_layer_by_convolution_gave_is_kept_and_taken(convolved):
    own = nn.Linear(12, 7).requires_grad_(False)
    vars(own)["forward"] = partial(forward_of_linear, own)
    x, chosen = draw(32, 12), torch.tensor([0, 3, 4])
    with replay.Recorded(32, [own], dear=1, least=1, wide=9) as recorded:
        whole = own(x)
    assert vars(own)["forward"].func is forward_of_linear
    few = x[chosen].requires_grad_()
    with replay.Replayed(recorded, chosen) as replayed:
        made = own(few)
    assert replayed.taken == 1
    assert torch.equal(made, whole[chosen])
    made.sum().backward()
    torch.testing.assert_close(few.grad, own.weight.sum(0).expand(3, -1))


def test_the_frozen_model_answers_to_the_last_bit_as_without_us(convolved):
    model, x = Words().eval(), batches()[0]
    with torch.no_grad():
        right = model(x)
    assert torch.equal(tt.adapt(model, "source")(x), right)
    _ = tt.adapt(model, "lame")(x)
    assert not convolved
    known = tt.fit_source(model, [x[:8], x[8:]], gate=True)
    convolved.clear()  # Fisher information is of what learns
    shut = tt.adapt(model, "tent", source=known, gate=SourceLike(effect=1e9))
    assert torch.equal(shut(x), right)
    assert shut.events[-1].outcome is Outcome.LIKE_SOURCE
    assert not convolved
    assert torch.equal(tt.adapt(model, "tent", guard=True)(x), right)
    assert convolved


def test_a_layer_with_a_forward_of_its_own_keeps_it(convolved):
    model, asked = Words().eval(), []
    own = model.begin.forward
    model.begin.forward = lambda x: (asked.append(x), own(x))[1]
    tt.adapt(model, "tent")(batches()[0])
    assert asked
    assert model.begin.forward(draw(1, 12)).shape == (1, 16)


def test_an_activation_in_place_may_follow_a_layer(convolved):
    norm = nn.LayerNorm(12)
    model = nn.Sequential(norm, nn.Linear(12, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)).eval()
    x = draw(32, 12)
    for deferred in (False, True):
        adapter = tt.adapt(model, "tent", deferred=deferred)
        exact = tt.adapt(copy.deepcopy(model).double(), "tent")
        for each in (x, x + 1):
            torch.testing.assert_close(
                adapter(each).double(), exact(each.double()), rtol=1e-4, atol=1e-4
            )
    assert convolved
