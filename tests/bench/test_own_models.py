"""Models that a file of the user's own makes, on a folder of the user's own images."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from testtime._core.errors import InputError
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
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    (tmp_path / "shape.py").write_text("WIDTH = 4\n")
    return path


def test_a_file_that_makes_a_model_runs_on_a_folder(net, tmp_path):
    for name, colour in (("blue", 255), ("red", 90), ("yellow", 10)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (300, 260), (colour, number, 255 - colour)).save(
                folder / f"{number}.png"
            )
    call = [
        "bench", "--methods", "tent", "--model", f"file:{net}@build", "--seeds", "1",
        "--data", f"folder:{tmp_path / 'images'}", "--stream", "continual,domains=fog,batch_size=6",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "tent" in done.output


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
        ("away.py", "build", "there is no file .*away.py; expected Python with a function build"),
    ],
)
def test_what_makes_no_model_is_told(path, name, says, net):
    with pytest.raises(InputError, match=says):
        load_model(f"file:{net.parent / path}@{name}")
