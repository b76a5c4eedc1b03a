"""Models that a file of the user's own makes, on a folder of the user's own images."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from testtime._core.errors import InputError
from testtime.adaptation.knowledge import fingerprint
from testtime.bench.models import load_model
from testtime.cli.main import app

NET = """
import torch
from torch import nn
from shape import WIDTH

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AvgPool2d(32), nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Flatten(), nn.Linear(WIDTH * 25, 3)
    )

def number():
    return 3

def broken():
    return no_such_name

def leaves():
    raise SystemExit("enough")

def lazy():
    return nn.LazyLinear(2)
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    (tmp_path / "shape.py").write_text("WIDTH = 4\n")
    return path


@pytest.fixture
def bench(tmp_path):
    for name, colour in (("blue", 255), ("red", 90), ("yellow", 10)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (300, 260), (colour, number, 255 - colour)).save(
                folder / f"{number}.png"
            )

    def bench(*models, jobs=1, run=None):
        return (run or CliRunner().invoke)(app, [
            "bench", "--methods", "tent", "--model", ",".join(models), "--seeds", "1", "--json",
            "--data", f"folder:{tmp_path / 'images'}", "--stream", "continual,domains=fog,batch_size=6",
            "--out", str(tmp_path / "run"), "--jobs", str(jobs),
        ])  # fmt: skip

    return bench


def test_a_file_that_makes_a_model_runs_on_a_folder(net, bench):
    done = bench(f"file:{net}@build")
    assert done.exit_code == 0, done.output
    assert [row["method"] for row in json.loads(done.stdout)] == ["source", "tent"]


def test_paths_are_read_from_where_the_command_is_given(net, bench, tmp_path, monkeypatch):
    """Also by a server of processes that was started elsewhere, and whatever letters are in them."""
    (tmp_path / "a, b@c").mkdir()
    for name in ("net.py", "shape.py"):
        (tmp_path / name).rename(tmp_path / "a, b@c" / name)
    for folder, path in ((tmp_path, "a, b@c/net.py"), (tmp_path / "a, b@c", "net.py")):
        monkeypatch.chdir(folder)
        done = bench(f"file:{path}@build", jobs=2)
        assert done.exit_code == 0, done.output
        assert {row["model"] for row in json.loads(done.stdout)} == {f"file:{path}@build"}


@pytest.mark.slow
def test_what_a_model_prints_is_no_result(net, bench):
    net.write_text(
        "print('loaded')\n" + NET + "\ninner = build\n"
        "def build():\n    print('built')\n    return nn.Sequential(Loud(), inner())\n"
        "class Loud(nn.Module):\n"
        "    def forward(self, x):\n        print('run')\n        return x\n"
    )

    def whole(_, words):  # with the processes that it starts
        call = [sys.executable, "-c", "from testtime.cli.main import app; app()", *words]
        return subprocess.run(call, capture_output=True, text=True, check=True)

    done = bench(f"file:{net}@build", run=whole)
    assert len(json.loads(done.stdout)) == 2
    assert all(f"{word}\n" in done.stderr for word in ("loaded", "built", "run"))


def test_modules_beside_a_file_are_its_own(net, tmp_path, monkeypatch):
    """Not those of another folder, not old ones; what is loaded already under their name stays."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "net.py").write_text(NET)
    (other / "shape.py").write_text("WIDTH = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        import shape

        for place, width in ((net, 4), (other / "net.py", 2), (net, 4)):
            assert load_model(f"file:{place}@build")[1].out_channels == width
        (tmp_path / "shape.py").write_text("WIDTH = 1 + 2\n")
        assert load_model(f"file:{net}@build")[1].out_channels == 3
        assert sys.modules["shape"] is shape
        assert shape.WIDTH == 4
    finally:
        sys.modules.pop("shape", None)


def test_a_model_may_import_those_beside_it_when_it_runs(net, bench):
    net.write_text(
        NET.replace("nn.Flatten()", "Flat()") + "\nclass Flat(nn.Module):\n"
        "    def forward(self, x):\n        from shape import WIDTH\n"
        "        import late\n        return late.flat(x)\n"
    )
    net.with_name("late.py").write_text("def flat(x):\n    return x.flatten(1)\n")
    done = bench(f"file:{net}@build")
    assert done.exit_code == 0, done.output
    assert not {"shape", "late"} & sys.modules.keys()


def test_a_file_that_changes_everything_changes_nothing(net, monkeypatch):
    net.write_text(
        "import os, random, sys, numpy, torch\ntorch.set_default_device('meta')\n"
        "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\nos.chdir('/')\n"
        "random.seed(3)\nnumpy.random.seed(3)\ntorch.set_num_threads(7)\nsys.path.append('x')\n"
        + NET
    )

    def state():
        return (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), Path.cwd(),
            random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads(),  # noqa: NPY002
            torch.get_rng_state().tolist(), list(sys.path), torch.ones(1).device,
        )  # fmt: skip

    before = state()
    load_model(f"file:{net}@build")
    assert state() == before
    assert not list(net.parent.rglob("*.pyc"))


def test_weights_that_are_drawn_are_the_same_in_each_cell(net, bench):
    net.write_text(NET.replace("torch.manual_seed(0)", "pass"))
    torch.manual_seed(1)
    first = fingerprint(load_model(f"file:{net}@build"))
    torch.manual_seed(2)
    assert fingerprint(load_model(f"file:{net}@build")) == first
    net.write_text(NET.replace("torch.manual_seed(0)", "torch.seed()"))
    done = bench(f"file:{net}@build")
    assert done.exit_code == 2
    assert "drawn anew at each call" in done.stderr


@pytest.mark.parametrize(
    ("path", "name", "says"),
    [
        (
            "net.py",
            "nothing",
            r"made no model: KeyError: 'nothing'.*Expected a function nothing\(\)",
        ),
        ("net.py", "number", "returned a int; expected a module"),
        ("net.py", "broken", "made no model: NameError: .*no_such_name"),
        ("net.py", "leaves", "made no model: SystemExit: enough"),
        ("net.py", "lazy", "lazy layers .* run a batch through"),
        ("away.py", "build", "there is no file .*away.py; expected Python with a function build"),
    ],
)
def test_what_makes_no_model_is_told(path, name, says, net):
    with pytest.raises(InputError, match=says):
        load_model(f"file:{net.parent / path}@{name}")
