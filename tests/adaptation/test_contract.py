"""What every method owes its user; the battery runs over all that are registered."""

import copy
import inspect
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import ALL, KINDS, SMALL, WEIGHING, adapter_of, each, refuses, suited
from models import Headed, batches, tiny
from testtime._core.errors import TesttimeWarning
from testtime._core.registry import find
from testtime.adaptation.export import MARK
from testtime.adaptation.parts.prediction import from_teacher, student
from testtime.adaptation.recipe import describe

CORRECTING = ("lame", "adanpc", "vcotta")
"""Methods that answer with something else than what the model says, which no export can hold."""
AFTER = ("memo", "tesla", "sade")
"""Methods that answer after their step."""


def test_all_methods_are_here():
    expected = "source bn-adapt tent eta eata sar deyo ostta lame cotta rotta memo rdumb"
    assert set(expected.split()) <= set(ALL)


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
@pytest.mark.parametrize("shared", ["model", "modules"])
def test_streams_in_threads_do_not_meet(name, shared):
    body = tiny()
    models = [body] * 3 if shared == "model" else [Headed(body).eval() for _ in range(3)]
    models = [suited(name, body) for body in models]
    streams = [batches(3, 8, seed=seed) for seed in range(3)]
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
        assert len(mine) == 3
        assert all(map(torch.equal, mine, theirs))


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
        for key, value in exported.state_dict().items():  # torch rounds an InstanceNorm's own anew
            torch.testing.assert_close(value, before[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in ALL if name not in WEIGHING])
@pytest.mark.parametrize("kind", ["batch", "sync", "group", "instance", "frozen"])
def test_a_plain_model_takes_the_state_of_an_export_or_says_why_not(name, kind):
    if refuses(name, kind):
        return
    for options in MIXED.get(name, [{}]):
        model, x = tiny(kind), batches(1)[0]
        adapter = adapter_of(name, model, **options)
        adapter(x)
        exported = adapter.export()
        saved, plain = exported.state_dict(), copy.deepcopy(model).eval()
        if not hasattr(exported, MARK):
            plain.load_state_dict(saved)
        else:
            with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{MARK}"'):
                plain.load_state_dict(saved)
            plain.load_state_dict(saved, strict=False)
            assert not torch.allclose(plain(x), exported(x), atol=1e-4)
            plain = adapter_of(name, model, **options).export()
            plain.load_state_dict(saved)
        assert torch.equal(plain(x), exported(x))


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


@each
def test_half_precision(name):
    """Answers come in the type that the model answers in, and what adapts is in float32."""
    model, x = tiny(), batches(1)[0]
    adapter = adapter_of(name, model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = adapter(x), adapter.predict(x)
        assert model(x).dtype == torch.bfloat16
    assert all(each.isfinite().all() and each.dtype == torch.bfloat16 for each in mixed)
    for half in (torch.bfloat16, torch.float16):
        whole = adapter_of(name, tiny().to(half))
        for answer in (whole(x.to(half)), whole(x.to(half)), whole.predict(x.to(half))):
            assert answer.isfinite().all()
            assert answer.dtype == half
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


def test_events_are_told():
    told = []
    adapter = tt.adapt(tiny(), "tent", on_event=told.append)
    for x in batches(3):
        adapter(x)
    assert list(adapter.events) == told
    assert told[0].loss == pytest.approx(told[0].entropy)
    assert [event.step for event in told] == [1, 2, 3]
    assert told[0].used == told[0].samples == 16


BESIDE = {"adanpc": {"gamma": 1}, "domainadaptor": {"loss": "gem-aug"}}
"""What must be asked for so that all other options of a method matter."""


@pytest.mark.parametrize("name", tt.methods())
def test_every_number_that_is_an_option_makes_another_method(name):
    method, more = find("method", name), BESIDE.get(name, {})
    for option, default in method.options.items():
        if type(default) in (int, float) and option not in more:
            other = default / 2 or 0.5
            if isinstance(default, int):
                other = default // 3 if default > 6 else default + 1
            changed = method.build(**more, **{option: other})
            assert describe(changed) != describe(method.build(**more)), option


@pytest.mark.parametrize("name", tt.methods())
def test_the_value_that_an_option_is_said_to_have_is_its_default(name):
    method = find("method", name)
    args = inspect.getdoc(method.factory).partition("Args:")[2]
    for option, default in method.options.items():
        said = re.search(
            rf"^    {option}: (.*?)(?=^    \w+: |^$|\Z)", args, re.DOTALL | re.MULTILINE
        )
        told = re.findall(r"(?:^|; )(\d+(?:\.\d+)?(?:e-\d+|/\d+)?)", said[1])
        if told and default and type(default) in (int, float):  # 0 leaves something out
            assert default in [float(Fraction(each)) for each in told], option
