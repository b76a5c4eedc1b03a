"""Corruptions: contract of the door, agreement with the published definitions, statistics."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from reference import corruptions as reference
from testtime._core.errors import InputError, UnknownName
from testtime._core.seeds import generator
from testtime.streams import blur, digital, filters, noise, spatter, weather
from testtime.streams.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    GEOMETRIC,
    ILLUMINATION,
    corrupt,
)

NAMES = (*CORRUPTIONS, *EXTRA_CORRUPTIONS, *GEOMETRIC, *ILLUMINATION)
FIXED = {
    "defocus_blur",
    "zoom_blur",
    "gaussian_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "saturate",
    "scale",
}
SIZES = (32, 64)
"""One size with the constants of CIFAR-10-C, one with those of ImageNet-C."""


def pictures(batch, channels, height, width, *, seed=0):
    """Smooth shapes with edges, textures and all grey values, each image another."""
    chance = generator(seed, "pictures")
    coarse = torch.rand(batch, channels, 4, 4, generator=chance)
    smooth = torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=True
    )
    fine = torch.rand(batch, channels, height, width, generator=chance)
    return torch.where(smooth > 0.6, smooth.sqrt(), smooth * 0.5 + 0.1 * fine).clamp(0, 1)


def run(images, name, severity, seed=0):
    return corrupt(images, name, severity, generator=generator(seed, name, severity))


def arrays(images):
    return images.permute(0, 2, 3, 1).double().numpy()


def agree(images, expected, tolerance=2e-5):
    given_images, expected = arrays(images), np.clip(np.stack(expected), 0, 1)
    assert np.abs(given_images - expected).max() < tolerance


# The door


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", NAMES)
def test_images_stay_images(name, severity):
    for shape in ((3, 1, 28, 28), (2, 3, 33, 41), (2, 4, 32, 32), (1, 3, 64, 65)):
        images = pictures(*shape)
        before = images.clone()
        out = run(images, name, severity)
        assert out.shape == images.shape
        assert out.dtype == images.dtype
        assert out.isfinite().all()
        assert out.min() >= 0
        assert out.max() <= 1
        assert torch.equal(images, before)
        assert out.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_works_at_224_pixels(name):
    images = pictures(1, 3, 224, 224)
    out = run(images, name, 5)
    assert out.shape == images.shape
    assert (out - images).abs().mean() > 0.005


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    severity=st.integers(1, 5),
    shape=st.tuples(*(st.integers(1, n) for n in (2, 5, 70, 70))),
)
def test_any_size_and_channel_count(name, severity, shape):
    out = run(pictures(*shape), name, severity)
    assert out.shape == shape
    assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_images(name, value):
    out = run(torch.full((2, 3, 32, 32), value), name, 3)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_only_the_seed_decides(name, size):
    images = pictures(1, 3, size, size).expand(8, -1, -1, -1)
    state = torch.get_rng_state()
    for severity in (2, 5):
        out = run(images, name, severity)
        assert torch.equal(out, run(images, name, severity))
        other = run(images, name, severity, seed=1)
        assert torch.equal(out, other) == (name in FIXED)
        assert torch.equal(out, out[:1].expand_as(out)) == (name in FIXED)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_layouts(name):
    images = pictures(2, 3, 32, 32)
    expected = run(images, name, 4)
    last = run(images.to(memory_format=torch.channels_last), name, 4)
    assert torch.allclose(last, expected, atol=1e-5)
    assert run(images.double(), name, 4).dtype == torch.float64
    half = images.bfloat16()
    assert torch.equal(run(half, name, 4), run(half.float(), name, 4).bfloat16())


RISING = set(NAMES) - {
    "saturate",  # pale at 1 and 2, vivid from 3 on
    "frost",  # keeps less of the image as it adds more; may end as bright as it began
    "elastic_transform",  # a rough affine map at 1 and 2, fine displacements from 3 on
    "spatter",  # water up to 3, mud from 4 on
}


@pytest.mark.parametrize("name", sorted(RISING))
@pytest.mark.parametrize("size", SIZES)
def test_severity_takes_images_farther_from_clean(name, size):
    images = pictures(24 if size == 32 else 12, 3, size, size)
    far = [(run(images, name, s) - images).abs().mean().item() for s in range(1, 6)]
    assert far[0] > 1e-4
    for lower, higher in pairwise(far):
        assert higher > 0.9 * lower  # neighbouring constants of the originals may tie
    assert far[4] > 1.15 * far[0]


def test_clean_is_the_input():
    images = pictures(2, 1, 8, 8)
    assert corrupt(images, "clean", 5, generator=generator(0)) is images


@pytest.mark.parametrize("name", NAMES)
def test_values_that_rounding_brought_out_of_range_are_put_back(name):
    images = pictures(2, 3, 32, 32)
    images[:, :, :4], images[:, :, 4:8] = 0, 1
    nearly = images.clone()
    nearly[:, :, :4] -= 1e-6
    nearly[:, :, 4:8] += 1e-6
    assert torch.equal(run(nearly, name, 3), run(images, name, 3))


def test_names_are_those_of_imagenet_c():
    assert len(CORRUPTIONS) == 15
    assert (CORRUPTIONS[0], CORRUPTIONS[7], CORRUPTIONS[14]) == (
        "gaussian_noise",
        "snow",
        "jpeg_compression",
    )
    assert len(set(NAMES)) == len(NAMES) == 25


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, "3", True, None])
def test_refuses_other_severities(severity):
    with pytest.raises(InputError, match="severity must be 1, 2, 3, 4 or 5"):
        corrupt(pictures(1, 1, 8, 8), "fog", severity, generator=generator(0))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UnknownName, match="did you mean defocus_blur"):
        corrupt(pictures(1, 1, 8, 8), "defocus_blurr", 1, generator=generator(0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be float"),
        (torch.zeros(3, 8, 8), "batch, channels, height, width"),
        (torch.zeros(0, 3, 8, 8), "at least one"),
        (torch.full((1, 3, 8, 8), 1.5), "from 1.5 to 1.5"),
        (torch.full((1, 3, 8, 8), 1.0001), "in \\[0, 1\\]"),
        (torch.full((1, 3, 8, 8), -0.1), "in \\[0, 1\\]"),
        (torch.full((1, 3, 8, 8), float("nan")), "finite"),
        (torch.tensor([[[[0.5, float("nan")]]]]), "finite"),
        (torch.full((1, 3, 8, 8), float("inf")), "finite"),
        (np.zeros((1, 3, 8, 8)), "ndarray"),
    ],
)
def test_refuses_what_is_no_image(images, message):
    for name in ("clean", "fog"):
        with pytest.raises(InputError, match=message):
            corrupt(images, name, 1, generator=generator(0))


def test_refuses_the_global_generator():
    with pytest.raises(InputError, match=r"must be a torch\.Generator"):
        corrupt(pictures(1, 1, 8, 8), "fog", 1, generator=None)


# Agreement with the published definitions


LARGE_DISKS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
SMALL_DISKS = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("size", SIZES)
class TestDefinitions:
    def images(self, size):
        return pictures(2, 3, size, size + 3)

    def pick(self, size, severity, large, small):
        return (large if size >= 64 else small)[severity - 1]

    def test_defocus(self, size, severity):
        images = self.images(size)
        c = self.pick(size, severity, LARGE_DISKS, SMALL_DISKS)
        expected = [reference.defocus(image, *c) for image in arrays(images)]
        agree(run(images, "defocus_blur", severity), expected)

    def test_gaussian_blur(self, size, severity):
        images = self.images(size)
        c = self.pick(size, severity, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1))
        expected = [reference.gaussian(image, c) for image in arrays(images)]
        agree(run(images, "gaussian_blur", severity), expected)

    def test_zoom_blur(self, size, severity):
        images = self.images(size)
        large = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
        small = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
        factors = np.arange(1, *self.pick(size, severity, large, small))
        expected = [reference.zoom_blur(image, factors) for image in arrays(images)]
        agree(run(images, "zoom_blur", severity), expected)

    def test_brightness(self, size, severity):
        images = self.images(size)
        images[:, :, :4, :4] = 0
        images[:, :, 4:8, :4] = 0.7
        c = self.pick(size, severity, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3))
        expected = [reference.brightness(image, c) for image in arrays(images)]
        agree(run(images, "brightness", severity), expected)

    def test_saturate(self, size, severity):
        images = self.images(size)
        images[:, :, :4, :4] = 0
        images[:, :, 4:8, :4] = 0.7
        large = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))
        small = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))
        c = self.pick(size, severity, large, small)
        expected = [reference.saturate(image, *c) for image in arrays(images)]
        agree(run(images, "saturate", severity), expected, tolerance=1e-4)

    def test_contrast(self, size, severity):
        images = self.images(size)
        c = self.pick(size, severity, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15))
        expected = [reference.contrast(image, c) for image in arrays(images)]
        agree(run(images, "contrast", severity), expected)

    def test_pixelate(self, size, severity):
        images = self.images(size)
        c = self.pick(size, severity, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65))
        expected = [reference.pixelate(image, c) for image in arrays(images)]
        agree(run(images, "pixelate", severity), expected, tolerance=2.1 / 255)  # theirs is 8-bit

    @pytest.mark.parametrize("channels", [1, 3])
    def test_jpeg(self, size, severity, channels):
        images = self.images(size)[:, :channels]
        quality = self.pick(size, severity, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40))
        expected = np.stack([reference.jpeg(image, quality) for image in arrays(images)])
        error = np.abs(arrays(run(images, "jpeg_compression", severity)) - expected) * 255
        assert error.max() < 0.01


@pytest.mark.parametrize("angle", [-45, -44.9, -10, 0, 33.3, 45, -90, -135, -100])
@pytest.mark.parametrize(("radius", "sigma"), [(6, 1.5), (15, 8)])
def test_streak_is_motion_blur(angle, radius, sigma):
    images = pictures(2, 3, 20, 23).double()
    angles = torch.tensor([angle, 17.0])
    out = filters.streak(images, angles, radius=radius, sigma=sigma)
    expected = [
        reference.streak(image, float(a), radius, sigma)
        for image, a in zip(arrays(images), angles, strict=True)
    ]
    agree(out, expected, tolerance=1e-6)


@pytest.mark.parametrize(("name", "low", "high"), [("motion_blur", -45, 45), ("snow", -135, -45)])
def test_directions_are_the_published_ones(name, low, high, monkeypatch):
    seen = []
    module = blur if name == "motion_blur" else weather

    def spy(images, angles, **lengths):
        seen.append((angles, lengths))
        return images

    monkeypatch.setattr(module, "streak", spy)
    run(torch.zeros(500, 1, 8, 8), name, 5)
    angles, lengths = seen[0]
    assert low <= angles.min() < low + 3
    assert high - 3 < angles.max() <= high
    assert lengths == ({"radius": 9, "sigma": 2.5} if high == 45 else {"radius": 14, "sigma": 12})


@pytest.mark.parametrize("delta", [1, 2, 4])
def test_glass_shuffle_is_the_published_loop(delta):
    images = pictures(3, 3, 17, 20).double()
    inner = (17 - 2 * delta, 20 - 2 * delta)
    chance = generator(0, "glass", delta)
    moves = torch.randint(-delta, delta, (2, 3, *inner), generator=chance)
    source = blur.shuffled(moves, 17, 20, delta=delta)
    out = images.flatten(2).gather(2, source[:, None].expand(-1, 3, -1)).view(images.shape)
    expected = [
        reference.glass_round(image, moves[:, i].numpy(), delta)
        for i, image in enumerate(arrays(images))
    ]
    agree(out, expected, tolerance=1e-12)


def test_glass_blur_blurs_shuffles_blurs():
    images = pictures(2, 3, 64, 64)
    sigma, delta, rounds = 1.1, 3, 2
    chance = generator(0, "glass_blur", 4)
    expected = [reference.gaussian(image, sigma) for image in arrays(images)]
    for _ in range(rounds):
        moves = torch.randint(-delta, delta, (2, 2, 58, 58), generator=chance).numpy()
        expected = [
            reference.glass_round(image, moves[:, i], delta) for i, image in enumerate(expected)
        ]
    expected = [reference.gaussian(image, sigma) for image in expected]
    agree(run(images, "glass_blur", 4), expected)


def test_snow_with_the_same_draws():
    images = pictures(2, 3, 64, 64)
    chance = generator(0, "snow", 3)
    flakes = 0.55 + 0.3 * torch.randn(2, 1, 64, 64, generator=chance).double().numpy()
    angles = (-135 + 90 * torch.rand(2, generator=chance)).tolist()
    expected = [
        reference.snow(image, flakes[i, 0], angles[i], 4, 0.9, 12, 8, 0.7)
        for i, image in enumerate(arrays(images))
    ]
    out = np.abs(arrays(run(images, "snow", 3)) - np.stack(expected))
    assert np.quantile(out, 0.99) < 1e-4  # a flake may sit on the threshold in one precision


@pytest.mark.parametrize("decay", [1.4, 3])
def test_plasma_is_diamond_square(decay):
    chance = generator(0, "plasma")

    def draw(n):
        return 2 * torch.rand(1, n, n, generator=chance, dtype=torch.float64)[0].numpy() - 1

    expected = reference.plasma(16, decay, draw)
    like = torch.zeros((), dtype=torch.float64)
    maps = weather.plasma(1, 16, decay=decay, like=like, generator=generator(0, "plasma"))
    assert np.allclose(maps[0].numpy(), expected, atol=1e-12)


def test_fog_keeps_the_brightest_value():
    images = pictures(4, 3, 64, 64) * 0.8
    cloud = weather.plasma(4, 64, decay=1.5, like=images, generator=generator(0, "fog", 4))
    for image, out, mist in zip(images, run(images, "fog", 4), cloud, strict=True):
        top = image.max()
        assert torch.allclose(out, (image + 2.5 * mist) * top / (top + 2.5), atol=1e-6)


def test_frost_has_the_brightness_of_the_photographs():
    texture = weather.crystals(torch.zeros(40, 1, 64, 64), generator(0, "frost"))
    means, stds = texture.mean(dim=(1, 2, 3)), texture.std(dim=(1, 2, 3))
    assert 0.42 < means.min() < 0.55
    assert 0.74 < means.max() < 0.85
    assert 0.05 < stds.min() < 0.09
    assert 0.12 < stds.max() < 0.18
    images = pictures(40, 3, 64, 64)
    added = run(images, "frost", 5) - 0.6 * images
    red, _, blue = added.mean(dim=(0, 2, 3))
    assert blue > 1.1 * red
    assert (added >= -1e-6).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("severity", [1, 2, 5])
def test_elastic_with_the_same_draws(size, severity):
    images = pictures(2, 3, size, size + 3)
    length = size if size < 64 else size * 244 / 224
    large = {1: (2, 0.7, 0.1), 2: (2, 0.08, 0.2), 5: (0.12, 0.01, 0.02)}
    small = {1: (0, 0, 0.08), 2: (0.05, 0.2, 0.07), 5: (0.1, 0.03, 0.03)}
    strength, smooth, affine = (
        length * share for share in (small if size < 64 else large)[severity]
    )
    chance = generator(0, "elastic_transform", severity)
    jolts = affine * (2 * torch.rand(2, 3, 2, generator=chance) - 1).double().numpy()
    field = 2 * torch.rand(2, 2, size, size + 3, generator=chance).double().numpy() - 1
    field = strength * ndimage.gaussian_filter(
        field, (0, 0, smooth, smooth), mode="reflect", truncate=3
    )
    expected = [
        reference.elastic(image, jolts[i], field[0, i], field[1, i])
        for i, image in enumerate(arrays(images))
    ]
    agree(run(images, "elastic_transform", severity), expected, tolerance=2e-3)


def test_geometry_reads_where_it_says():
    images = pictures(4, 3, 21, 30)
    outs = {name: arrays(run(images, name, 3)) for name in GEOMETRIC}
    for i, image in enumerate(arrays(images)):
        options = {
            "rotation": [
                (np.array([[np.cos(t), np.sin(t)], [-np.sin(t), np.cos(t)]]), 0)
                for t in (-0.6, 0.6)
            ],
            "shear": [(np.array([[np.cos(t), 0], [-np.sin(t), 1]]), 0) for t in (-0.6, 0.6)],
            "scale": [(np.eye(2) / 0.7, 0)],
            "translation": [
                (np.eye(2), np.array([a * 21 * 3 / 28, b * 30 * 3 / 28]))
                for a in (-1, 1)
                for b in (-1, 1)
            ],
        }
        for name, choices in options.items():
            errors = [
                np.abs(reference.read_at(image, m, s) - outs[name][i]).max() for m, s in choices
            ]
            assert min(errors) < 1e-4, name


def test_both_directions_are_drawn():
    draws = noise.signs((1000,), like=torch.zeros(1), generator=generator(0))
    assert set(draws.tolist()) == {-1.0, 1.0}
    assert abs(draws.mean()) < 0.1
    grey = torch.full((200, 1, 4, 4), 0.5)
    brighter = (run(grey, "gamma", 1)[:, 0, 0, 0] > 0.5).float().mean()
    assert 0.35 < brighter < 0.65
    assert torch.allclose(run(grey, "gamma", 5).amin(), torch.tensor(0.125))


def test_illumination_darkens_one_side():
    white = torch.ones(20, 1, 33, 33)
    out = run(white, "illumination", 5)
    assert torch.allclose(out[:, 0, 16, 16], torch.tensor(1 - 0.45), atol=1e-5)
    assert out.amin(dim=(1, 2, 3)).allclose(torch.tensor(0.1), atol=1e-5)
    assert out.amax(dim=(1, 2, 3)).allclose(torch.tensor(1.0), atol=1e-5)


# Noise


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
