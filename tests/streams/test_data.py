"""Data sets by name, labels and batches of any data set."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from testtime._core.errors import InputError, MissingExtra, OptionError, UnknownName
from testtime.streams import data as data_file
from testtime.streams.data import (
    ImageSet,
    digits,
    labels_of,
    load_data,
    stack,
)


class Pairs(Dataset):
    """A user's own set, with nothing but the two methods; counts what is read."""

    def __init__(self, images, labels):
        self.pairs, self.read = list(zip(images, labels, strict=True)), 0

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.read += 1
        return self.pairs[index]


def images(n=5, size=(1, 6, 6)):
    return torch.rand(n, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("split", "each"), [("test", 200), ("train", 100)])
def test_the_embedded_sample_is_balanced_and_in_range(split, each):
    data = load_data("fashion-mnist:sample", split=split)
    assert labels_of(data).bincount().tolist() == [each] * 10
    assert len(data.indices.unique()) == len(data)
    assert data.indices.max() < (10_000 if split == "test" else 60_000)
    pixels, labels = stack(data, range(len(data)))
    assert pixels.dtype == torch.float32
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert 0.25 < pixels.mean() < 0.32  # 0.286 on the full set
    assert torch.equal(labels, labels_of(data))
    image, label = data[3]
    assert torch.equal(image, pixels[3])
    assert label == labels[3]


def test_no_embedded_test_image_is_an_embedded_training_image():
    train = {x.numpy().tobytes() for x in load_data("fashion-mnist:sample", split="train").images}
    test = [x.numpy().tobytes() for x in load_data("fashion-mnist:sample").images]
    assert train.isdisjoint(test)


@pytest.mark.extra
def test_the_embedded_sample_is_a_part_of_the_full_set():
    whole = {split: load_data("fashion-mnist", split=split) for split in ("train", "test")}
    seen = {x.numpy().tobytes() for x in whole["train"].images}
    assert len(whole["train"]) == 60_000
    assert len(whole["test"]) == 10_000
    for split, full in whole.items():
        part = load_data("fashion-mnist:sample", split=split)
        assert torch.equal(part.images, full.images[part.indices])
        assert torch.equal(part.labels, full.labels[part.indices])
        if split == "test":
            assert not any(x.numpy().tobytes() in seen for x in part.images)


@pytest.mark.parametrize("size", [8, 16])
def test_digits_split_by_seed(size):
    spec = "digits" if size == 8 else "digits:16"
    test, train = load_data(spec), load_data(spec, split="train")
    assert (len(train), len(test)) == (1000, 797)
    assert sorted([*train.indices.tolist(), *test.indices.tolist()]) == list(range(1797))
    assert stack(test, [0, 1])[0].shape == (2, 1, size, size)
    assert not torch.equal(digits(size=size, seed=1).indices, test.indices)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"testtime\[digits\]"):
        load_data("digits")


def test_unknown_names():
    with pytest.raises(UnknownName, match="did you mean fashion-mnist"):
        load_data("fashon-mnist:sample")
    with pytest.raises(UnknownName):
        load_data("folder:")
    with pytest.raises(OptionError, match="expected one of train, test"):
        load_data("fashion-mnist:sample", split="valid")


@pytest.mark.parametrize("name", ["targets", "labels", "y"])
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_labels_are_found_without_reading_items(name, kind):
    data = Pairs(images(), range(5))
    setattr(data, name, kind([3, 1, 4, 1, 5]))
    assert labels_of(data).tolist() == [3, 1, 4, 1, 5]
    assert data.read == 0


def test_labels_through_wrappers_and_target_transforms():
    plain = Pairs(images(), [0, 1, 2, 3, 4])
    assert labels_of(plain).tolist() == [0, 1, 2, 3, 4]
    assert plain.read == 5
    assert labels_of(Subset(plain, [4, 0])).tolist() == [4, 0]
    assert labels_of(ConcatDataset([plain, Subset(plain, [2])])).tolist() == [0, 1, 2, 3, 4, 2]
    plain.targets = [0, 1, 2, 3, 4]
    plain.read = 0
    assert labels_of(ConcatDataset([plain, Subset(plain, [2])])).tolist() == [0, 1, 2, 3, 4, 2]
    assert plain.read == 0
    plain.targets, plain.target_transform = [0, 1, 2, 3, 4], lambda label: label + 10
    assert labels_of(plain).tolist() == [10, 11, 12, 13, 14]


def test_stack_agrees_for_all_kinds_of_sets():
    x, y = images(), torch.tensor([3, 1, 4, 1, 5])
    kinds = [
        ImageSet(x, y),
        TensorDataset(x, y),
        Pairs(x, y.tolist()),
        Pairs(x, y),
        Subset(Subset(ImageSet(x, y), [1, 2, 3, 4, 0]), torch.tensor([4, 0, 1, 2, 3])),
        ConcatDataset([TensorDataset(x[:2], y[:2]), Pairs(x[2:], y[2:])]),
    ]
    for kind in kinds:
        for where in ([4, 0, 0], torch.tensor([4, 0, 0]), np.array([4, 0, 0])):
            pixels, labels = stack(kind, where)
            assert torch.equal(pixels, x[[4, 0, 0]])
            pixels.zero_()  # a copy
            assert labels.tolist() == [5, 3, 3]


