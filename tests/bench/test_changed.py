"""What a command names may change in the meantime: images, the code of a model, that of a method."""

import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from testtime._core import registry
from testtime._core.errors import InputError, RunError, WorkFailed
from testtime.bench.cells import plan
from testtime.bench.code_hash import code_hash
from testtime.bench.runner import run
from testtime.bench.store import piece, read_cell, read_run, write_cell
from testtime.cli.main import app
from testtime.streams.scenarios import Scenario

NET = """
from torch import nn
from shape import SIDE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3 * SIDE * SIDE, 2)
        nn.init.eye_(self.head.weight)

    def forward(self, x):
        return self.head(self.norm(nn.functional.avg_pool2d(x, 224 // SIDE)).flatten(1))

def build():
    return Net()
"""


def draw(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


@pytest.fixture
def place(tmp_path):
    for split in ("test", "train"):
        for number in range(4):
            draw(tmp_path / f"photos/{split}/cat/{number}.bmp", (200 + number, 9, number))
            draw(tmp_path / f"photos/{split}/dog/{number}.bmp", (9, 200, 70 * number))
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "shape.py").write_text("SIDE = 2\n")
    return tmp_path


@pytest.fixture
def go(place):
    def go(*methods, jobs=0, model="net.py@build"):
        """Which cells ran now, and how many were told to have changed."""
        told = []
        cells = plan(
            methods=list(methods), models=[f"file:{place}/{model}"], data=f"folder:{place}/photos",
            streams=[Scenario(domains=("fog",), batch_size=16)], seeds=1,
        )  # fmt: skip
        ran = []
        run(
            cells, place / "out", jobs=jobs, on_changed=told.append,
            on_done=lambda cell, _, now: ran.extend([cell.method] * now),
        )  # fmt: skip
        return ran, sum(told)

    return go


def repaint(place):
    """Other pixels, while name, size and time stay."""
    path = place / "photos/test/cat/2.bmp"
    before = path.stat()
    draw(path, (202, 9, 3))
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        repaint,
        lambda place: draw(place / "photos/test/dog/9.bmp", (0, 0, 0)),
        lambda place: (place / "photos/test/dog/1.bmp").unlink(),
        lambda place: (place / "photos/test/dog/3.bmp").rename(place / "photos/test/dog/7.bmp"),
        lambda place: (place / "photos/test/dog").rename(place / "photos/test/ape"),
        lambda place: (place / "net.py").write_text(NET.replace("avg_pool2d", "max_pool2d")),
        lambda place: (place / "shape.py").write_text("SIDE = 1 + 1\n"),
    ],
    ids=["repainted", "added", "removed", "renamed", "class", "code", "import"],
)
def test_cells_of_other_images_or_code_run_again(place, go, change):
    assert go("bn-adapt") == (["source", "bn-adapt"], 0)
    assert go("bn-adapt") == ([], 0)
    change(place)
    assert go("bn-adapt") == (["source", "bn-adapt"], 2)
    assert go("bn-adapt") == ([], 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda place: draw(place / "photos/test/cat/2.bmp", (0, 9, 3)), "images of folder"),
        (
            lambda place: (place / "photos/test/dog/1.bmp").unlink(missing_ok=True),
            "images of folder",
        ),
        (lambda place: (place / "net.py").write_text(f"{NET}\n"), r"the code of file:.*net\.py"),
    ],
    ids=["repainted", "removed", "code"],
)
def test_what_changes_while_a_run_goes_on_is_told(place, go, change, says):
    cells = plan(
        methods=["bn-adapt"], models=[f"file:{place}/net.py@build"], data=f"folder:{place}/photos",
        streams=[Scenario(domains=("fog",), batch_size=16)], seeds=1,
    )  # fmt: skip
    with pytest.raises(WorkFailed, match=f"{says}.* changed since the run began"):
        run(cells, place / "out", jobs=0, on_done=lambda *_: change(place))
    assert go("bn-adapt") == (["source", "bn-adapt"], 1)


def test_images_that_are_touched_while_a_run_goes_on_are_the_same(place):
    cells = plan(
        methods=["bn-adapt"], models=[f"file:{place}/net.py@build"], data=f"folder:{place}/photos",
        streams=[Scenario(domains=("fog",), batch_size=16)], seeds=1,
    )  # fmt: skip
    rows = run(
        cells, place / "out", jobs=0,
        on_done=lambda *_: (place / "photos/test/cat/2.bmp").touch(),
    )  # fmt: skip
    assert [row["method"] for row in rows] == ["source", "bn-adapt"]


