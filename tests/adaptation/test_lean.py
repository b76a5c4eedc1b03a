"""What is kept for the backward is less, and answers and gradients are torch's to the last bit."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.models import vgg

import testtime as tt
from kept import answer_and_gradients, assert_same
from models import batches, tiny, tiny_vit
from testtime._core.errors import OptionError
from testtime.adaptation.kernels import bits, lean
from testtime.adaptation.kernels.bits import masked, pack, unpack
from testtime.adaptation.kernels.layout import Shape
from testtime.adaptation.kernels.lean import Lean
from testtime.adaptation.loan import is_compiled
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.optimizer import SGD

NETS = [
    "resnet18", "vgg11_bn", "squeezenet1_1", "densenet121", "googlenet", "shufflenet_v2_x0_5",
    "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf",
]  # fmt: skip


def norms_learn(model: nn.Module) -> list[nn.Parameter]:
    """Freezes all but scales and shifts, and gives these."""
    model.eval().requires_grad_(False)
    learnt = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in learnt:
        module.train().requires_grad_(True)
        module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return [p for m in learnt for p in m.parameters()]


def network(name: str) -> nn.Module:
    if name == "vgg11_bn":  # without a hundred million weights of linear layers
        body = vgg.make_layers(vgg.cfgs["A"], batch_norm=True)
        return nn.Sequential(body, nn.Flatten(), nn.Linear(2048, 10))
    options = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_networks(name, memory_format):
    torch.manual_seed(0)
    model = network(name)
    model = model.to(memory_format=memory_format)
    learnt = norms_learn(model)
    x = torch.rand(2, 3, 64, 64).to(memory_format=memory_format).requires_grad_(not learnt)
    assert_same(model, x, learnt)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 1), dilation=2, padding=(1, 0), bias=False),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(4, 2, 2),
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
    ],
    ids=str,
)
def test_layers(layer):
    sides = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(layer), 2)
    source = torch.randn(3, 4, *[9] * sides, requires_grad=True)
    model = nn.Sequential(nn.Identity(), layer).requires_grad_(False)

    class Scaled(nn.Module):
        def forward(self, x):
            return model(x * 2)  # no leaf, so that it may be written to

    assert_same(Scaled(), source)


def test_what_learns_still_gets_its_gradient():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    x = torch.randn(2, 2, 6, 6, requires_grad=True)
    assert_same(model, x, list(model.parameters()))


def test_views_and_slices_that_are_written_to():
    class Halves(nn.Module):
        def forward(self, x):
            y = x * 1.0
            y[:, :2].relu_()
            return torch.relu(y.transpose(2, 3)) + y

    assert_same(Halves(), torch.randn(2, 4, 5, 5, requires_grad=True))


def test_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU())
    model.requires_grad_(False)
    x = torch.randn(2, 2, 9, 9, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, x)


def test_no_number_passes_as_torch_lets_it_pass():
    x = torch.tensor([-1.0, 0.0, 2.0, torch.nan, torch.inf, -torch.inf], requires_grad=True)
    _, (grad,) = answer_and_gradients(nn.ReLU(), x, [], nullcontext())
    _, (lean,) = answer_and_gradients(nn.ReLU(), x, [], Lean(least=1))
    torch.testing.assert_close(lean, grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 5, 7)])
def test_bits_come_back(shape):
    y = torch.randn(shape).relu()
    assert torch.equal(unpack(pack(y), Shape.of(y)), y != 0)
    if len(shape) == 4:
        y = y.to(memory_format=torch.channels_last)
        assert torch.equal(unpack(pack(y), Shape.of(y)), y != 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 23, 24, 47, 48, 49, 96, 100])
def test_pieces_cover_all(count, dtype, monkeypatch):
    monkeypatch.setattr(bits, "CHUNK", 2 * bits.PLANES)
    y, grad = torch.randn(2, count).to(dtype)
    y = y.relu()
    assert torch.equal(unpack(pack(y), Shape.of(y)), y != 0)
    assert torch.equal(masked(grad, pack(y), Shape.of(y)), torch.where(y > 0, grad, 0.0))
    given = grad.clone()
    assert masked(given, pack(y), Shape.of(y), into=True) is given
    assert torch.equal(given, torch.where(y > 0, grad, 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_are_no_numbers_are_masked_too(dtype):
    y = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=dtype)
    grad = torch.tensor([torch.nan, torch.nan, torch.inf, -torch.inf, -2.0, -3.0], dtype=dtype)
    expected = torch.ops.aten.threshold_backward(grad, y, 0)
    found = masked(grad, pack(y), Shape.of(y))
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def written_to(use) -> list[bool]:
    """Whether the gradients that ReLUs are handed are masked where they lie."""
    told = []

    def watched(grad, bits, shape, *, into):
        told.append(into)
        return masked(grad, bits, shape, into=into)

    x = torch.randn(6, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "masked", watched)
        with Lean(least=1):
            z = use(x * 1.0)
        z.backward(torch.ones_like(z))
    return told


def test_only_a_gradient_that_nobody_else_holds_is_written_to():
    held = []

    def hooked(x):
        y = torch.relu(x)
        y.register_hook(held.append)  # keeps the gradient
        return y * 3

    def retained(x):
        y = torch.relu(x)
        y.retain_grad()
        held.append(y)
        return y * 3

    assert written_to(lambda x: torch.relu(x) * 3) == [True]
    assert written_to(torch.relu) == [False]  # the caller's own
    assert written_to(lambda x: torch.relu(x).sum()) == [False]  # one number, expanded
    assert written_to(hooked) == [False]
    assert held[0].tolist() == [3.0] * 6
    written_to(retained)
    assert held[1].grad.tolist() == [3.0] * 6
    assert not all(written_to(lambda x: (torch.relu(x) + torch.relu(-x)) * 3))


def test_second_derivatives_are_torchs():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    found = []
    for context in (nullcontext(), Lean(least=1)):
        with context:
            y = F.silu(F.group_norm(torch.relu(F.conv2d(x * x, weight)), 1))
            y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])


def test_sums_of_branches_get_their_gradients():
    class Branches(nn.Module):
        def forward(self, x):
            y = torch.relu(x * 2)
            z = torch.relu(y + x)
            return torch.relu(z + torch.relu(z - y) + y)

    assert_same(Branches(), torch.randn(4, 3, 5, 5, requires_grad=True))


def peak(step, x) -> int:
    """Bytes that a step holds at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(x)
    held = top = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    return top


