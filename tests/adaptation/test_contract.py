"""What every method owes its user; the battery runs over all that are registered."""

import copy
import gc
import math
import sys
import warnings
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import testtime as tt
from models import Experts, batches, tiny
from testtime._core.errors import (
    InputError,
    NeedsSource,
    OptionError,
    ScopeError,
    StateError,
    TesttimeWarning,
    UnknownName,
)
from testtime._core.files import digest
from testtime._core.outcomes import Outcome
from testtime._core.registry import find
from testtime.adaptation.engine import Engine
from testtime.adaptation.knowledge import fingerprint
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.outputs import read_logits
from testtime.adaptation.parts.prediction import from_teacher, student

SMALL = {"memo": {"views": 2}, "cotta": {"views": 2}, "rotta": {"capacity": 16, "every": 16}}
SMALL |= {"psmt": {"views": 2}, "petal": {"views": 2}}
WHOLE = ("cotta", "memo", "rmt", "psmt", "petal", "sqrl")  # adapt all weights
SMALL |= {"stamp": {"views": 2, "capacity": 16, "margin": 0.8}}
SMALL |= {"simatta": {"e_low": 2.0, "steps": 3}}
SMALL |= {"vcotta": {"views": 2}, "tesla": {"views": 2}}
ALL = sorted(set(tt.methods()) - {"foa"})
"""FOA takes transformers alone: what is asked here is asked of it in test_foa.py."""
LEARNING = [name for name in ALL if name not in ("source", "bn-adapt", "lame")]
CORRECTING = ("lame", "adanpc", "vcotta")
"""Methods that answer with something else than what the model says, which no export can hold."""
WEIGHING = ("sade",)
"""Methods for models of several experts; they answer with one tensor. See test_experts."""
AFTER = ("memo", "tesla", "sade")
"""Methods that answer after their step."""
each = pytest.mark.parametrize("name", ALL)


def recipe_of(name: str):
    return find("method", name).build(**SMALL.get(name, {}))


def suited(name: str, model: nn.Module) -> nn.Module:
    """The model, with experts where the method weighs some."""
    return Experts(model) if name in WEIGHING and type(model) is not Experts else model


def adapter_of(name: str, model: nn.Module | None = None, **more):
    model = suited(name, tiny() if model is None else model)
    dtype = next(model.parameters()).dtype
    loader = [(x.to(dtype), torch.arange(len(x)) % 5) for x in batches(2)]
    source = tt.fit_source(model, loader, methods=[name]) if tt.methods()[name].needs else None
    return tt.adapt(model, name, source=source, **{**SMALL.get(name, {}), **more})


def test_all_methods_are_here():
    expected = "source bn-adapt tent eta eata sar deyo ostta lame cotta rotta memo rdumb"
    assert set(expected.split()) <= set(ALL)


KINDS = ["batch", "sync", "group", "layer", "instance", "frozen", "rms"]


def refuses(name, kind):
    """Whether a method is not for networks of a kind; it then says so when it is built."""
    if name != "bn-adapt" or kind not in ("group", "layer", "rms"):
        return False
    with pytest.raises(ScopeError, match="statistics"):
        adapter_of(name, tiny(kind))
    return True


@each
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_borrowed(name, kind):
    if refuses(name, kind):
        return
    model = tiny(kind)
    model.head.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    chance = torch.get_rng_state()
    adapter = adapter_of(name, model)
    for x in batches(4):
        given = x.clone()
        adapter(x)
        assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), chance)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()] == hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@each
def test_a_failing_model_is_given_back(name):
    model = tiny()
    adapter = adapter_of(name, model)
    for x in batches(2):
        adapter(x)
    before = copy.deepcopy(model.state_dict())
    mark = adapter.snapshot()
    with pytest.raises(InputError, match="could not take"):
        adapter(torch.rand(4, 7, 8, 8))
    assert adapter.snapshot() is mark
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad for p in model.parameters())


@each
def test_state_goes_to_disk_and_back(name, tmp_path):
    first, second = adapter_of(name), adapter_of(name)
    xs = batches(8)
    for x in xs[:4]:
        first(x)
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    for x in xs[4:]:
        assert torch.equal(first(x), second(x))


