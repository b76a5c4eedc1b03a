"""Changed copies show what the published transforms show, whatever is left out on the way."""

import pytest
import torch

from reference import views as reference
from testtime.adaptation.parts.pixels import turn_hue
from testtime.adaptation.parts.views import (
    _shift_and_mirror,
    cotta_view,
    roid_view,
    small_augmix_view,
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
