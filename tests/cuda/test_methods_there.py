"""Every method on a GPU: a CPU's numbers, deferred or not, in any type and layout, saved and loaded."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torchvision.models import resnet18

import testtime as tt
from battery import ALL, adapter_of, alike, recipe_of, told
from models import batches, tiny, tiny_vit
from testtime.adaptation import budget, shortcuts
from testtime.adaptation.deferred import answers_last
from testtime.adaptation.kernels.replay import Replayed

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]
FIRST = [name for name in ALL if answers_last(recipe_of(name)) is None]


class Chance(TorchFunctionMode):
    """Every number is drawn on the CPU, from a generator of the same seed."""

    def __init__(self) -> None:
        super().__init__()
        self.twins: dict[int, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = kwargs.get("generator")
        if own is None or own.device.type == "cpu":
            return func(*args, **kwargs)
        seed, to = own.initial_seed(), own.device
        kwargs["generator"] = self.twins.setdefault(seed, torch.Generator().manual_seed(seed))
        if "device" in kwargs or not any(isinstance(arg, Tensor) for arg in args):
            kwargs["device"] = "cpu"
        drawn = func(*tree_map_only(Tensor, Tensor.cpu, args), **kwargs)
        if func.__name__.endswith("_"):
            return args[0].copy_(drawn)
        return tree_map_only(Tensor, lambda value: value.to(to), drawn)


def plain_net(kind: str = "batch") -> nn.Module:
    model = tiny(kind)
    model.conv2.bias = None  # normalisation removes it: Adam would make steps of rounding noise
    return model.double()


def adapter_on(name: str, model: nn.Module, **more) -> tt.Adapter:
    if name != "foa":
        return adapter_of(name, model, **more)
    where = next(model.parameters())
    loader = [(x.to(where), torch.arange(len(x), device=where.device) % 5) for x in batches(2)]
    source = tt.fit_source(model, loader, methods=[name])
    return tt.adapt(model, name, source=source, population=4, **more)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in [*ALL, "foa"] for kind in ("batch", "group") if name != "bn-adapt"]
    + [("bn-adapt", "batch")],
)
def test_a_gpu_gives_the_numbers_of_a_cpu(name, kind, device):
    def network():
        return tiny_vit().double() if name == "foa" else plain_net(kind)

    here = adapter_on(name, network())
    expected = [here(x.double()) for x in batches(4)]
    with Chance():
        there = adapter_on(name, network().to(device))
        found = [there(x.double().to(device)) for x in batches(4)]
    for one, two in zip(found, expected, strict=True):
        assert one.device.type == device.type
        torch.testing.assert_close(one.detach().cpu(), two.detach(), rtol=0, atol=1e-5)
    for one, two in zip(told(there), told(here), strict=True):
        assert one[:3] == two[:3]


@pytest.fixture(scope="module")
def large() -> nn.Module:
    """A network that a GPU works at long enough to be behind the host."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5)
    with torch.no_grad():
        model.train()(torch.rand(64, 3, 96, 96))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "more"),
    [(name, {}) for name in FIRST]
    + [("tent", {"guard": True}), ("sar", {"gate": True}), ("cotta", {"every": 2})],
)
def test_deferred_answers_and_states_are_the_same_bits(name, more, large, device, tmp_path):
    """The caller writes to his batch, asks, saves and goes back while the GPU is at work."""
    model = copy.deepcopy(large).to(device)
    xs = [torch.rand(16, 3, 96, 96, device=device) ** (1 + i % 3) for i in range(7)]
    runs = []
    for deferred in (False, True):
        adapter, answers = adapter_on(name, model, deferred=deferred, **more), []
        for number, x in enumerate(xs):
            mine = x.clone()
            answers.append(adapter(mine))
            mine.fill_(7)
            del mine
            torch.full((16, 3, 96, 96), 5.0, device=device)  # memory that was given back, used anew
            if number == 1:
                answers.append(adapter.predict(x))
                mark = adapter.snapshot()
            if number == 2:
                adapter.restore(mark)
                adapter.save(tmp_path / "state")
            if number == 4:
                adapter.load(tmp_path / "state")
        adapter.flush()
        answers.append(adapter.export()(xs[0]) if name not in ("lame", "adanpc") else answers[-1])
        first = [a[0] if isinstance(a, tuple) else a for a in answers]
        runs.append((first, vars(adapter.snapshot()), told(adapter), adapter.counts))
    assert all(torch.equal(one, two) for one, two in zip(runs[0][0], runs[1][0], strict=True))
    assert alike(runs[0][1], runs[1][1])
    assert runs[0][2:] == runs[1][2:]


@pytest.mark.parametrize("name", ["tent", "eta", "sar", "bn-adapt"])
def test_a_graph_made_behind_the_answer_changes_no_bit(name, large, device, monkeypatch):
    """What an answer comes from where that is sooner; here it always does."""
    monkeypatch.setattr(shortcuts.Sooner, "twice", True)
    taken, out = [], Replayed.__exit__

    def leave(self, *error):
        taken.append(self.taken)
        return out(self, *error)

    monkeypatch.setattr(Replayed, "__exit__", leave)
    model = copy.deepcopy(large).to(device)
    deferred, plain = (adapter_of(name, model, deferred=later) for later in (True, False))
    for number in range(4):
        x = torch.rand(32, 3, 96, 96, device=device) ** (1 + number % 3)
        answer = deferred(x)
        deferred.flush()
        assert torch.equal(answer, plain(x))
    assert alike(vars(deferred.snapshot()), vars(plain.snapshot()))
    assert all(taken)
    assert bool(taken) == (name != "bn-adapt")


