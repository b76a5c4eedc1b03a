"""A default device of torch's changes nothing: no call, no number, no place where an answer lies.

The default device is "meta", which holds no numbers: whatever the library makes without naming a
device raises, or gives no answer. A GPU in its place is a machine's own matter: see tests/cuda.
"""

import ast
import doctest
import importlib
import pkgutil
import sys
from contextlib import nullcontext
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._pytree import tree_leaves

import testtime as tt
from battery import SMALL, alike, suited, told
from models import batches, tiny, tiny_vit
from testtime._core.registry import find
from testtime.adaptation.deferred import answers_last
from testtime.adaptation.kernels.calls import BLIND
from testtime.bench.cells import plan
from testtime.bench.models import load_model
from testtime.bench.runner import run
from testtime.guard.correctness import CorrectnessCalibrator
from testtime.guard.densities import DeepDensity, Gaussian
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.fingerprint import Fingerprint
from testtime.guard.misclassification import MisclassificationNetwork
from testtime.guard.monitor import Monitor
from testtime.guard.rejection import Rejector
from testtime.guard.scaling import TemperatureScaling, VectorScaling
from testtime.losses.diverse_experts import diverse_experts_loss
from testtime.measures.information.laws import multimodal
from testtime.measures.information.minde import minde
from testtime.measures.information.mine import mine
from testtime.measures.information.variational import smile
from testtime.measures.label_encoding import semi_supervised_risk
from testtime.measures.markov import sample_path
from testtime.measures.network_divergence import network_divergence
from testtime.measures.rejection_gradients import student
from testtime.streams.data import load_data
from testtime.streams.scenarios import Scenario

SOURCE = Path(tt.__file__).parent
MAKE = _device._device_constructors()
NAMES = {func.__name__ for func in MAKE}


