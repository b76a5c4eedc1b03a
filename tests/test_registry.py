"""What others may register, and what is refused before it is in anybody's way."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import testtime as tt
from testtime._core import registry
from testtime._core.errors import OptionError, UnknownName
from testtime.adaptation.methods.tent import tent

MODEL = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    registry.entries("method")
    monkeypatch.setitem(registry._entries, "method", dict(registry._entries["method"]))


def test_a_function_without_annotations_gets_its_name_and_options():
    @tt.register("method")
    def mine_too(*, lr=1e-3):
        """Tent by another name."""
        return tent(lr=lr)

    assert tt.methods()["mine-too"].options == {"lr": 1e-3}
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    answers = [tt.adapt(MODEL, name, lr=0.1) for name in ("mine-too", "tent")]
    for _ in range(2):
        first, second = (adapter(x) for adapter in answers)
    assert torch.equal(first, second)


def test_a_function_that_is_defined_anew_takes_the_place_of_the_old_one():
    for rate in (0.1, 0.2):
        tt.register("method", name="mine")(lambda *, lr=rate: tent(lr=lr))
        assert tt.methods()["mine"].options == {"lr": rate}
        assert tt.adapt(MODEL, "mine").recipe.optimizer.lr == rate


def _nothing(*, lr: float = 1.0) -> None:
    return None


@pytest.mark.parametrize(
    ("what", "name", "says"),
    [
        (lambda lr: tent(lr=lr), "a", "has no default"),
        (lambda lr=1, /: tent(lr=lr), "a", "has no default or no name"),
        (lambda **options: tent(lr=options["lr"]), "a", "has no default"),
        (lambda: tent(lr=1.0), "", "<lambda>.*is no name"),
        (_nothing, "a b", "'a b' is no name"),
        (_nothing, "a(lr=1)", "is no name"),
        (_nothing, "tent", "two owners"),
        (partial(lambda *, lr: tent(lr=lr)), "a", "has no default"),
        (3, "a", "expected a function that makes a method"),
    ],
)
def test_what_nobody_could_ask_for_is_refused_and_leaves_no_trace(what, name, says):
    before = tt.methods().keys()
    with pytest.raises(OptionError, match=says):
        tt.register("method", name=name)(what)
    assert tt.methods().keys() == before


def test_an_unknown_kind_is_refused():
    with pytest.raises(UnknownName, match=r"methods.*method"):
        tt.register("methods")


def test_a_method_that_makes_no_recipe_says_so():
    tt.register("method", name="nothing")(_nothing)
    with pytest.raises(tt.TesttimeError, match="nothing"):
        tt.adapt(MODEL, "nothing")


def test_a_name_of_the_library_is_taken_before_it_was_asked_for():
    script = """
import testtime as tt
try:
    tt.register("method", name="sar")(lambda: None)
except tt.TesttimeError as error:
    assert "two owners" in str(error)
    tt.methods()["sar"]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_loaded_late_is_listed():
    """For those who type `tt.` and wait for names."""
    code = "import testtime as tt; print(set(tt.__all__) - set(dir(tt)), 'torch' in __import__('sys').modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() False"
