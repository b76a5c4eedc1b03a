"""Calls that cannot be meant are refused with the way out."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import testtime as tt
from battery import ALL, WHOLE, adapter_of, each
from models import batches, tiny
from testtime._core.errors import (
    InputError,
    NeedsSource,
    OptionError,
    ScopeError,
    StateError,
    TesttimeWarning,
    UnknownName,
)
from testtime.adaptation.methods.tent import tent
from testtime.bench.models import load_model
from testtime.streams.data import load_data, stack
from testtime.streams.scenarios import Scenario, known_domains


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean tent"):
        tt.adapt(tiny(), "tnet")
    with pytest.raises(OptionError, match="did you mean lr"):
        tt.adapt(tiny(), "tent", lrr=1)


def test_a_method_that_needs_the_source_names_the_call():
    with pytest.raises(NeedsSource, match=r"tt.fit_source\(model, loader"):
        tt.adapt(tiny(), "eata")


def test_what_a_method_needs_hangs_on_its_options():
    assert tt.adapt(tiny(), "rmt", contrast=0.0)(batches(1)[0]).shape == (16, 5)
    with pytest.raises(NeedsSource, match=r"methods=\[vcotta\(warm_up=2\)\]"):
        tt.adapt(tiny(), "vcotta", warm_up=2)


def test_a_model_without_normalisation_is_refused():
    bare = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    for name in ("tent", "sar", "rotta"):
        with pytest.raises(ScopeError, match="has none"):
            tt.adapt(bare, name)
    assert tt.adapt(bare, "lame")(batches(1)[0]).shape == (16, 5)


@each
def test_a_type_that_the_model_does_not_take_is_refused_at_any_time(name):
    adapter = adapter_of(name)
    x = batches(1)[0]
    for _ in range(2):
        with pytest.raises(InputError, match="float64"):
            adapter(x.double())
        adapter(x)


def test_pixels_out_of_range_are_refused_where_copies_are_made():
    for name in {"rotta", "roid", "vcotta", "tesla", *WHOLE} - {"sqrl"}:
        with pytest.raises(InputError, match="normalisation inside the model"):
            adapter_of(name)(batches(1)[0] * 4 - 2)


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
        ("tent", {"lr": 10**5000}),
        ("tent", {"steps": -(10**5000)}),
        ("tent", {"steps": 10**400}),
        ("rotta", {"capacity": 2**63}),
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
        (lambda: tt.adapt(nn.ModuleList([tiny()]), "tent"), ScopeError, "ModuleList.* no forward"),
        (lambda: tt.adapt(tiny(), 3), OptionError, "expected a name or a recipe"),
        (lambda: tt.adapt(tiny(), tent), OptionError, r"tt.adapt\(model, tent\(\)\)"),
        (lambda: tt.adapt(tiny(), "tent", on_event=3), OptionError, "on_event"),
        (
            lambda: tt.adapt(tiny(), "cotta", seed=None),
            OptionError,
            "seed is None; expected a whole",
        ),
        (
            lambda: tt.adapt(tiny(), "cotta", seed=1.5),
            OptionError,
            r"seed is 1\.5; expected a whole",
        ),
        (
            lambda: tt.adapt(tiny(), "tent", process_group=-100),
            OptionError,
            "process_group is -100",
        ),
        (lambda: tt.adapt(tiny(), "eata", source="file"), OptionError, "SourceKnowledge.load"),
        (lambda: tt.adapt(torch.jit.script(tiny()), "tent"), ScopeError, "scripted"),
        (lambda: tt.adapt(nn.LazyLinear(2), "tent"), ScopeError, "no shape yet"),
        (lambda: tt.adapt(tiny().to("meta"), "tent"), ScopeError, "no values"),
        (lambda: tt.adapt(in_inference_mode(), "tent"), ScopeError, "inference_mode"),
        (lambda: tt.SourceKnowledge.load("nowhere"), StateError, "there is no file nowhere"),
        (lambda: tt.fit_source(tiny(), [torch.full((2, 3, 8, 8), math.nan)]), InputError, "NaN"),
        (lambda: copy.deepcopy(tt.adapt(tiny(), "tent")), StateError, "neither copied nor pickled"),
        (lambda: tt.adapt(tiny(), "deyo", patches=9)(batches(1)[0]), InputError, "fewer patches"),
    ],
)
def test_wrong_calls_are_answered_with_the_way_out(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_model_may_be_called_without_a_forward():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny()

        def __call__(self, x):
            return self.inner(x)

    x = batches(1)[0]
    assert torch.equal(tt.adapt(Called(), "tent")(x), tt.adapt(tiny(), "tent")(x))


def test_what_a_loader_gives_is_told_from_a_batch():
    adapter = tt.adapt(tiny(), "tent")
    with pytest.raises(InputError, match="pass the inputs alone"):
        adapter((batches(1)[0], torch.zeros(16)))


@pytest.mark.parametrize(
    ("given", "way"),
    [
        (batches(1)[0].numpy(), r"torch\.as_tensor\(x\)"),
        (iter(batches(1)), "one by one"),
        (DataLoader(TensorDataset(*batches(1))), "one by one"),
        ({"pixel_values": batches(1)[0]}, "put a module around it"),
    ],
)
def test_what_is_no_tensor_is_answered_with_the_way_to_one(given, way):
    with pytest.raises(InputError, match=way):
        tt.adapt(tiny(), "tent")(given)


def test_a_type_that_is_not_the_weights_is_named():
    with pytest.raises(InputError, match=r"weights are of type torch.float32; give the batch"):
        tt.adapt(tiny(), "tent")(batches(1)[0].half())


@pytest.mark.parametrize("mark", [3, "state.safetensors", None])
def test_a_mark_that_is_no_snapshot_is_refused(mark):
    with pytest.raises(StateError, match=r"expected what adapter.snapshot\(\) gave"):
        tt.adapt(tiny(), "tent").restore(mark)


def test_a_state_of_other_options_says_which(tmp_path):
    saved = tt.adapt(tiny(), "tent", lr=0.5)
    saved.save(tmp_path / "state.safetensors")
    says = r"method: it has optimizer=Adam\(lr=0.5, .* and this adapter optimizer=Adam\(lr=0.1, .*\. Build"
    for adapt in ("load", "restore"):
        given = tmp_path / "state.safetensors" if adapt == "load" else saved.snapshot()
        with pytest.raises(StateError, match=says):
            getattr(tt.adapt(tiny(), "tent", lr=0.1), adapt)(given)


def test_probabilities_in_place_of_logits_are_warned_of():
    probable = nn.Sequential(tiny(), nn.Softmax(1)).eval()
    with pytest.warns(TesttimeWarning, match="seems to return probabilities"):
        tt.adapt(probable, "tent")(batches(1)[0])
    tt.adapt(nn.Sequential(tiny(), nn.LogSoftmax(1)).eval(), "tent")(batches(1)[0])  # says nothing


def test_what_only_a_module_has_is_answered_with_the_way_out():
    adapter = tt.adapt(tiny(), "tent")
    for name in ("eval", "to", "parameters", "state_dict", "cuda"):
        with pytest.raises(AttributeError, match=rf"no attribute '{name}'\. It is no module"):
            getattr(adapter, name)
    with pytest.raises(AttributeError, match=r"no attribute 'predikt'$"):
        adapter.predikt  # noqa: B018
    assert not hasattr(adapter, "train")


def test_inputs_of_another_scale_than_in_training_are_warned_of():
    """But no corruption is, at the highest severity."""
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    x = stack(data, range(8))[0]
    with pytest.warns(TesttimeWarning, match=r"stem\.1, gets values .* on another scale"):
        tt.adapt(model, "tent")(x * 255)
    domains = "+".join(known_domains())
    for batch in Scenario.parse(f"continual,samples=2,domains={domains}").stream(data):
        tt.adapt(model, "source")(batch.inputs)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    tt.adapt(fresh, "tent")(batches(1)[0] * 1e4)  # was never trained