class Nameless(TorchFunctionMode):
    """What the library makes without naming a device is made on "meta", what others make is not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MAKE and kwargs.get("device") is None and _device.CURRENT_DEVICE is None:
            frame = sys._getframe(1)
            while any(
                part in frame.f_code.co_filename for part in ("/torch/", __file__, "calls.py")
            ):
                frame = frame.f_back
            if frame.f_code.co_filename.startswith(str(SOURCE)):
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


BLIND.add(Nameless)  # it stands in for torch's own mode of a default device


class Keeping(doctest.OutputChecker):
    """Keeps what examples print, and finds nothing wrong with it."""

    def __init__(self):
        self.got = []

    def check_output(self, want, got, optionflags):
        self.got.append(got)
        return True


def printed(examples: doctest.DocTest) -> list[str]:
    keeping, wrong = Keeping(), []
    runner = doctest.DocTestRunner(checker=keeping, verbose=False)
    runner.run(examples, out=wrong.append, clear_globs=False)
    assert not wrong, "".join(wrong)
    return keeping.got


def modules() -> list[str]:
    rooms = ("_core", "measures", "losses", "streams", "adaptation", "guard", "bench")
    each = [m.name for m in pkgutil.walk_packages(tt.__path__, "testtime.") if not m.ispkg]
    return [name for name in each if name.split(".")[1] in rooms]


@pytest.mark.slow
@pytest.mark.parametrize("name", modules())
def test_examples_print_the_same(name):
    """The examples of all that is public, with tensors that their writer made on the CPU."""
    module = importlib.import_module(name)
    for examples in doctest.DocTestFinder(exclude_empty=True).find(module):
        globs = examples.globs
        examples.globs = dict(globs)
        plain = printed(examples)
        examples.globs = dict(globs)
        with Nameless():
            assert printed(examples) == plain, examples.name


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(SOURCE.rglob("*.py")) if "papers" not in p.parts],
    ids=lambda p: p.stem,
)
def test_whatever_makes_a_tensor_names_its_device(path):
    """The checks of papers make their own data, and are no functions for others."""
    nameless = [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
        if ast.unparse(call.func.value) in ("torch", "torch.fft") and call.func.attr in NAMES
        if not any(word.arg in ("device", None) for word in call.keywords)
    ]
    assert not nameless, nameless


CHANCE = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 60, 4, generator=CHANCE)
VIEWS = torch.randn(2, 60, 4, generator=CHANCE)
LABELS = torch.randint(4, (60,), generator=CHANCE)
SETS = {name: value.clone() for name, value in {"real": X, "fake": Y}.items()}
FIVE = torch.arange(16) % 5
GREY = batches(1, channels=1)[0]
LINEAR = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)).requires_grad_(False)
STREAM = Scenario(
    domains=("fog", "spatter", "jpeg_compression"), batch_size=20, samples=40, labels="dirichlet"
)
SHORT = {"steps": 3, "batch_size": 8}


def chance() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def followed(detector) -> list:
    monitor = Monitor(detector)
    return [vars(monitor.update(part)) for part in (Y + 1).split(20)]


CALLS = {
    "smile": lambda: smile(X, Y, trace=True, **SHORT),
    "mine": lambda: mine(X, Y, trace=True, **SHORT),
    "minde": lambda: minde(X, Y, width=16, trace=True, **SHORT),
    "network divergence": lambda: network_divergence(SETS["real"], SETS["fake"], trace=True, **SHORT),
    "laws": lambda: multimodal(9, dims=2, generator=chance()),
    "student": lambda: student(X.abs() + 1, generator=chance()),
    "paths": lambda: sample_path(X[:4].softmax(1).double(), steps=4, paths=3, generator=chance()),
    "risk": lambda: semi_supervised_risk(X, LABELS, Y, Y),
    "experts": lambda: diverse_experts_loss([X, Y, X + Y], LABELS, LABELS.bincount().float()),
    "correctness": lambda: CorrectnessCalibrator.fit(X, VIEWS, LABELS, epochs=2).calibrate(X, VIEWS),
    "misclassification": lambda: MisclassificationNetwork.fit(X, LABELS, epochs=2).score(X),
    "rejection": lambda: Rejector.fit(X, LABELS > 1, cost=0.3, **SHORT).score(X),
    "fingerprint": lambda: Fingerprint.fit(LINEAR, X.split(20), epochs=2).read(LINEAR, Y),
    "scaling": lambda: [each.fit(X, LABELS).calibrate(X) for each in (TemperatureScaling, VectorScaling)],
    "densities": lambda: [each.fit(X).sample(5, chance()) for each in (Gaussian, DeepDensity)],
    "exchangeability": lambda: followed(Exchangeability.fit(X)),
    "stream": lambda: [vars(b) for b in STREAM.stream(load_data("fashion-mnist:sample"), seed=3)],
    "model": lambda: load_model("embedded:group")(GREY).detach(),
}  # fmt: skip


def leaves(value) -> list:
    return tree_leaves(vars(value) if is_dataclass(value) else value)


@pytest.mark.parametrize("name", CALLS)
def test_calls_give_the_same_bits(name):
    expected = leaves(CALLS[name]())
    with torch.device("meta"):
        found = leaves(CALLS[name]())
    assert any(isinstance(value, Tensor | float) for value in found)
    assert alike(found, expected)


def life(name: str, path: Path, model: nn.Module, xs: list[Tensor], **more) -> list:
    """What a method answers and remembers: steps, a prediction, a way back, a new start."""
    own = {"population": 4} if name == "foa" else SMALL.get(name, {})
    loader = [(x, FIVE) for x in xs[:2]]
    known = tt.fit_source(model, loader, methods=[name], gate="gate" in more)
    adapter = tt.adapt(model, name, source=known, **own, **more)
    answers = [adapter(x) for x in xs[:3]]
    adapter.save(path)
    answers.append(adapter.predict(xs[0]))
    mark = adapter.snapshot()
    answers.append(adapter(xs[3]))
    adapter.load(path)
    again = vars(adapter.snapshot())
    answers.append(adapter(xs[3]))
    adapter.restore(mark)
    adapter.reset()
    answers.append(adapter(xs[0]))
    return [answers, again, vars(adapter.snapshot()), told(adapter), str(adapter.plan())]


LATER = [
    name for name in sorted(tt.methods()) if answers_last(find("method", name).build()) is None
]


@pytest.mark.parametrize(
    ("name", "more"),
    [(name, {}) for name in sorted(tt.methods())]
    + [(name, {"deferred": True}) for name in LATER]
    + [
        pytest.param(name, {word: True}, marks=pytest.mark.slow)
        for word in ("guard", "gate")
        for name in sorted(tt.methods())
    ],
)
def test_methods_give_the_same_bits(name, more, tmp_path):
    model = tiny_vit() if name == "foa" else suited(name, tiny())
    xs = batches(4)
    with torch.device("cpu"):  # any default device keeps torch's attention from its quick path
        expected = life(name, tmp_path / "one", model, xs, **more)
    with torch.device("meta"):
        found = life(name, tmp_path / "two", model, xs, **more)
    assert alike(found, expected)


def test_a_bench_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("testtime.bench.trial.CLEAN_SAMPLES", 50)
    monkeypatch.setattr("testtime.bench.trial.SOURCE_SAMPLES", 50)
    cells = plan(
        methods=["tent", "eata"], models=["embedded:batch"], data="fashion-mnist:sample",
        streams=[STREAM], seeds=1,
    )  # fmt: skip
    expected = run(cells, tmp_path / "one", jobs=0)
    with torch.device("meta"):
        found = run(cells, tmp_path / "two", jobs=0)
    measured = [[row[key] for key in ("error", "nll", "ece", "clean_error")] for row in expected]
    assert [
        [row[key] for key in ("error", "nll", "ece", "clean_error")] for row in found
    ] == measured


class Making(nn.Module):
    """Makes a tensor on the default device, as its author took for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.made = tiny(), []

    def forward(self, x):
        self.made.append(torch.empty(0).device.type)
        return self.net(x)


@pytest.mark.parametrize("place", ["meta", None])
def test_a_deferred_step_has_the_callers_default_device(place):
    model, xs = Making(), batches(3)
    adapter = tt.adapt(model, "tent", deferred=True)
    with nullcontext() if place is None else torch.device(place):
        for x in xs:
            adapter(x)
        adapter.flush()
    assert set(model.made) == {place or "cpu"}