@pytest.mark.parametrize("change", ["array", "file", None])
def test_corrupted_images_that_change_while_a_run_goes_on_are_told(place, change):
    root = place / "corrupted"
    if change == "file":
        for number in range(8):
            draw(root / f"fog/5/{'cat' if number < 4 else 'dog'}/{number}.bmp", (9, 30 * number, 9))
    else:
        root.mkdir()
        np.save(root / "fog.npy", np.zeros((40, 8, 8, 3), np.uint8))
        np.save(root / "labels.npy", np.arange(8) % 2)
    (place / "net.py").write_text(NET.replace("224 // SIDE", "4"))
    cells = plan(
        methods=["bn-adapt"], models=[f"file:{place}/net.py@build"], data=f"corrupted:{root}",
        streams=[Scenario(domains=("fog",), batch_size=8)], seeds=1,
    )  # fmt: skip

    def paint(*_):
        if change == "file":
            draw(root / "fog/5/cat/2.bmp", (0, 0, 0))
        elif change == "array":
            np.save(root / "fog.npy", np.ones((40, 8, 8, 3), np.uint8))

    if change is None:
        assert len(run(cells, place / "out", jobs=0, on_done=paint)) == 2
    else:
        with pytest.raises(WorkFailed, match=r"images of corrupted.* the same command again"):
            run(cells, place / "out", jobs=0, on_done=paint)


@pytest.fixture(params=["folders", "arrays"])
def before(request, place):
    """Images that were corrupted beforehand, of two domains, with clean and training images."""
    root = place / "corrupted"
    for number in range(4):
        for kind, colour in (("cat", (200 + number, 9, number)), ("dog", (9, 200, 70 * number))):
            name = f"{kind}/{number}.bmp"
            draw(root / "train" / name, colour)
            for folder in ("fog/5", "snow/5", "clean") * (request.param == "folders"):
                draw(root / folder / name, colour)
    if request.param == "arrays":
        pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
        np.save(root / "fog.npy", pixels)
        np.save(root / "snow.npy", pixels)
        np.save(root / "clean.npy", pixels[:8])
        np.save(root / "labels.npy", np.arange(8) % 2)
    (place / "net.py").write_text(NET.replace("224 // SIDE", "4"))
    return root


@pytest.fixture
def send(place, before):
    def send(*domains, methods=("bn-adapt",)):
        """Which cells ran now, and how many were told to have changed."""
        told, ran = [], []
        cells = plan(
            methods=list(methods), models=[f"file:{place}/net.py@build"], data=f"corrupted:{before}",
            streams=[Scenario(domains=(name,), batch_size=8) for name in domains], seeds=1,
        )  # fmt: skip
        run(
            cells, place / "out", jobs=0, on_changed=told.append,
            on_done=lambda cell, _, now: ran.extend([cell.method] * now),
        )  # fmt: skip
        return ran, sum(told)

    return send


def invert(root, name):
    """Other pixels of an image of a domain, of an array of the first one."""
    if (array := root / f"{name}.npy").exists():
        pixels = np.load(array)
        pixels[-8] = 255 - pixels[-8]  # at severity 5, or clean
        np.save(array, pixels)
        return
    folder = root / name if name in ("clean", "train") else root / name / "5"
    draw(folder / "cat/0.bmp", (1, 2, 3))


@pytest.mark.parametrize("name", ["fog", "clean"])
def test_corrupted_images_that_change_between_two_runs_are_run_again(send, before, name):
    assert send("fog") == (["source", "bn-adapt"], 0)
    assert send("fog") == ([], 0)
    invert(before, name)
    assert send("fog") == (["source", "bn-adapt"], 2)
    assert send("fog") == ([], 0)


def test_labels_of_corrupted_images_count_too(send, before):
    send("fog")
    if (labels := before / "labels.npy").exists():
        np.save(labels, 1 - np.load(labels))
    else:
        (before / "fog/5/dog").rename(before / "fog/5/ape")
        (before / "clean/dog").rename(before / "clean/ape")
    assert send("fog") == (["source", "bn-adapt"], 2)


def test_only_streams_that_send_changed_images_run_again(send, before, place):
    """Until it is asked for, nobody has looked at what the other stream sends."""
    send("fog", "snow")
    invert(before, "fog")
    assert send("fog") == (["source", "bn-adapt"], 2)
    with pytest.raises(RunError, match="2 of 4 cells are missing"):
        read_run(place / "out")
    assert send("snow") == ([], 0)
    assert len(read_run(place / "out")) == 4
    assert send("fog", "snow") == ([], 0)


def test_training_images_beside_corrupted_ones_count_for_who_sees_them(send, before):
    assert send("fog", methods=["bn-adapt", "eata"])[0] == ["source", "bn-adapt", "eata"]
    for path in before.rglob("*"):
        os.utime(path)
    assert send("fog", methods=["bn-adapt", "eata"]) == ([], 0)
    invert(before, "train")
    assert send("fog", methods=["bn-adapt", "eata"]) == (["eata"], 1)


def test_rows_from_before_corrupted_images_were_hashed_still_count(send, place):
    send("fog")
    for row in read_run(place / "out"):
        write_cell(place / "out", row["cell"], [row | {"data_sha256": None}])
    assert send("fog") == ([], 0)
    assert len(read_run(place / "out")) == 2


def test_what_a_cell_does_not_see_may_change(place, go):
    """Only a method that is told of the source sees the training images; and no one a note."""
    assert go("bn-adapt", "eata")[0] == ["source", "bn-adapt", "eata"]
    (place / "photos/test/cat/note.txt").write_text("mine")
    (place / "other.py").write_text("")
    assert go("bn-adapt", "eata") == ([], 0)
    draw(place / "photos/train/cat/9.bmp", (1, 2, 3))
    assert go("bn-adapt", "eata") == (["eata"], 1)


