"""What the engine promises of a GPU: torch's bits from less memory, few waits, ranks that agree."""

import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torchvision.models import resnet50

import testtime as tt
from adaptation.test_lean import NETS, assert_same, network, norms_learn
from adaptation.test_waits import OPTIONS, table
from battery import adapter_of
from models import batches, tiny
from scripts import script
from testtime._core.devices import streams_of

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETS)
def test_gradients_from_less_memory_are_torchs_bits(name, layout, device):
    torch.manual_seed(0)
    model = network(name).to(device, memory_format=layout)
    learnt = norms_learn(model)
    x = torch.rand(2, 3, 64, 64, device=device).to(memory_format=layout)
    assert_same(model, x.requires_grad_(not learnt), learnt)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(4, 2, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layers_of_every_type(layer, dtype, device):
    sides = {nn.Conv1d: 1, nn.Conv3d: 3}.get(type(layer), 2)
    source = torch.randn(3, 4, *[9] * sides, device=device, dtype=dtype, requires_grad=True)
    model = nn.Sequential(nn.Identity(), layer).to(device, dtype).requires_grad_(False)

    class Scaled(nn.Module):
        def forward(self, x):
            return model(x * 2)  # no leaf, so that it may be written to

    assert_same(Scaled(), source)


@pytest.mark.parametrize(("name", "waits"), table().items())
def test_the_host_waits_no_more_often_than_the_page_says(name, waits, device):
    adapter = adapter_of(name, tiny().to(device), **OPTIONS.get(name, {}))
    xs = [x.to(device) for x in batches(4)]
    for x in xs[:-1]:
        adapter(x)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            adapter(xs[-1])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    found = [w for w in told if "synchroniz" in str(w.message)]
    assert len(found) <= waits, [f"{w.filename}:{w.lineno}" for w in found]


def test_tent_holds_half_of_what_a_straightforward_step_does(device, monkeypatch):
    def peak(step, x):
        step(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        return torch.cuda.max_memory_allocated() - before

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from textbook import TEXTBOOK, plain

    torch.manual_seed(0)
    model, x = resnet50().eval().to(device), torch.rand(64, 3, 224, 224, device=device)
    floor = peak(plain(model), x)
    textbook = peak(TEXTBOOK["tent"](model), x) - floor
    assert peak(tt.adapt(model, "tent"), x) - floor <= 0.6 * textbook


def test_the_next_batch_is_copied_while_an_update_runs(device):
    """The caller's stream waits for the answer, and not for what comes behind it."""
    streams, size = streams_of(device), (64, 224) if device.type == "cuda" else (2, 64)
    torch.manual_seed(0)
    model, x = resnet50().eval().to(device), torch.rand(size[0], 3, size[1], size[1])
    x = x if streams is None else x.pin_memory()
    adapter, plain = (tt.adapt(model, "tent", deferred=later) for later in (True, False))
    for _ in range(3):
        answer = adapter(x.to(device, non_blocking=True)).to("cpu")
        there = x.to(device, non_blocking=True)
        if streams is not None:
            copied, updated = (streams.Event(enable_timing=True) for _ in range(2))
            copied.record()
            assert adapter.counts.steps  # once the host has called all of the update
            updated.record(adapter._lane.stream)
            streams.synchronize(device)
            early = copied.elapsed_time(updated)
        assert torch.equal(answer, plain(there).to("cpu"))
    assert streams is None or early > 0


def test_the_suites_stream_is_measured_there(device):
    name = "torchvision:resnet50" if device.type == "cuda" else "embedded:batch"
    found = script("deploying").stream(name, 64, 3, device, torch.contiguous_format)
    assert all(len(took) == 3 for took in found.values())
    assert min(found["stream"]) > 0


def rank(number: int, world: int, backend: str, device: str, folder: str) -> None:
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=number, world_size=world
    )
    model = tiny().double().to(device)
    adapter = tt.adapt(model, "tent", lr=1e-2, process_group=dist.group.WORLD)
    for x in batches(3):
        answer = adapter(x.double().chunk(world)[number].to(device))
    tensors = {k: v.cpu() for k, v in adapter.snapshot().tensors.items()}
    torch.save((answer.cpu(), tensors), f"{folder}/{number}")
    dist.destroy_process_group()


@pytest.mark.parametrize(("backend", "world"), [("nccl", 1), ("gloo", 2)])
def test_ranks_adapt_as_one(backend, world, device):
    """Two processes share the one GPU over gloo; NCCL wants a GPU for each."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (world, backend, str(device), folder), nprocs=world)
        made = [torch.load(Path(folder) / str(number)) for number in range(world)]
    whole = tt.adapt(tiny().double(), "tent", lr=1e-2)
    for x in batches(3):
        expected = whole(x.double())
    answers = torch.cat([answer for answer, _ in made])
    torch.testing.assert_close(answers, expected, rtol=0, atol=1e-9)
    for _, tensors in made:
        torch.testing.assert_close(tensors, whole.snapshot().tensors, rtol=0, atol=1e-9)
