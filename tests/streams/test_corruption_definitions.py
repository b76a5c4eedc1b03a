"""Corruptions agree with the published definitions, given the same draws."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from pictures import SIZES, agree, arrays, pictures, run
from reference import corruptions as reference
from testtime._core.seeds import generator
from testtime.streams import blur, filters, noise, weather
from testtime.streams.corruptions import (
    GEOMETRIC,
)

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
