"""Images that were corrupted beforehand, in the layouts of CIFAR-10-C and of ImageNet-C."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from testtime._core.errors import InputError, OptionError
from testtime.cli.main import app
from testtime.streams.data import labels_of, load_data, stack
from testtime.streams.recorded import Recorded
from testtime.streams.scenarios import Scenario

SIZE = 6


def array(mark, *, severities=(1, 2, 3, 4, 5)):
    """SIZE images for each severity, whose red says which, green the severity, blue the domain."""
    pixels = np.zeros((len(severities) * SIZE, 8, 8, 3), np.uint8)
    for row, severity in enumerate(severities):
        for number in range(SIZE):
            pixels[row * SIZE + number] = (number, severity, mark)
    return pixels


@pytest.fixture
def arrays(tmp_path):
    """The layout of CIFAR-10-C."""
    np.save(tmp_path / "fog.npy", array(10))
    np.save(tmp_path / "snow.npy", array(20))
    np.save(tmp_path / "clean.npy", array(0, severities=[0]))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(SIZE) % 3, 5))
    return tmp_path


@pytest.fixture
def folders(tmp_path):
    """The layout of ImageNet-C, as it is unpacked: groups of domains; clean images are larger."""
    for place, mark in (("weather/fog", 10), ("weather/snow", 20)):
        for severity in range(1, 6):
            for number in range(SIZE):
                save(tmp_path / place / str(severity), number, (number, severity, mark), (8, 8))
    for number in range(SIZE):
        save(tmp_path / "clean", number, (number, 0, 0), (20, 14))
    return tmp_path


def save(folder, number, colour, size):
    folder = folder / f"n0{number % 3}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / f"{number}.png")


@pytest.fixture(params=["arrays", "folders"])
def root(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("words", ["continual,severity=3", "gradual", "mixed", "sorted,recurring"])
def test_each_sample_comes_from_its_domain_and_severity(root, words):
    data = load_data(f"corrupted:{root}")
    stream = Scenario.parse(f"{words},domains=fog+clean+snow,batch_size=4").stream(data, seed=1)
    sent = stream.order()
    batches = list(stream)
    pixels = torch.cat([b.inputs for b in batches]).mul(255).round()[:, :, 4, 4].tolist()
    labels = torch.cat([b.labels for b in batches]).tolist()
    assert len({(s.domain, s.severity) for s in sent}) == (11 if words == "gradual" else 3)
    mark = {"fog": 10, "clean": 0, "snow": 20}
    numbers = [number for number, _, _ in pixels]
    assert pixels == [[n, s.severity, mark[s.domain]] for n, s in zip(numbers, sent, strict=True)]
    assert (
        [n % 3 for n in numbers] == labels == labels_of(data)[[s.position for s in sent]].tolist()
    )


def test_clean_images_are_brought_to_the_size_of_the_others(folders):
    data = Recorded(folders)
    assert stack(data, [0])[0].shape == stack(data.at("fog", 1), [0])[0].shape == (1, 3, 8, 8)
    assert data.domains == ("fog", "snow")


def test_training_images_are_brought_to_that_size(root):
    with pytest.raises(InputError, match="no folder train"):
        load_data(f"corrupted:{root}", split="train")
    save(root / "train", 4, (9, 0, 0), (40, 30))
    save(root / "train", 5, (7, 0, 0), (8, 8))  # is left as it is
    images, labels = stack(load_data(f"corrupted:{root}", split="train"), [0, 1])
    assert images.shape == (2, 3, 8, 8)
    assert labels.tolist() == [0, 1]
    assert images[:, 0, 4, 4].mul(255).round().tolist() == [9, 7]
    assert load_data(f"corrupted:{root}").domains == ("fog", "snow")


def test_what_is_not_there_is_said_before_the_first_batch(root):
    data = load_data(f"corrupted:{root}")
    with pytest.raises(InputError, match=r"no images of the domain frost.*domains=fog\+snow"):
        Scenario.parse("continual,domains=fog+frost").stream(data)
    with pytest.raises(OptionError, match="unknown=class:8"):
        Scenario.parse("continual,domains=fog,open-set").stream(data)
    stream = Scenario.parse("continual,domains=fog,unknown=class:2").stream(data)
    assert -1 in torch.cat([batch.labels for batch in stream])


@pytest.mark.parametrize("domain", ["fog", "weather/fog"])
def test_classes_may_be_numbers(tmp_path, domain):
    for place in (f"{domain}/1", f"{domain}/2", "clean", "train"):
        for number in (1, 2, 10):
            folder = tmp_path / place / str(number)
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "a.png")
    data = Recorded(tmp_path)
    assert data.domains == ("fog",)
    assert data.classes == ["1", "2", "10"]
    images, labels = stack(data.at("fog", 2), range(3))
    red = images[:, 0, 0, 0].mul(255).round().int().tolist()
    assert [data.classes[label] for label in labels] == [f"{number}" for number in red]
    assert sorted(red) == [1, 2, 10]
    assert len(load_data(f"corrupted:{tmp_path}", split="train")) == 3


def test_a_severity_that_is_missing(folders):
    for file in (folders / "weather" / "fog" / "2").rglob("*.png"):
        file.unlink()
    for folder in sorted((folders / "weather" / "fog" / "2").rglob("*"), reverse=True):
        folder.rmdir()
    (folders / "weather" / "fog" / "2").rmdir()
    with pytest.raises(InputError, match="no severity 2; it has 1, 3, 4, 5"):
        Scenario.parse("continual,domains=fog,severity=2").stream(Recorded(folders))
    (folders / "weather" / "snow" / "5" / "n01" / "4.png").unlink()
    with pytest.raises(InputError, match=r"4\.png cannot be read"):
        list(Scenario.parse("continual,domains=snow").stream(Recorded(folders)))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("fog", array(1).astype(np.float32), "expected bytes"),
        ("snow", array(1, severities=[1, 2]), "holds 12 images; expected 30"),
        ("labels", np.arange(7), "one for each of 6 images"),
        ("fog", np.array([{}]), "may run code"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, name, content, match):
    np.save(arrays / f"{name}.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=match):
        Scenario.parse("continual,domains=fog+snow").stream(Recorded(arrays))


def test_an_empty_folder_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r"DOMAIN\.npy and labels\.npy"):
        load_data(f"corrupted:{tmp_path}")


NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, {}))
"""


def bench(root, classes, out):
    (root / "net.py").write_text(NET.format(classes))
    return CliRunner().invoke(app, [
        "bench", "--methods", "tent", "--model", f"file:{root / 'net.py'}@build", "--seeds", "1", "--json",
        "--data", f"corrupted:{root}", "--stream", "continual,domains=fog+snow,batch_size=4",
        "--out", str(out),
    ])  # fmt: skip


@pytest.mark.parametrize("clean", [True, False])
def test_a_run_on_them(arrays, tmp_path, clean):
    if not clean:
        (arrays / "clean.npy").unlink()
    done = bench(arrays, 3, tmp_path / "run")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert {(row["method"], row["domain"]) for row in rows} == {
        (m, d) for m in ("source", "tent") for d in ("fog", "snow")
    }
    assert [row["clean_error"] is not None for row in rows] == [clean] * 4
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run")]).exit_code == 0


def test_folders_of_other_classes_than_the_model_has_are_refused(folders, tmp_path):
    done = bench(folders, 10, tmp_path / "run")
    assert done.exit_code != 0
    assert "3 folders of classes" in done.stderr
    assert "10 classes" in done.stderr
