"""Folders of images: splits, all kinds of files, and files that cannot be read."""

import pytest
from PIL import Image

from testtime._core.errors import InputError
from testtime.streams.data import labels_of, load_data, stack
from testtime.streams.folder import image_folder


def test_image_folder(tmp_path):
    for c, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        for n in range(2):
            (tmp_path / f"class{c}").mkdir(exist_ok=True)
            Image.new("RGB", (40 + 9 * n, 30), colour).save(tmp_path / f"class{c}" / f"{n}.png")
    data = load_data(f"folder:{tmp_path}")
    assert labels_of(data).tolist() == [0, 0, 1, 1]
    pixels, labels = stack(data, [3, 0])
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels[0, :, 5, 5].tolist() == [0, 0, 1]
    assert labels.tolist() == [1, 0]
    assert stack(image_folder(tmp_path, resize=20, crop=16), [1])[0].shape == (1, 3, 16, 16)


def fill(folder, count=1):
    folder.mkdir(parents=True)
    for n in range(count):
        Image.new("L", (8, 8), 255).save(folder / f"{n}.png")


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_the_folder_of_the_split_is_read(tmp_path, held_out):
    fill(tmp_path / "train" / "a", 3)
    fill(tmp_path / held_out / "a", 2)
    assert len(image_folder(tmp_path, split="train")) == 3
    assert len(image_folder(tmp_path)) == 2


def test_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "aeroplane", 2)
    assert labels_of(image_folder(tmp_path)).tolist() == [0, 0, 1, 1, 1]


def test_splits_are_never_taken_for_classes(tmp_path):
    fill(tmp_path / "train" / "a")
    fill(tmp_path / "valid" / "a")
    with pytest.raises(InputError, match="has train, but none of test, val, validation"):
        image_folder(tmp_path)


def test_test_images_are_never_taken_for_training_images(tmp_path):
    fill(tmp_path / "a")
    with pytest.raises(InputError, match="no folder train"):
        load_data(f"folder:{tmp_path}", split="train")


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_a_folder_without_classes_is_refused(tmp_path, make):
    with pytest.raises(InputError, match="one folder per class"):
        load_data(f"folder:{make(tmp_path)}")


def test_grey_and_transparent_files_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    for mode, colour in (("L", 255), ("RGBA", (255, 255, 255, 9)), ("P", 0), ("LA", (255, 0))):
        Image.new(mode, (8, 8), colour).save(tmp_path / "a" / f"{mode}.png")
    pixels, _ = stack(image_folder(tmp_path, resize=8, crop=8), range(4))
    assert pixels.shape == (4, 3, 8, 8)


def test_pixels_beyond_a_byte_are_refused_and_not_cut(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("I;16", (8, 8), 4000).save(tmp_path / "a" / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png cannot be read as an image: its mode is I"):
        stack(image_folder(tmp_path), [0])


@pytest.mark.parametrize("content", [b"", b"no image", "half a file"])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, kind):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / f"broken.{kind}"
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:1500] if isinstance(content, str) else content)
    with pytest.raises(InputError, match=rf"broken\.{kind} cannot be read as an image"):
        stack(image_folder(tmp_path), [0])


def test_classes_that_are_numbers_stand_in_their_order(tmp_path):
    """As in ImageNet-V2, whose folders are 0 to 999: by letters, 10 would come before 2."""
    for name in ("10", "0", "2"):
        fill(tmp_path / name)
    data = image_folder(tmp_path)
    assert data.classes == ["0", "2", "10"]
    assert {path.split("/")[-2]: label for path, label in data.samples} == {"0": 0, "2": 1, "10": 2}
    assert labels_of(data).tolist() == [label for _, label in data.samples]
