"""Images of a folder in the size that a model was made for, or that is named."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.transforms.functional import pil_to_tensor
from typer.testing import CliRunner

from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.bench.cells import plan
from testtime.bench.models import shown_to
from testtime.bench.trial import run_cell
from testtime.cli.main import app
from testtime.streams.data import load_data, stack
from testtime.streams.scenarios import Scenario

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 28 * 28, 2))
"""


MIDDLE = {"do_center_crop": True, "crop_size": {"height": 48, "width": 48}}


@pytest.fixture
def photos(tmp_path):
    for number, size in enumerate([(400, 310), (310, 400), (70, 90), (32, 32)]):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
    return tmp_path / "photos"


def images(data):
    found = load_data(data)
    return [Image.open(path).convert("RGB") for path, _ in found.samples], stack(found, range(4))[0]


@pytest.mark.parametrize(
    "name", ["inception_v3", "resnet50", "resnet50/IMAGENET1K_V1", "swin_v2_t"]
)
def test_images_are_shown_as_torchvision_shows_them(photos, name):
    files, ours = images(shown_to(f"torchvision:{name}", f"folder:{photos}"))
    arch, _, wanted = name.partition("/")
    shown = models.get_model_weights(arch)[wanted or "DEFAULT"].transforms()
    shown.mean, shown.std = [0.0] * 3, [1.0] * 3
    assert torch.equal(ours, torch.stack([shown(file) for file in files]))


@pytest.mark.parametrize("name", ["inception_v3", "resnet50", "efficientnet_b3", "vit_base_patch16_siglip_256"])  # fmt: skip
def test_images_are_shown_as_timm_shows_them(photos, name):
    timm = pytest.importorskip("timm")
    files, ours = images(shown_to(f"file:weights.pt@timm:{name}", f"folder:{photos}"))
    about = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    shown = timm.data.create_transform(**about | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    assert torch.equal(ours, torch.stack([shown(file) for file in files]))


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_mode": "border"},
        {"crop_mode": "border", "crop_pct": 1.0},
        {"crop_mode": "squash", "crop_pct": 0.9},
        {"input_size": (3, 48, 80)},
        {"crop_mode": "squash", "input_size": (3, 48, 80), "crop_pct": 1.0},
    ],
)
def test_images_are_shown_as_timm_shows_them_in_ways_of_its_own(photos, monkeypatch, changes):
    timm = pytest.importorskip("timm")
    known = timm.get_pretrained_cfg("resnet18")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: replace(known, **changes))
    data = shown_to("timm:resnet18", f"folder:{photos}")
    assert data == f"folder:{photos}@timm:resnet18"
    assert shown_to("torchvision:inception_v3", data) == data
    files, ours = images(data)
    shown = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=replace(known, **changes).to_dict())
    )
    mean, std = (torch.tensor(own).view(3, 1, 1) for own in (known.mean, known.std))
    theirs = torch.stack([shown(file) * std + mean for file in files])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"size": {"height": 48, "width": 48}, "resample": 2}, "@48,squash,bilinear"),
        ({"size": {"shortest_edge": 56}, "resample": 3, **MIDDLE}, "@48,56,bicubic"),
        ({"size": {"height": 56, "width": 56}, "resample": 3, **MIDDLE}, ""),
        ({"size": {"height": 48, "width": 40}, "resample": 3}, ""),
        ({"size": {"height": 48, "width": 48}, "resample": 3, "do_resize": False}, ""),
    ],
)
def test_images_are_shown_as_hugging_face_says(photos, tmp_path, said, words):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "net").mkdir()
    kind = "CLIPImageProcessor" if "do_center_crop" in said else "ViTImageProcessor"
    about = {"image_processor_type": kind, "do_resize": True, **said}
    (tmp_path / "net/preprocessor_config.json").write_text(json.dumps(about))
    data = shown_to(f"hf:{tmp_path / 'net'}", f"folder:{photos}")
    assert data == f"folder:{photos}{words}"
    if words:
        files, ours = images(data)
        read = transformers.AutoImageProcessor.from_pretrained(tmp_path / "net")
        theirs = read(files, do_normalize=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 255)


def test_a_named_size_is_that_of_the_whole_image(photos):
    files, ours = images(f"folder:{photos}@32")
    assert ours.shape == (4, 3, 32, 32)
    at = next(i for i, file in enumerate(files) if file.size == (32, 32))
    assert torch.equal(ours[at], pil_to_tensor(files[at]) / 255)
    assert images(f"folder:{photos}@64,80,nearest")[1].shape == (4, 3, 64, 64)
    (photos.parent / "me@32").mkdir()
    photos.rename(photos.parent / "me@32/photos")
    assert images(f"folder:{photos.parent}/me@32/photos")[1].shape == (4, 3, 224, 224)
    (photos.parent / "me@32/photos").rename(photos.parent / "photos@32")
    assert images(f"folder:{photos.parent}/photos@32/")[1].shape == (4, 3, 224, 224)


def test_wrong_sizes_are_refused(photos):
    with pytest.raises(OptionError, match="crop is 0"):
        load_data(f"folder:{photos}@0")
    with pytest.raises(UnknownName, match="bilinear"):
        load_data(f"folder:{photos}@32,32,bilinaer")


def test_results_of_other_sizes_are_those_of_other_cells(photos):
    names = ["torchvision:resnet18", "torchvision:inception_v3", "file:net.py@build"]

    def cells(data):
        return plan(methods=[], models=names, data=data, streams=[Scenario()], seeds=1)

    plain, named = cells(f"folder:{photos}"), cells(f"folder:{photos}@64")
    assert [each.data.removeprefix(f"folder:{photos}") for each in plain] == [
        "", "@299,342,bilinear", "",
    ]  # fmt: skip
    assert {each.data for each in named} == {f"folder:{photos}@64"}
    assert len({each.key for each in plain + named}) == 6
    assert [each.key for each in cells(plain[1].data)][1] == plain[1].key


def test_a_model_for_small_images_runs_on_a_folder_of_large_ones(photos, tmp_path):
    (tmp_path / "net.py").write_text(NET)
    command = [
        "bench", "--methods", "tent", "--model", f"file:{tmp_path}/net.py@build", "--seeds", "1",
        "--stream", "continual,domains=fog,batch_size=4", "--out", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--data", f"folder:{photos}@32"])
    assert done.exit_code == 0, done.output
    assert {row["data"] for row in json.loads(done.stdout)} == {f"folder:{photos}@32"}
    wrong = plan(
        methods=[], models=[f"file:{tmp_path}/net.py@build"], data=f"folder:{photos}",
        streams=[Scenario()], seeds=1,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"other data, as folder:PATH@SIZE"):
        run_cell(wrong[0])