@pytest.mark.parametrize(
    ("name", "activations", "share"),
    [
        ("resnet18", None, 0.55),
        ("resnet18", torch.bfloat16, 0.3),
        ("efficientnet_b0", None, 0.3),
        ("mobilenet_v3_large", None, 0.4),
    ],
)
def test_a_step_holds_a_share_of_the_textbooks(name, activations, share):
    model = torchvision.models.get_model(name).eval()
    x = torch.rand(12, 3, 128, 128)
    adapter = tt.adapt(model, replace(tent(), activations=activations))
    adapter(x)
    book = torchvision.models.get_model(name)
    learnt = norms_learn(book)

    def textbook(x):
        torch.autograd.grad(book(x).softmax(1).square().sum(), learnt)

    def inference(x):
        with torch.no_grad():
            model(x)

    held, theirs, plain = peak(adapter, x), peak(textbook, x), peak(inference, x)
    assert held - plain < share * (theirs - plain)


@pytest.mark.parametrize("kind", ["batch", "group", "layer", "vit"])
def test_short_activations_change_gradients_by_a_percent_at_most(kind, monkeypatch):
    monkeypatch.setattr(lean.kept_as.__wrapped__, "__kwdefaults__", {"least": 1})
    moved = {}
    for dtype in (None, torch.bfloat16):
        model = tiny_vit() if kind == "vit" else tiny(kind)
        adapter = tt.adapt(model, replace(tent(), optimizer=SGD(lr=1.0), activations=dtype))
        x = batches(1)[0]
        source = {name: t.clone() for name, t in adapter.snapshot().tensors.items()}
        answer = adapter(x)
        assert torch.equal(answer, tt.adapt(model, "tent")(x))  # a forward is what it was
        step = [t - source[name] for name, t in adapter.snapshot().tensors.items()]
        moved[dtype] = torch.cat([s.flatten() for s in step])
    exact, short = moved.values()
    assert not torch.equal(exact, short)
    assert (exact - short).norm() < 0.01 * exact.norm()


def test_a_type_that_is_no_floating_point_is_refused():
    for wrong in ("bfloat16", torch.int8):
        with pytest.raises(OptionError, match="activations is"):
            replace(tent(), activations=wrong)


def test_a_compiled_model_keeps_its_own_graph():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert not is_compiled(model)
    assert is_compiled(torch.compile(model, backend="eager"))


INTERPRETED = """
import sys
from contextlib import nullcontext

sys.path.insert(0, {tests!r})
import torch
from adaptation.test_lean import assert_same, network, norms_learn
from testtime.adaptation.kernels import bit_kernels, bits, lean

bits.kernels_of = lambda device: bit_kernels
for name in ("resnet18", "squeezenet1_1"):
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = network(name).to(memory_format=layout)
        learnt = norms_learn(model)
        x = torch.rand(2, 3, 32, 32).to(memory_format=layout)
        assert_same(model, x.requires_grad_(not learnt), learnt)
for dtype in (torch.float16, torch.bfloat16, torch.float64):
    x = torch.randn(3, 1000).to(dtype)
    x[0, :3] = torch.tensor([float("nan"), 0.0, -0.0])
    y, words = bit_kernels.relu(x, inplace=False)
    assert torch.equal(y.nan_to_num(7), x.relu().nan_to_num(7))
    grad = torch.randn(3, 1000).to(dtype)
    expected = torch.ops.aten.threshold_backward(grad, x.relu(), 0)
    assert torch.equal(bit_kernels.masked(grad, words, torch.empty_like(grad)), expected)
x = torch.randn(3, 4, 5, requires_grad=True)
found = []
for mode in (lean.Lean(least=1), nullcontext()):
    with mode:
        y = (x * 2).relu()
    first = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
    found.append((first, *torch.autograd.grad(first.square().sum(), x)))
assert all(map(torch.equal, *found))
"""


@pytest.mark.extra
def test_kernels_of_a_gpu_keep_the_same_bits():
    """By Triton's interpreter, which needs no GPU; `tests/cuda` runs them on one."""
    script = INTERPRETED.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
