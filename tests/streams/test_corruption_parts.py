"""What corruptions are made of: moments of noise, filters, distances, against other libraries."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from pictures import SIZES, pictures, run
from reference import corruptions as reference
from testtime._core.seeds import generator
from testtime.streams import blur, digital, geometry, light, noise, spatter, weather


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", [1, 3])
def test_noise_has_the_published_moments(size, severity):
    level = 0.4
    images = torch.full((30, 3, size, size), level)
    large, small = severity - 1, severity - 1
    std = {
        "gaussian_noise": ((0.08, 0.12, 0.18)[large], (0.04, 0.06, 0.08)[small]),
        "speckle_noise": (
            level * (0.15, 0.2, 0.35)[large],
            level * (0.06, 0.1, 0.12)[small],
        ),
        "shot_noise": (
            (level / (60, 25, 12)[large]) ** 0.5,
            (level / (500, 250, 100)[small]) ** 0.5,
        ),
    }
    for name, (at_large, at_small) in std.items():
        expected = at_large if size >= 64 else at_small
        out = run(images, name, severity)
        assert out.mean().item() == pytest.approx(level, abs=0.004), name
        assert out.std().item() == pytest.approx(expected, rel=0.03), name
    neighbours = run(images, "gaussian_noise", severity)[:, :2].transpose(0, 1).flatten(1)
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.02


PUBLISHED = {  # of ImageNet-C and of CIFAR-10-C; severities 1 to 5
    "gaussian_noise": ((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": ((60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": ((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": ((0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "glass_blur": (
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": (
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "snow": (
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
         (0.55, 0.3, 4, 0.9, 12, 8, 0.7), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
         (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
         (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
         (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    ),
    "frost": (
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ),
    "fog": (
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "spatter": (
        ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
         (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1)),
        ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
         (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_constants_are_the_published_ones_at_each_severity(name, monkeypatch):
    """Those of what is random; the others are compared with their originals, pixel by pixel."""
    asked = []

    def noting(images, severity, *, large, small):
        asked.append((large, small))
        return (small if images.shape[-1] < 64 else large)[severity - 1]

    for module in (blur, digital, geometry, light, noise, spatter, weather):
        monkeypatch.setattr(module, "constants", noting, raising=False)
    run(pictures(1, 3, 8, 8), name, 1)
    assert asked == [PUBLISHED[name]]


@pytest.mark.parametrize(("size", "share"), [(32, 0.07), (64, 0.27)])
def test_impulse_noise_hits_its_share(size, share):
    out = run(torch.full((20, 3, size, size), 0.4), "impulse_noise", 5)
    black, white = (out == 0).float().mean().item(), (out == 1).float().mean().item()
    assert black == pytest.approx(share / 2, rel=0.06)
    assert white == pytest.approx(share / 2, rel=0.06)
    assert ((out == 0) | (out == 1) | (out == 0.4)).all()


def test_shot_noise_counts():
    out = run(pictures(4, 3, 64, 64), "shot_noise", 5) * 3
    assert torch.allclose(out, out.round(), atol=1e-5)


def test_many_grey_images_need_several_files(monkeypatch):
    images = pictures(7, 2, 13, 21)
    expected = run(images, "jpeg_compression", 5)
    monkeypatch.setattr(digital, "TALLEST", 50)
    assert torch.equal(run(images, "jpeg_compression", 5), expected)


@pytest.mark.parametrize("length", [28, 33, 67, 96, 224])
def test_box_matrix_is_the_box_filter_of_pillow(length):
    line = generator(0, length)
    row = torch.randint(0, 256, (1, length), generator=line, dtype=torch.uint8)
    for size in (*range(1, length, 7), length, length + 5):
        expected = np.asarray(Image.fromarray(row.numpy()).resize((size, 1), Image.Resampling.BOX))
        out = digital.box_matrix(length, size, like=torch.zeros(1)) @ row[0].float()
        assert np.abs(out.numpy() - expected[0]).max() < 0.51


# Grey images


@pytest.mark.parametrize("name", ["brightness", "snow", "fog", "glass_blur", "spatter", "frost"])
def test_grey_is_the_colour_version_without_colour(name):
    grey = pictures(2, 1, 32, 32)
    out = run(grey, name, 5)
    colour = run(grey.expand(-1, 3, -1, -1), name, 5)
    luma = (colour * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=1, keepdim=True)
    assert (out - luma).abs().mean() < 0.004  # where a tinted channel is cut at 1


def test_saturate_leaves_grey_alone():
    grey = pictures(2, 1, 32, 32)
    assert torch.equal(run(grey, "saturate", 5), grey)


# Parts of spatter


@pytest.mark.parametrize("kind", ["few", "many", "one"])
def test_equalise_is_that_of_opencv(kind):
    top = {"few": 21, "many": 256, "one": 1}[kind]
    levels = torch.randint(0, top, (3, 1, 12, 12), generator=generator(0, kind)) + (kind == "one")
    out = spatter.equalise(levels.float())
    expected = [reference.equalise(image) for image in levels.numpy()]
    assert np.abs(out.numpy() - np.stack(expected)).max() <= 1  # halves may round either way


def test_distance_is_euclidean_and_cut():
    marked = torch.rand(4, 1, 40, 50, generator=generator(0)) > 0.995
    marked[3] = False
    marked[3, 0, 0, 0] = True
    expected = [ndimage.distance_transform_edt(~mark) for mark in marked[:, 0].numpy()]
    out = spatter.distance_to(marked, furthest=20, dtype=torch.float64)
    assert np.allclose(out[:, 0].numpy(), np.minimum(np.stack(expected), 20))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (12, 7)])
def test_dilation_reaches_the_eight_neighbours(shape):
    marked = torch.rand(5, 1, *shape, generator=generator(0, shape)) > 0.8
    square = np.ones((3, 3), dtype=bool)
    expected = [ndimage.binary_dilation(mark, square) for mark in marked[:, 0].numpy()]
    assert np.array_equal(spatter.dilate(marked)[:, 0].numpy(), np.stack(expected))


def test_distance_without_a_mark_is_the_furthest():
    nothing = torch.zeros(2, 1, 5, 60, dtype=torch.bool)
    out = spatter.distance_to(nothing, furthest=20, dtype=torch.float32)
    assert (out == 20).all()


def test_edges_run_around_a_drop():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    inside = (y - 20).square() + (x - 19).square() < 90
    found = spatter.edges(torch.where(inside, 200.0, 0.0)[None, None])[0, 0]
    assert found.any()
    near = ndimage.binary_dilation(inside) & ~ndimage.binary_erosion(inside)
    assert not (found.numpy() & ~near).any()
    _, rings = ndimage.label(~found.numpy())
    assert rings == 2  # the edge is closed: an outside and an inside