def test_what_a_step_tells_is_read_once_it_is_there(large, device):
    model = copy.deepcopy(large).to(device)
    xs = [torch.rand(16, 3, 96, 96, device=device) ** (1 + i % 3) for i in range(5)]
    runs = []
    for deferred in (False, True):
        heard, asked = [], []
        adapter = tt.adapt(
            model, "tent", deferred=deferred,
            on_event=lambda e, heard=heard: heard.append((e.entropy, e.loss)),
        )  # fmt: skip
        for x in xs:
            adapter(x)
            asked.append(adapter.events[-1].entropy)
        adapter.flush()
        runs.append((heard, asked))
    assert runs[0] == runs[1]


class Making(nn.Module):
    """Makes a tensor on the default device, as its author took for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.arange(5.0)


def test_a_deferred_step_has_the_callers_default_device(device):
    model, xs = Making().to(device), [x.to(device) for x in batches(3)]
    with torch.device(device):
        deferred, plain = (tt.adapt(model, "tent", deferred=later) for later in (True, False))
        for x in xs:
            assert torch.equal(deferred(x), plain(x))
        deferred.flush()


@pytest.mark.parametrize("name", ["tent", "eta"])
def test_a_budget_in_parts_is_the_same_bits_deferred_or_not(name, device, monkeypatch):
    """By a clock that goes on at each look; a GPU is waited for at each."""
    monkeypatch.setattr(budget, "CHEAPER", 9.0)
    model = tiny("group").to(device)
    runs = []
    for deferred in (False, True):
        monkeypatch.setattr(budget, "clock", itertools.count(0.0).__next__)
        adapter = tt.adapt(model, name, deferred=deferred, budget=0.7)
        answers = [adapter(x.to(device)) for x in batches(12)]
        runs.append((answers, vars(adapter.snapshot())))
    assert runs[0][1]["account"]["parts"]
    assert alike(runs[0], runs[1])


@pytest.mark.parametrize("name", ALL)
def test_states_go_from_one_device_to_the_other(name, device, tmp_path):
    adapters = {
        "cpu": adapter_of(name, tiny()), device.type: adapter_of(name, tiny().to(device))
    }  # fmt: skip
    for place, adapter in adapters.items():
        for x in batches(2):
            adapter(x.to(place))
        adapter.save(tmp_path / place)
    for place, other in ((device.type, "cpu"), ("cpu", device.type)):
        adapter = adapters[place]
        adapter.load(tmp_path / other)
        tensors = adapter.snapshot().tensors
        assert all(value.device.type == place for value in tensors.values())
        adapter(batches(3)[2].to(place))
        adapter.reset()


def gap(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """How far probabilities under autocast are from those without, the largest mean of a batch."""
    model = tiny().to(device)
    model.conv2.bias = None
    xs = [x.to(device) for x in batches(3)]
    with Chance():
        expected = [adapter(x) for adapter in [adapter_of(name, model)] for x in xs]
    adapter = adapter_of(name, model)
    with Chance(), torch.autocast(device.type, dtype):
        answers = [adapter(x) for x in xs]
    assert all(t.dtype == torch.float32 for t in adapter.snapshot().tensors.values())
    return max(
        float((a.float().softmax(-1) - b.softmax(-1)).abs().mean())
        for a, b in zip(answers, expected, strict=True)
    )


@pytest.mark.parametrize("name", ALL)
def test_autocast_is_off_by_a_hundredth_of_probability(name, device):
    assert gap(name, device, torch.bfloat16) <= 1e-2


@pytest.mark.parametrize("name", ["tent", "eta", "sar", "cotta", "rotta"])
def test_float16_and_channels_last_learn(name, device):
    model = tiny().to(device).to(memory_format=torch.channels_last)
    adapter = adapter_of(name, model)
    with torch.autocast(device.type, torch.float16):
        for x in batches(3):
            mine = x.to(device).contiguous(memory_format=torch.channels_last)
            assert adapter(mine).isfinite().all()
    assert adapter.counts.updates


@pytest.mark.parametrize("name", ["tent", "eta", "sar", "deyo", "rotta", "bn-adapt"])
def test_compiled_models_learn_as_others_do(name, device):
    torch._dynamo.reset()
    model = tiny().to(device)
    model.conv2.bias = None
    xs = [x.to(device) for x in batches(3)]
    with Chance():
        expected = [adapter(x) for adapter in [adapter_of(name, model)] for x in xs]
        found = [adapter(x) for adapter in [adapter_of(name, torch.compile(model))] for x in xs]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_a_batch_on_the_wrong_device_is_refused_before_anything_changes(device):
    adapter = tt.adapt(tiny().to(device), "tent")
    adapter(batches(1)[0].to(device))
    mark = adapter.snapshot()
    with pytest.raises(tt.TesttimeError, match="meta"):
        adapter(batches(1)[0].to("meta"))
    assert adapter.snapshot() is mark