def test_processes_know_the_same(place, go):
    assert go("bn-adapt", jobs=2)[1] == 0
    assert go("bn-adapt") == ([], 0)


def test_a_report_does_not_mix_what_ran_on_other_images(place, go):
    go("bn-adapt", "tent")
    before = {row["method"]: row for row in read_run(place / "out")}
    repaint(place)
    assert go("bn-adapt") == (["source", "bn-adapt"], 2)
    with pytest.raises(RunError, match="1 of 3 cells are missing"):
        read_run(place / "out")
    shown = read_run(place / "out", partial=True)
    assert [row["method"] for row in shown] == ["source", "bn-adapt"]
    draw(place / "photos/test/cat/2.bmp", (202, 9, 2))
    assert go("bn-adapt", "tent") == (["source", "bn-adapt"], 2)  # tent's is good again
    assert {row["method"]: row for row in read_run(place / "out")}["tent"] == before["tent"]


def test_rows_of_earlier_versions_still_count(place, go):
    go("bn-adapt")
    for row in read_run(place / "out"):
        old = {k: v for k, v in row.items() if not k.endswith(("code_sha256", "data_sha256"))}
        write_cell(place / "out", row["cell"], [old])
    assert go("bn-adapt") == ([], 0)
    assert len(read_run(place / "out")) == 2


def test_images_that_are_gone_are_told_and_their_results_stay(place, go):
    go("bn-adapt")
    (place / "photos").rename(place / "away")
    with pytest.raises(InputError, match="photos is not a folder of images"):
        go("bn-adapt")
    assert len(read_run(place / "out")) == 2
    (place / "away").rename(place / "photos")
    assert go("bn-adapt") == ([], 0)


METHOD = """
from testtime._core.registry import register
from testtime.adaptation.recipe import Recipe
from helper import WORD

@register("method", paper="")
def mine():
    return Recipe()
"""


def test_another_code_of_a_method_runs_its_cells_alone_again(place, go, monkeypatch):
    (place / "mine.py").write_text(METHOD)
    (place / "helper.py").write_text("WORD = 1\n")
    registry.entries("method")
    monkeypatch.setattr(registry, "_entries", {k: dict(v) for k, v in registry._entries.items()})
    monkeypatch.syspath_prepend(str(place))
    try:
        import mine  # noqa: F401
    finally:
        for name in ("mine", "helper"):
            sys.modules.pop(name, None)
    assert go("mine", "bn-adapt")[0] == ["source", "mine", "bn-adapt"]
    (place / "helper.py").write_text("WORD = 2\n")
    assert go("mine", "bn-adapt") == (["mine"], 1)
    (place / "mine.py").write_text(METHOD + "\n")
    assert go("mine", "bn-adapt") == (["mine"], 1)


def test_code_is_followed_through_packages_and_not_through_others(tmp_path):
    own = tmp_path / "pack" / "deep" / "net.py"
    own.parent.mkdir(parents=True)
    own.write_text("from ..parts import a\ndef f():\n    import loose.b\nimport torch\n")
    files = ["pack/__init__.py", "pack/parts/a.py", "loose/b.py", "else.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    first = code_hash(own, tmp_path)
    for name in files:
        (tmp_path / name).write_text("1\n")
        assert (code_hash(own, tmp_path) != first) == (name != "else.py")
        (tmp_path / name).write_text("")
    assert code_hash(own, tmp_path) == first


@pytest.mark.slow
def test_the_command_line_says_so_in_one_line_and_gives_no_old_rows(place):
    words = [
        "bench", "--methods", "bn-adapt,tent", "--model", f"file:{place}/net.py@build", "--seeds",
        "1", "--data", f"folder:{place}/photos", "--stream", "continual,domains=fog,batch_size=16",
        "--out", str(place / "out"), "--json",
    ]  # fmt: skip
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "changed" not in first.stderr
    repaint(place)
    (place / "net.py").write_text(NET.replace("nn.BatchNorm2d(3)", "nn.Identity()"))
    again = CliRunner().invoke(app, words)  # nothing to adapt is left, so both methods fail
    assert again.exit_code == 1, again.output
    line = "images, model or method have changed: 3 of the finished cells run again\n"
    assert again.stderr.startswith(line)
    assert [row["method"] for row in json.loads(again.stdout)] == ["source"]


def test_a_folder_that_a_name_of_hugging_face_stands_for(tmp_path):
    from testtime.bench.watched import model_code_hash

    (tmp_path / "config.json").write_text("{}")
    first = model_code_hash(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    assert first not in (None, model_code_hash(f"hf:{tmp_path}"))
    assert model_code_hash("hf:google/vit-base-patch16-224") is None


def test_a_damaged_piece_is_not_told_as_a_change(place, go):
    go("bn-adapt")
    key = read_run(place / "out")[0]["cell"]
    piece(place / "out", key).write_bytes(b"?")
    assert read_cell(place / "out", key) is None
    assert go("bn-adapt") == (["source"], 0)