def test_bytes_and_pillow_images_become_floats():
    x = (images(2, (3, 4, 5)) * 255).to(torch.uint8)
    expected = x.float() / 255
    pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]
    kinds = [
        ImageSet(x, torch.arange(2)),
        TensorDataset(x, torch.arange(2)),
        Pairs(x, [0, 1]),
        Pairs(pillow, [0, torch.tensor(1)]),
        Pairs([image.convert("RGBA") for image in pillow], np.arange(2)),
    ]
    for kind in kinds:
        pixels, labels = stack(kind, [1, 0])
        assert torch.equal(pixels, expected.flip(0))
        assert labels.tolist() == [1, 0]
    grey = Pairs([Image.fromarray(image[0].numpy()) for image in x], [0, 1])
    assert torch.equal(stack(grey, [0, 1])[0], expected[:, :1])
    with pytest.raises(InputError, match="mode I;16"):
        stack(Pairs([Image.new("I;16", (4, 4))], [0]), [0])


def test_pixels_that_rounding_brought_out_of_range_are_put_back():
    x = torch.nn.functional.interpolate(
        torch.ones(2, 1, 50, 37), size=(22, 22), mode="bicubic", antialias=True
    )
    x[0, 0, 0, 0] = -1e-6
    assert x.max() > 1
    pixels, _ = stack(TensorDataset(x, torch.arange(2)), [0, 1])
    assert torch.equal(pixels, x.clamp(0, 1))


def test_stack_through_a_subset_reads_what_the_subset_holds():
    part = Subset(ImageSet(images(), torch.arange(5)), [3, 1])
    assert stack(part, [0, 1])[1].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (images() * 255, r"pixels .* expected \[0, 1\]"),
        (images() - 0.5, "normalisation"),
        (images() * torch.nan, r"expected \[0, 1\]"),
        ((images() * 255).to(torch.int32), r"or bytes \(uint8\)"),
        (images(size=(6, 6)), r"shape \(6, 6\)"),
    ],
)
def test_images_that_cannot_be_corrupted_are_refused(pixels, words):
    with pytest.raises(InputError, match=words):
        stack(TensorDataset(pixels, torch.arange(5)), [0, 1])


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (Pairs([torch.rand(1, 4, 4), torch.rand(1, 4, 5)], [0, 1]), "of one shape"),
        (Pairs([object(), object()], [0, 1]), r"type object.*ToTensor"),
        (Pairs([torch.rand(1, 4, 4)] * 2, ["cat", "dog"]), "labels"),
        (Pairs([torch.rand(1, 4, 4)] * 2, [0.5, 1.0]), "whole numbers"),
        (TensorDataset(torch.rand(2, 1, 4, 4)), "whole"),
        ([torch.rand(1, 4, 4)] * 2, "expected a pair"),
    ],
)
def test_items_that_cannot_be_stacked_are_refused(pairs, words):
    with pytest.raises(InputError, match=words):
        stack(pairs, [0, 1])


def test_sets_without_usable_labels_are_refused():
    with pytest.raises(InputError, match="is empty"):
        labels_of(TensorDataset(torch.rand(0, 1, 4, 4), torch.arange(0)))
    with pytest.raises(InputError, match=r"a DataLoader gives batches.*Use its \.dataset"):
        labels_of(DataLoader(ImageSet(torch.rand(2, 1, 4, 4), torch.arange(2))))
    with pytest.raises(InputError, match="has no length"):
        labels_of(iter([]))
    data = Pairs(images(), range(5))
    data.targets = [1, 2]
    with pytest.raises(InputError, match="one per item"):
        labels_of(data)
    with pytest.raises(InputError, match="expected \\(n, channels, height, width\\)"):
        ImageSet(torch.rand(2, 4, 4), torch.arange(2))


def test_every_name_in_data_is_understood(monkeypatch, tmp_path):
    monkeypatch.setattr(data_file, "image_folder", lambda path, split: path)
    monkeypatch.setattr(data_file, "Recorded", lambda path: path)
    monkeypatch.setattr(data_file, "digits", lambda split, size: size)
    monkeypatch.setattr(data_file.fashion_mnist, "locate", lambda split: tmp_path)
    monkeypatch.setattr(
        data_file.fashion_mnist, "read_split", lambda *_: (np.zeros((1, 2, 2)), np.zeros(1, int))
    )
    assert all(load_data(name) for name in data_file.DATA)


def test_streams_load_no_optional_package():
    code = (
        "import sys, testtime.streams.scenarios as _;"
        "print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
