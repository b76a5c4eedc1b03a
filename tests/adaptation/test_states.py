"""A stream goes on from a snapshot or a file as if it had never stopped, and from no other's."""

import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import testtime as tt
from battery import ALL, adapter_of, alike, each
from models import Headed, batches, tiny
from testtime._core.errors import StateError
from testtime._core.files import digest
from testtime.adaptation.knowledge import fingerprint
from testtime.adaptation.resuming import owner
from testtime.adaptation.state import save_state


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
    xs = batches(6, 8)
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


@cache
def first_snapshot(name):
    return adapter_of(name).snapshot()


@each
def test_snapshots_of_other_methods_and_models_are_refused(name):
    adapter = adapter_of(name)
    adapter(batches(1)[0])
    mine = adapter.snapshot()
    for other in set(ALL) - {name}:
        with pytest.raises(StateError, match="another method"):
            adapter.restore(first_snapshot(other))
    if mine.tensors:
        wrapped = adapter_of(name, Headed(tiny()).eval())
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


@each
def test_what_was_made_in_inference_mode_learns_outside_of_it(name, tmp_path):
    model, xs = tiny().to(torch.bfloat16), [x.to(torch.bfloat16) for x in batches(2)]
    expected = [adapter_of(name, copy.deepcopy(model))(x) for x in xs[:1]]
    with torch.inference_mode():
        adapter = adapter_of(name, model)
        assert alike(adapter(xs[0]), expected[0])
        adapter.save(tmp_path / "state")
        adapter.reset()
    assert alike(adapter(xs[0]), expected[0])
    expected = adapter(xs[1])
    with torch.inference_mode():
        adapter.load(tmp_path / "state")
        copied = adapter.export()
    assert alike(adapter(xs[1]), expected)
    assert not any(p.is_inference() for p in copied.parameters())


def test_what_is_loaded_begins_in_memory_where_torch_would_begin_it(tmp_path):
    """Kernels round by it, so that answers would differ in the last bit."""
    for length in range(1, 9):  # the file's own beginning is as long as the method's text
        adapter = tt.adapt(tiny(), "tent", lr=float("0." + "1" * length))
        adapter(batches(1)[0])
        adapter.save(tmp_path / "state")
        adapter.load(tmp_path / "state")
        assert not any(t.data_ptr() % 64 for t in adapter.snapshot().tensors.values())


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("tent", "tensors"), ("adanpc", "beside"), ("rotta", "averages"), ("cotta", "teacher"),
        ("rotta", "teacher_averages"),
    ],
)  # fmt: skip
def test_a_state_that_holds_what_is_no_number_is_refused_wherever_that_is(name, field):
    adapter = adapter_of(name, **({"gamma": 2} if name == "adanpc" else {}))
    adapter(batches(1)[0])
    mark = adapter.snapshot()
    held = getattr(mark, field)
    last = list(held)[-1]
    for wrong in (math.nan, math.inf):
        spoilt = {**held, last: held[last] + wrong}
        with pytest.raises(StateError, match=f"NaN or infinite values of {last}"):
            adapter.restore(replace(mark, **{field: spoilt}))
    assert adapter.snapshot() is mark


@pytest.mark.parametrize("other", [lambda t: t[1:], lambda t: t.to("meta")])
def test_a_state_of_other_shapes_or_of_another_device_is_refused(other):
    adapter = adapter_of("tent")
    adapter(batches(1)[0])
    mark = adapter.snapshot()
    spoilt = {**mark.tensors, "norm2.bias": other(mark.tensors["norm2.bias"])}
    with pytest.raises(StateError, match=r"another model: it adapts norm2.bias of shape"):
        adapter.restore(replace(mark, tensors=spoilt))
    assert adapter.snapshot() is mark


def test_what_is_loaded_lies_in_memory_as_it_did(tmp_path):
    """Kernels round by that, too."""
    model = tiny().to(memory_format=torch.channels_last)
    adapter = tt.adapt(model, "cotta", views=2, restore=0.0)
    adapter(batches(1)[0])
    turned = adapter.snapshot().tensors["conv2.weight"].mT
    adapter.restore(replace(adapter.snapshot(), memory={"turned": turned, "part": turned[:, ::2]}))
    mark = adapter.snapshot()
    adapter.save(tmp_path / "state")
    adapter.load(tmp_path / "state")
    now = adapter.snapshot()
    strides = {name: t.stride() for name, t in mark.tensors.items()}
    assert strides["conv2.weight"] != torch.empty(8, 6, 3, 3).stride()
    assert {name: t.stride() for name, t in now.tensors.items()} == strides
    assert now.memory["turned"].stride() == turned.stride()
    assert alike(now.memory, mark.memory)


def test_chance_of_a_state_without_steps_is_its_own():
    xs = batches(3, 8)
    first, second = (
        adapter_of("deyo", blocks_registered_backwards(), seed=seed, entropy_margin=0.9)
        for seed in (1, 2)
    )
    mark = first.snapshot()
    second.restore(mark)  # before a batch has shown in which order layers run
    assert not torch.equal(mark.generator, adapter_of("deyo").snapshot().generator)
    for x in xs:
        assert torch.equal(second(x), first(x))
        assert torch.equal(second.snapshot().generator, first.snapshot().generator)
    assert not torch.equal(second.snapshot().generator, mark.generator)


def test_a_state_of_a_version_that_knew_more_is_refused(tmp_path):
    adapter = tt.adapt(tiny(), "tent")
    adapter(batches(1)[0])
    later = replace(adapter.snapshot())
    vars(later)["mood"] = {"good": torch.ones(2)}
    save_state(later, tmp_path / "state", owner=owner(adapter.model, adapter.recipe))
    mark = adapter.snapshot()
    with pytest.raises(StateError, match=r"another version .* mood"):
        adapter.load(tmp_path / "state")
    assert adapter.snapshot() is mark