@each
def test_reset_and_restore_are_exact(name):
    adapter = adapter_of(name)
    xs = batches(6)
    begin = [adapter(x) for x in xs[:3]]
    mark = adapter.snapshot()
    later = [adapter(x) for x in xs[3:]]
    adapter.restore(mark)
    assert all(torch.equal(adapter(x), y) for x, y in zip(xs[3:], later, strict=True))
    adapter.reset()
    assert all(torch.equal(adapter(x), y) for x, y in zip(xs[:3], begin, strict=True))


def blocks_registered_backwards() -> nn.Module:
    """Four blocks of two normalisation layers that run in the other order than they are held."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Backwards()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        half = lambda: [nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]  # noqa: E731
        self.head = nn.Linear(6, 5)
        for i in (4, 3, 2, 1):
            setattr(self, f"block{i}", nn.Sequential(*half(), *half()))
        self.stem = nn.Conv2d(3, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        for i in (1, 2, 3, 4):
            x = getattr(self, f"block{i}")(x)
        return 20 * self.head(x.mean((2, 3)))


@each
def test_states_do_not_depend_on_when_the_order_of_layers_was_seen(name, tmp_path):
    xs = batches(6)
    first = adapter_of(name, blocks_registered_backwards())
    mark = first.snapshot()
    begin = [first(x) for x in xs[:3]]
    first.save(tmp_path / "state")
    later = [first(x) for x in xs[3:]]
    first.restore(mark)
    assert all(torch.equal(first(x), y) for x, y in zip(xs[:3], begin, strict=True))
    second = adapter_of(name, blocks_registered_backwards())
    second.load(tmp_path / "state")
    assert all(torch.equal(second(x), y) for x, y in zip(xs[3:], later, strict=True))


@each
def test_snapshots_of_other_methods_and_models_are_refused(name):
    adapter = adapter_of(name)
    adapter(batches(1)[0])
    mine = adapter.snapshot()
    for other in set(ALL) - {name}:
        with pytest.raises(StateError, match="another method"):
            adapter.restore(adapter_of(other).snapshot())
    if mine.tensors:
        wrapped = adapter_of(name, Wrapped("tuple").eval())
        wrapped(batches(1)[0])
        with pytest.raises(StateError, match="another model"):
            adapter.restore(wrapped.snapshot())
    assert adapter.snapshot() is mine


def meddled(path, change) -> None:
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, tensors)
    save_file(tensors, path, about)


def not_finite(about, tensors) -> None:
    for name in tensors:
        if tensors[name].is_floating_point():
            tensors[name] = tensors[name] * math.nan
    about["digest"] = digest(tensors, about["plain"])


MEDDLING = {
    "another shape": lambda about, tensors: tensors.update(generator=torch.zeros(3)),
    "a tensor less": lambda about, tensors: tensors.pop("generator"),
    "no tree": lambda about, tensors: about.pop("plain"),
    "another tree": lambda about, tensors: about.update(plain="{}"),
    "an older format": lambda about, tensors: about.update(format="testtime-state-0"),
    "not finite": not_finite,
}


@each
@pytest.mark.parametrize("how", MEDDLING)
def test_damaged_states_are_refused(name, how, tmp_path):
    adapter = adapter_of(name)
    for x in batches(2):
        adapter(x)
    adapter.save(tmp_path / "state")
    meddled(tmp_path / "state", MEDDLING[how])
    mark = adapter.snapshot()
    if how == "not finite" and not (mark.tensors or mark.averages):
        return  # this method has nothing that could be
    with pytest.raises(StateError, match="state"):
        adapter.load(tmp_path / "state")
    assert adapter.snapshot() is mark


@each
def test_predict_changes_nothing(name):
    adapter = adapter_of(name)
    xs = batches(4)
    adapter(xs[0])
    mark = adapter.snapshot()
    told = adapter.predict(xs[1])
    assert adapter.snapshot() is mark
    assert torch.equal(told, adapter.predict(xs[1]))
    if name not in AFTER:
        torch.testing.assert_close(adapter(xs[1]), told)


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_inference_is_written(name, mode):
    outside, inside = adapter_of(name), adapter_of(name)
    for x in batches(3):
        expected = outside(x)
        with mode():
            answer = inside(x + 0)
        assert torch.equal(answer, expected)
        assert not answer.requires_grad


@each
def test_two_streams_share_a_model(name):
    model = tiny()
    one, two, alone = adapter_of(name, model), adapter_of(name, model), adapter_of(name)
    xs, ys = batches(4), batches(4, seed=9)
    for x, y in zip(xs, ys, strict=True):
        two(y)
        assert torch.equal(one(x), alone(x))


@each
@pytest.mark.parametrize("kind", KINDS)
def test_every_normalisation(name, kind):
    if refuses(name, kind):
        return
    model = tiny(kind)
    adapter = adapter_of(name, model)
    for x in batches(3):
        answer = adapter(x)
        assert answer.shape == (16, 5)
        assert answer.isfinite().all()
    if name == "tent":
        assert adapter.counts.updates == 3
        assert len(adapter.plan().tensors) == (2 if kind == "rms" else 4)


@each
def test_a_batch_of_one(name):
    adapter = adapter_of(name)
    x = batches(1, 1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TesttimeWarning)
        assert adapter(x).isfinite().all()
        assert adapter(x).shape == (1, 5)


def test_a_batch_of_one_with_batch_statistics_is_warned_of():
    with pytest.warns(TesttimeWarning, match="batch of one"):
        tt.adapt(tiny(), "tent")(batches(1, 1)[0])


@each
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.rand(0, 3, 8, 8), "empty"),
        (torch.full((2, 3, 8, 8), math.nan), "NaN"),
        (torch.full((2, 3, 8, 8), math.inf), "NaN or infinite"),
        (torch.rand(3, 8, 8), "takes"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "floating point"),
        ([1, 2], "tensor"),
    ],
)
def test_bad_input_changes_nothing(name, bad, says):
    adapter = adapter_of(name)
    x = batches(1)[0]
    adapter(x)
    mark, counts = adapter.snapshot(), adapter.counts
    for call in (adapter, adapter.predict):
        with pytest.raises(InputError, match=says):
            call(bad)
    assert adapter.snapshot() is mark
    assert adapter.counts == counts


@pytest.mark.parametrize("name", [n for n in LEARNING if n not in WHOLE])
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = tiny()
    adapter = adapter_of(name, model)
    xs = batches(3)
    adapter(xs[0])
    mark = adapter.snapshot()
    with torch.no_grad():
        kept = model.head.weight.clone()
        model.head.weight.fill_(math.nan)
    answer = adapter(xs[1])
    with torch.no_grad():
        model.head.weight.copy_(kept)
    assert answer.shape == (16, 5)
    for key, value in adapter.snapshot().tensors.items():
        if key != "head.weight":
            assert torch.equal(value, mark.tensors[key])
    assert adapter(xs[2]).isfinite().all()


def test_non_finite_steps_are_counted():
    model = tiny()
    adapter = tt.adapt(model, "tent")
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    adapter(batches(1)[0])
    assert adapter.events[-1].outcome is Outcome.NON_FINITE
    assert adapter.counts.skipped == 1


class Faulty(nn.Module):
    """Goes wrong on demand: in the answer for one sample, inside, or everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.fault = tiny(), ""

    def forward(self, x):
        if self.fault == "inside":
            x = torch.cat([x[:1] * math.nan, x[1:]])
        logits = self.net(x)
        if self.fault == "sample":
            return torch.cat([logits[:1] * math.nan, logits[1:]])
        return logits * math.nan if self.fault == "everywhere" else logits


