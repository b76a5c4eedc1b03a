"""Batch statistics under traces, exports, transforms of functions and derivatives forwards."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import testtime as tt
from testtime.adaptation.kernels.batch_statistics import (
    Quick,
)


def draw(*shape: int, **options) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.filterwarnings("ignore:.*trace")
def test_an_export_can_be_traced_at_any_size():
    """What is added up in rows depends on the values, which no trace can hold."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(100), nn.Flatten()).eval()
    x, far = draw(8, 3, 100, 100), 100 + draw(8, 3, 100, 100)
    exported = tt.adapt(model, "bn-adapt", prior=16).export()
    for made in (torch.export.export(exported, (x,)).module(), torch.jit.trace(exported, x)):
        for each in (x, far):
            torch.testing.assert_close(made(each), exported(each), rtol=1e-5, atol=1e-5)


def test_transforms_of_functions_are_torchs():
    def slope(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: F.batch_norm(x, None, None, training=True).cos().sum())(x)

    x = draw(4, 3, 50)
    with Quick(least=1):
        ours = slope(x)
    assert torch.equal(ours, slope(x))


@pytest.mark.filterwarnings("ignore:.*trace")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bn-adapt", {"prior": 16}),
        ("bn-adapt", {"alpha": 0.3}),
        ("domainadaptor", {}),
        ("tent", {}),
    ],
)
def test_a_graph_of_an_export_serves_batches_of_another_size(name, options):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    exported = tt.adapt(model.eval(), name, **options).export()
    x, fewer = draw(16, 3, 8, 8).sigmoid(), draw(5, 3, 8, 8).sigmoid() + 1
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    for made in (
        torch.jit.trace(exported, x),
        torch.export.export(exported, (x,), dynamic_shapes=sizes).module(),
        torch.compile(exported, backend="eager", dynamic=True, fullgraph=True),
    ):
        for each in (x, fewer):
            torch.testing.assert_close(made(each), exported(each), rtol=1e-5, atol=1e-5)


STATISTICS = [
    ("bn-adapt", {"prior": 16}), ("bn-adapt", {"alpha": 0.3}), ("bn-adapt", {"momentum": 0.1}),
    ("rotta", {}), ("tent", {}), ("domainadaptor", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), STATISTICS)
@pytest.mark.parametrize("learn", [True, False])
def test_forward_differentiation_goes_through_all_statistics(name, options, learn):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    model = model.double().eval()
    adapter = tt.adapt(model, name, **options)
    adapter.predict(draw(2, 3, 8, 8).double().sigmoid())  # builds the engine
    engine, state = adapter._engine, adapter.snapshot()
    averages = engine.fresh().averages

    def answer(x):
        return engine.run(x, state.tensors, averages=averages, learn=learn)[0]

    x, direction = draw(6, 3, 8, 8).double(), draw(6, 3, 8, 8).double()
    _, told = torch.func.jvp(answer, (x,), (direction,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(answer(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6
    with torch.no_grad():
        found = (answer(x + step * direction) - answer(x - step * direction)) / (2 * step)
    with torch.no_grad():
        _, unlearnt = torch.func.jvp(answer, (x,), (direction,))
    for each in (told, dual, unlearnt):
        torch.testing.assert_close(each, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_differentiation_takes_torchs_own_kernel(place):
    given = [draw(2, 3, 32), draw(3), draw(3)]
    direction = torch.ones_like(given[place])

    def told():
        with forward_ad.dual_level():
            moved = [*given]
            moved[place] = forward_ad.make_dual(given[place], direction)
            x, weight, bias = moved
            return forward_ad.unpack_dual(F.batch_norm(x, None, None, weight, bias, training=True))

    with Quick(least=1):
        found = told()
    assert found.tangent is not None
    assert all(map(torch.equal, found, told()))
