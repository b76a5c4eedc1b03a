"""Changed copies show what the published transforms show, whatever is left out on the way."""

import pytest
import torch

from reference import views as reference
from testtime.adaptation.parts.pixels import turn_hue
from testtime.adaptation.parts.views import (
    _crop_and_mirror,
    _shift_and_mirror,
    cotta_view,
    roid_view,
    small_augmix_view,
    weak_view,
)

SHAPES = [(2, 3, 12, 10), (2, 3, 9, 17), (2, 3, 2, 3), (2, 3, 30, 7), (2, 1, 8, 8)]


def both(seed: int) -> tuple[torch.Generator, torch.Generator]:
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)


def images(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(100 + seed))
    x[0] = (x[0] * 4).round() / 4  # equal channels, black and white among them
    return x


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", [cotta_view, roid_view])
def test_the_transform_of_cotta(view, shape):
    for seed in range(12):
        x, (one, other) = images(shape, seed), both(seed)
        before = x.clone()
        rough = view is cotta_view
        expected = reference.jitter(
            x, other, padding="replicate" if rough else "reflect", rough=rough
        )
        torch.testing.assert_close(view(x, one), expected, rtol=0, atol=1e-5)
        assert torch.equal(one.get_state(), other.get_state())
        assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(6, 3, 12, 10), (6, 1, 9, 17)], ids=str)
def test_the_mixtures_of_memo(shape):
    for seed in range(12):
        x, (one, other) = images(shape, seed).double(), both(seed)
        mixed = small_augmix_view(x, one)
        expected = reference.augmix(_shift_and_mirror(x, other), other)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)
        assert torch.equal(one.get_state(), other.get_state())


def test_a_turned_hue_comes_back():
    x = images((4, 3, 6, 6), 0).double()
    for turn in (1 / 6, 0.06, 0.0, -0.1):
        torch.testing.assert_close(turn_hue(turn_hue(x, turn), -turn), x, rtol=0, atol=1e-12)
    assert not torch.allclose(turn_hue(x, 0.1), x)


@pytest.mark.parametrize("least", [0.8, 0.08])
def test_crops_lie_within_the_image_and_are_as_large_as_they_say(least):
    side = torch.linspace(0, 1, 33)
    ramps = torch.stack([side.expand(33, 33), side.expand(33, 33).T])  # across, and down
    x, random = ramps.expand(600, -1, -1, -1), torch.Generator().manual_seed(0)
    view = weak_view(x, random) if least == 0.8 else _crop_and_mirror(x, random)
    across, down = view[:, 0, 16, 24] - view[:, 0, 16, 8], view[:, 1, 24, 16] - view[:, 1, 8, 16]
    wide, high = 2 * across.abs(), 2 * down  # shares of the image, from its inner half
    assert 0.4 < float((across < 0).double().mean()) < 0.6
    area, aspect = wide * high, wide / high
    assert least * 0.96 < float(area.min()) < least + 0.1
    assert float(area.max()) > 0.9
    if least < 0.8:  # else one side is as long as the image's
        inner = (wide < 0.99) & (high < 0.99)
        assert 0.74 < float(aspect[inner].min()) < 0.77
        assert 1.3 < float(aspect[inner].max()) < 1.35
    for centre, size in ((view[:, 0, 16, 16], wide), (view[:, 1, 16, 16], high)):
        apart, room = 32 / 33 * (centre - 0.5), (1 - size) / 2  # from the middle, to the border
        assert bool((apart.abs() <= room + 1e-4).all())
        assert float((apart / room)[size < 0.95].abs().max()) > 0.95
        assert float((apart / room)[size < 0.95].mean()) == pytest.approx(0, abs=0.1)