EASY = {"eta": {"margin": 0.9, "redundancy": 0.99}, "bn-adapt": {"momentum": 0.1}}
EASY |= {"eata": EASY["eta"], "rdumb": EASY["eta"]}


def all_finite(tree) -> bool:
    if isinstance(tree, Tensor):
        return bool(tree.isfinite().all())
    if isinstance(tree, dict | list | tuple):
        return all(map(all_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, float) or math.isfinite(tree)


@each
@pytest.mark.parametrize("fault", ["sample", "inside", "everywhere"])
def test_a_stream_survives_answers_that_are_no_numbers(name, fault):
    model = Faulty().eval()
    adapter = adapter_of(name, model, **EASY.get(name, {}))
    xs = batches(8)
    adapter(xs[0])
    model.fault = fault
    assert adapter(xs[1]).shape == (16, 5)
    model.fault = ""
    assert all_finite(vars(adapter.snapshot()))
    assert all(adapter(x).isfinite().all() for x in xs[2:])
    if name in EASY and name != "bn-adapt":  # one bad sample once ended all learning
        assert adapter.counts.updates >= 6


class Bomb(nn.Module):
    """Raises at the n-th forward from now."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.net, self.error, self.left = tiny(), error, math.inf

    def forward(self, x):
        logits = self.net(x)
        self.left -= 1
        if self.left == 0:
            raise self.error
        return logits


@each
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_in_the_middle_of_a_step_changes_nothing(name, error):
    model, xs = Bomb(error("boom")).eval(), batches(3)
    model.train()
    adapter, expected = adapter_of(name, model), adapter_of(name)
    for x in xs[:2]:
        adapter(x)
        expected(x)
    mark, counts, before = adapter.snapshot(), adapter.counts, copy.deepcopy(model.state_dict())
    for forward in (1, 2, 3):
        model.left = forward
        try:
            adapter(xs[2])
        except error:
            assert adapter.snapshot() is mark
            assert adapter.counts == counts
        assert all(module.training for module in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not any(m._forward_pre_hooks for m in model.modules())
        adapter.restore(mark)
    model.left = math.inf
    assert torch.equal(adapter(xs[2]), expected(xs[2]))


class Headed(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(5, 5)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.body(x))


@each
@pytest.mark.parametrize("shared", ["model", "modules"])
def test_streams_in_threads_do_not_meet(name, shared):
    body = tiny()
    models = [body] * 3 if shared == "model" else [Headed(body).eval() for _ in range(3)]
    models = [suited(name, body) for body in models]
    streams = [batches(5, seed=seed) for seed in range(3)]
    alone = [adapter_of(name, copy.deepcopy(model)) for model in models]
    expected = [[adapter(x) for x in xs] for adapter, xs in zip(alone, streams, strict=True)]

    def stream(model: nn.Module, xs: list[Tensor]) -> list[Tensor]:
        adapter = tt.adapt(model, name, source=sources[id(model)], **SMALL.get(name, {}))
        answers = [adapter(x) for x in xs]
        adapter.reset()
        adapter.export()
        return (
            answers
            if all(torch.equal(adapter(x), y) for x, y in zip(xs, answers, strict=True))
            else []
        )

    needs = tt.methods()[name].needs
    loader = [(x, torch.arange(len(x)) % 5) for x in batches(2)]
    sources = {id(m): tt.fit_source(m, loader, methods=[name]) if needs else None for m in models}
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(stream, models, streams))
    finally:
        sys.setswitchinterval(often)
    for mine, theirs in zip(answers, expected, strict=True):
        assert len(mine) == 5
        assert all(map(torch.equal, mine, theirs))


@each
def test_nothing_but_the_state_outlives_a_step(name, monkeypatch):
    leaves: list[weakref.ref] = []

    def watched(engine, state, make=Engine.leaves):
        made = make(engine, state)
        leaves.extend(weakref.ref(tensor) for tensor in made.values())
        return made

    monkeypatch.setattr(Engine, "leaves", watched)
    adapter = adapter_of(name)
    xs = batches(8, 4)
    with torch.autocast("cpu", torch.bfloat16):  # whose cache lives as long as the region
        for x in xs[:4]:
            adapter(x)
        gc.collect()
        assert not [leaf for leaf in leaves if leaf() is not None]
    for event in adapter.events:
        for key, value in event.measured.items():
            if isinstance(value, Tensor):
                assert value.grad_fn is None
                # a number; of outlier scores, one for each sample
                assert value.untyped_storage().nbytes() <= (32 if key == "outlier" else 8)


PASSES = {  # forward and backward passes for each sample, as the algorithms need them
    "source": (1, 0), "bn-adapt": (1, 0), "lame": (1, 0), "tent": (1, 1), "eta": (1, 1),
    "eata": (1, 1), "rdumb": (1, 1), "sar": (2, 2), "deyo": (2, 1), "ostta": (2, 1),
    "cotta": (2 + 1 + 1, 1), "memo": (2 + 1, 2), "rotta": (3, 1), "cafa": (1, 1), "adanpc": (1, 0),
    "vcotta": (2 * 3 + 1, 1), "tesla": (3 + 1 + 1 + 2, 1 + 2),
    "sade": (3, 0), "rmt": (3, 2), "roid": (2, 2), "psmt": (3 + 2, 2), "petal": (2 + 2, 1),
    "lerm": (1, 1), "sqrl": (1, 1), "dent": (7, 6), "domainadaptor": (2, 1),
}  # fmt: skip


EXACT = (
    "tent", "ostta", "cotta", "memo", "vcotta", "tesla", "lerm", "cafa", "dent", "domainadaptor",
    "sade", "rmt",
)  # fmt: skip
"""Methods that leave nothing out, whatever the batch."""


@each
def test_the_plan_says_what_a_step_costs(name):
    adapter = adapter_of(name)
    plan = adapter.plan()
    if name in PASSES:
        assert (plan.forwards, plan.backwards) == PASSES[name]
    for x in batches(3):
        adapter(x)
    counts = adapter.counts
    if plan.forwards is not None and plan.backwards is not None:
        assert counts.samples <= counts.forwards <= plan.forwards * counts.samples
        assert counts.backwards <= plan.backwards * counts.samples
        if name in EXACT:  # nothing is left out
            assert counts.forwards == plan.forwards * counts.samples
            assert counts.backwards == plan.backwards * counts.samples
    adapted = sum(tensor.nbytes for tensor in adapter.snapshot().tensors.values())
    assert plan.bytes >= adapted
    if name == "tent":  # the tensors, two moments, and the random state
        assert plan.bytes == adapter.plan().bytes == 3 * adapted + torch.get_rng_state().nbytes


@each
def test_memory_is_bounded(name):
    adapter = adapter_of(name)
    xs = batches(4, 4)

    def tensors() -> int:
        gc.collect()
        return sum(type(held) is Tensor for held in gc.get_objects())

    def go(steps: int) -> int:
        for step in range(steps):
            adapter(xs[step % 4])
        adapter.events.clear()
        return tensors()

    go(10)  # fills memories
    assert go(10) >= go(60) - 8


MIXED = {"bn-adapt": [{}, {"prior": 16}, {"alpha": 0.3}, {"momentum": 0.1}]}
MIXED |= {"petal": [{"threshold": 0.0}], "cotta": [{"threshold": 0.0}], "stamp": [{"views": 0}]}
MIXED |= {
    "domainadaptor": [{"lr": 0.0}],
    "dent": [{"lr": 0.0}],
}  # of a step on the batch itself nothing is exported


@pytest.mark.parametrize("name", [name for name in ALL if name not in WEIGHING])
@pytest.mark.parametrize("kind", ["batch", "sync", "group", "instance", "frozen", "rms"])
def test_export_is_a_plain_model(name, kind):
    if refuses(name, kind):
        return
    for options in MIXED.get(name, [{}]):
        adapter = adapter_of(name, tiny(kind), **options)
        xs = batches(3)
        for x in xs:
            adapter(x)
        exported = adapter.export()
        assert type(exported) is type(adapter.model)
        before = copy.deepcopy(exported.state_dict())
        x = xs[0][:1] if name == "memo" else xs[0]  # each image alone
        for model, dtype in ((exported, torch.float32), (copy.deepcopy(exported), torch.float64)):
            with torch.no_grad():
                answer = model.to(dtype)(x.to(dtype)).float()
            corrected = adapter.recipe.prediction not in (student, from_teacher)
            if not corrected and name not in CORRECTING:
                torch.testing.assert_close(answer, adapter.predict(x), rtol=1e-3, atol=1e-4)
        assert all(torch.equal(value, before[key]) for key, value in exported.state_dict().items())


@each
def test_reset_follows_a_model_that_was_changed(name):
    model, xs = tiny(), batches(3)
    adapter = adapter_of(name, model)
    adapter(xs[0])
    with torch.no_grad():
        model.norm1 = nn.BatchNorm2d(6).eval()
        model.head = nn.Linear(8, 5)
        model.load_state_dict({k: v * 0.9 for k, v in tiny().state_dict().items()}, assign=True)
    adapter.reset()
    fresh = tt.adapt(adapter.model, adapter.recipe, source=adapter._source and replace(
        adapter._source, model=fingerprint(model)))  # fmt: skip
    assert all(torch.equal(adapter(x), fresh(x)) for x in xs)


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = tiny(), kind

    def forward(self, x):
        logits = self.net(x)
        if self.kind == "tuple":
            return logits, x.mean((1, 2, 3))
        if self.kind == "dense":
            return logits[..., None, None] + x.mean(1, keepdim=True)
        return OUTPUTS[self.kind](logits, logits.sum(1))


class Plain:
    """An object of nobody's, with logits."""

    def __init__(self, logits: Tensor, more: Tensor) -> None:
        self.logits, self.more = logits, {"deep": [more, None]}


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    more: tuple[Tensor, ...]


class Named(NamedTuple):
    logits: Tensor
    more: Tensor


OUTPUTS = {
    "object": Plain,
    "dataclass": lambda logits, more: Frozen(logits, (more, more)),
    "named tuple": Named,
    "list": lambda logits, more: [logits, more],
    "nested": lambda logits, more: (logits, None, {"deep": [more, "kept"]}, more.sum()),
    "dictionary": lambda logits, more: {"more": more, "logits": logits},
    "segmentation": lambda logits, more: OrderedDict(out=logits, aux=more),
}


def tensors_of(output) -> list[Tensor]:
    """All tensors in an output."""
    if isinstance(output, Tensor):
        return [output]
    parts = output if isinstance(output, tuple | list) else getattr(output, "__dict__", output)
    if isinstance(parts, dict) and not isinstance(output, list):
        parts = parts.values()
    return [t for part in parts for t in tensors_of(part)] if parts not in (None, "kept") else []


@pytest.mark.parametrize("name", [name for name in ALL if name not in WEIGHING])
@pytest.mark.parametrize("kind", ["tuple", *OUTPUTS])
def test_outputs_keep_their_kind(name, kind):
    model, x = Wrapped(kind).eval(), batches(1)[0]
    adapter, expected = adapter_of(name, model), adapter_of(name)(x)
    told, answer, plain = adapter.predict(x), adapter(x), model(x)
    torch.testing.assert_close(read_logits(answer), expected)
    for given in (told, answer):
        assert type(given) is type(plain)
        assert [t.shape for t in tensors_of(given)] == [t.shape for t in tensors_of(plain)]
        assert not any(t.requires_grad for t in tensors_of(given))


class Tied(nn.Module):
    """Two layers with one scale and shift, one layer that runs twice, and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, 5)
        self.norm1.weight, self.norm1.bias = self.norm2.weight, self.norm2.bias

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.norm2(self.conv2(x)).relu()).mean((2, 3)))


@each
def test_tied_repeated_and_unused_layers(name):
    model = Tied().eval()
    adapter = adapter_of(name, model)
    for x in batches(3):
        assert adapter(x).isfinite().all()
    adapted = adapter.snapshot().tensors
    assert not {"norm1.weight", "norm2.weight"} <= adapted.keys()
    assert set(adapted) <= dict(model.named_parameters()).keys()
    exported = adapter.export()
    exported = exported.body if name in WEIGHING else exported
    assert exported.norm1.weight is exported.norm2.weight


@pytest.mark.parametrize("name", ["source", "bn-adapt", "tent", "eta", "eata", "sar", "ostta"])
def test_dense_logits(name):
    adapter = adapter_of(name, Wrapped("dense").eval())
    for x in batches(2):
        assert adapter(x).shape == (16, 5, 8, 8)


@pytest.mark.parametrize("name", [n for n in ALL if not recipe_of(n).dense and n not in WEIGHING])
def test_dense_logits_are_refused_where_a_sample_has_one_answer(name):
    with pytest.raises(InputError, match="dense"):
        adapter_of(name, Wrapped("dense").eval())(batches(1)[0])


@each
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda logits: logits[:1], "one prediction for each sample"),
        (lambda logits: logits.argmax(1, keepdim=True), "floating point"),
        (lambda logits: logits[:, 0], "expected logits"),
        (lambda logits: {"scores": logits}, "dictionary"),
    ],
    ids=["batch", "labels", "rank", "keys"],
)
def test_what_is_no_logits_is_refused(name, spoil, says):
    model = Spoilt(spoil if not tt.methods()[name].needs else lambda logits: logits).eval()
    adapter = adapter_of(name, model)
    model.spoil = spoil
    with pytest.raises((InputError, ScopeError), match=says):
        adapter(batches(1)[0])
    assert adapter.counts.steps == 0


class Spoilt(nn.Module):
    def __init__(self, spoil) -> None:
        super().__init__()
        self.net, self.spoil = tiny(), spoil

    def forward(self, x):
        return self.spoil(self.net(x))


@pytest.mark.parametrize("name", [*LEARNING, "lame"])
def test_one_class_is_refused_where_probabilities_matter(name):
    model = Spoilt(lambda logits: logits).eval()
    adapter = adapter_of(name, model)
    model.spoil = lambda logits: logits[:, :1]
    with pytest.raises(InputError, match="two logits"):
        adapter(batches(1)[0])


@pytest.mark.parametrize("name", ["tent", "cotta", "ostta", "memo"])
def test_a_model_that_carries_no_gradient_is_refused(name):
    model = Spoilt(lambda logits: logits.detach()).eval()
    with pytest.raises(ScopeError, match="no gradient"):
        adapter_of(name, model)(batches(1)[0])


@each
def test_a_type_that_the_model_does_not_take_is_refused_at_any_time(name):
    adapter = adapter_of(name)
    x = batches(1)[0]
    for _ in range(2):
        with pytest.raises(InputError, match="float64"):
            adapter(x.double())
        adapter(x)


@each
def test_half_precision(name):
    model, x = tiny(), batches(1)[0]
    adapter = adapter_of(name, model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adapter(x)
    assert mixed.isfinite().all()
    whole = adapter_of(name, tiny().bfloat16())
    for _ in range(2):
        assert whole(x.bfloat16()).isfinite().all()
    assert all(v.dtype == torch.float32 for v in whole.snapshot().tensors.values())


@each
def test_channels_last_changes_no_answer(name):
    models = tiny(), tiny().to(memory_format=torch.channels_last)
    for model in models:  # normalisation removes it: Adam would make steps of rounding noise
        model.conv2.bias = None
    plain, last = (adapter_of(name, model) for model in models)
    for x in batches(2):
        answer = last(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(plain(x), answer, rtol=1e-4, atol=1e-4)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean tent"):
        tt.adapt(tiny(), "tnet")
    with pytest.raises(OptionError, match="did you mean lr"):
        tt.adapt(tiny(), "tent", lrr=1)


def test_a_method_that_needs_the_source_names_the_call():
    with pytest.raises(NeedsSource, match=r"tt.fit_source\(model, loader"):
        tt.adapt(tiny(), "eata")


def test_a_model_without_normalisation_is_refused():
    bare = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    for name in ("tent", "sar", "rotta"):
        with pytest.raises(ScopeError, match="has none"):
            tt.adapt(bare, name)
    assert tt.adapt(bare, "lame")(batches(1)[0]).shape == (16, 5)


def test_states_of_others_are_refused(tmp_path):
    adapter = tt.adapt(tiny(), "tent")
    adapter(batches(1)[0])
    path = tmp_path / "state.safetensors"
    adapter.save(path)
    other = tiny()
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(StateError, match="another model"):
        tt.adapt(other, "tent").load(path)
    with pytest.raises(StateError, match="another method"):
        tt.adapt(tiny(), "tent", lr=0.5).load(path)
    path.write_bytes(path.read_bytes()[:-40])
    mark = adapter.snapshot()
    with pytest.raises(StateError, match="truncated"):
        adapter.load(path)
    with pytest.raises(StateError, match="no file"):
        adapter.load(tmp_path / "nothing")
    assert adapter.snapshot() is mark


def test_source_knowledge_of_another_model_is_refused(tmp_path):
    known = tt.fit_source(tiny(), batches(1))
    known.save(tmp_path / "source.safetensors")
    again = tt.SourceKnowledge.load(tmp_path / "source.safetensors")
    assert again.samples == 16
    with pytest.raises(StateError, match="another model"):
        tt.adapt(tiny("group"), "eata", source=again)


def test_pixels_out_of_range_are_refused_where_copies_are_made():
    for name in {"rotta", "roid", "vcotta", "tesla", *WHOLE} - {"sqrl"}:
        with pytest.raises(InputError, match="normalisation inside the model"):
            adapter_of(name)(batches(1)[0] * 4 - 2)


def test_events_are_told():
    told = []
    adapter = tt.adapt(tiny(), "tent", on_event=told.append)
    for x in batches(3):
        adapter(x)
    assert list(adapter.events) == told
    assert told[0].loss == pytest.approx(told[0].entropy)
    assert [event.step for event in told] == [1, 2, 3]
    assert told[0].used == told[0].samples == 16


def test_a_callback_that_raises_is_heard_after_the_step():
    adapter = tt.adapt(tiny(), "tent", on_event=lambda event: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(batches(1)[0])
    assert adapter.counts.steps == len(adapter.events) == 1


NUMBERS = [
    (name, option)
    for name in ALL
    for option, default in tt.methods()[name].options.items()
    if type(default) in (int, float)
]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_options_that_are_no_numbers_are_refused(name, option):
    for wrong in ("a", math.nan, [1], True):
        with pytest.raises(OptionError, match=f"{option} is .*; expected"):
            adapter_of(name, **{option: wrong})
    if option in ("lr", "steps", "batch_size", "momentum", "margin", "views", "every", "capacity"):
        with pytest.raises(OptionError, match=f"{option} is -1; expected"):
            adapter_of(name, **{option: -1})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tent", {"steps": 0}),
        ("tent", {"steps": 1.5}),
        ("tent", {"episodic": "yes"}),
        ("tent", {"lr": math.inf}),
        ("sar", {"batch_size": 0}),
        ("sar", {"rho": -1.0}),
        ("sar", {"scope": "norm"}),
        ("eata", {"beta": -1.0}),
        ("bn-adapt", {"prior": "a"}),
        ("bn-adapt", {"alpha": 2.0}),
        ("bn-adapt", {"momentum": -1.0}),
        ("rotta", {"nu": 2.0}),
        ("rotta", {"augment": 3}),
        ("cotta", {"restore": -1.0}),
        ("lame", {"affinity": 3}),
        ("ostta", {"base": "tent"}),
        ("deyo", {"patches": 0}),
        ("rdumb", {"reset_every": 1.5}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    (option,) = options
    with pytest.raises(OptionError, match=f"{option} is .*; expected"):
        adapter_of(name, **options)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return tiny()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: tt.adapt(None, "tent"), OptionError, "instance of nn.Module"),
        (lambda: tt.adapt(nn.Linear, "tent"), OptionError, "the class Linear"),
        (lambda: tt.adapt("tent", tiny()), OptionError, r"tt.adapt\(model, 'tent'\)"),
        (lambda: tt.adapt(tiny(), 3), OptionError, "expected a name or a recipe"),
        (lambda: tt.adapt(tiny(), tent), OptionError, r"tt.adapt\(model, tent\(\)\)"),
        (lambda: tt.adapt(tiny(), "tent", on_event=3), OptionError, "on_event"),
        (lambda: tt.adapt(tiny(), "eata", source="file"), OptionError, "SourceKnowledge.load"),
        (lambda: tt.adapt(torch.jit.script(tiny()), "tent"), ScopeError, "scripted"),
        (lambda: tt.adapt(nn.LazyLinear(2), "tent"), ScopeError, "no shape yet"),
        (lambda: tt.adapt(tiny().to("meta"), "tent"), ScopeError, "no values"),
        (lambda: tt.adapt(in_inference_mode(), "tent"), ScopeError, "inference_mode"),
        (lambda: tt.SourceKnowledge.load("nowhere"), StateError, "cannot be read"),
        (lambda: tt.fit_source(tiny(), [torch.full((2, 3, 8, 8), math.nan)]), InputError, "NaN"),
        (lambda: copy.deepcopy(tt.adapt(tiny(), "tent")), StateError, "neither copied nor pickled"),
        (lambda: tt.adapt(tiny(), "deyo", patches=9)(batches(1)[0]), InputError, "fewer patches"),
    ],
)
def test_wrong_calls_are_answered_with_the_way_out(call, error, says):
    with pytest.raises(error, match=says):
        call()
