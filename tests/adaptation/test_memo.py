"""MEMO against its reference, its copies of small images, and batches in any order."""

import pytest
import torch

import testtime as tt
from models import batches, tiny
from reference import methods as reference
from testtime._core.errors import InputError
from testtime.adaptation.parts.views import (
    augmix_view,
    crop_and_flip,
    plain,
    roid_view,
    small_augmix_view,
)


@pytest.mark.parametrize("shades", [[1.0], [1.0, 0.7, 0.2]])
def test_memo(shades):
    def darker(copies, generator):
        return copies * torch.tensor(shades).view(-1, 1, 1, 1)

    x = batches(1, 6)[0]
    adapter = tt.adapt(tiny(), "memo", lr=1e-2, views=len(shades), augment=darker)
    expected = reference.memo(tiny(), x, 1e-2, 1 / 17, shades)
    torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-4)
    assert adapter.counts.forwards == 6 * (len(shades) + 1)


def test_small_images_keep_their_size_in_memo_s_copies():
    x = torch.ones(8, 1, 16, 16)
    large, small = (
        view(x, torch.Generator().manual_seed(3)) for view in (augmix_view, small_augmix_view)
    )
    assert small.shape == x.shape
    assert 0 <= float(small.min()) < float(small.max()) <= 1
    assert not torch.equal(small[0], small[1])
    assert torch.equal(small, small_augmix_view(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(small, large)
    dot = torch.zeros(64, 1, 16, 16)
    dot[:, :, 8, 8] = 1  # a crop to 8 % of the area makes nine of it, or none
    seen = small_augmix_view(dot, torch.Generator().manual_seed(3)).amax((1, 2, 3))
    assert float((seen > 0.1).double().mean()) > 0.9
    adapter = tt.adapt(tiny(), "memo", views=2, augment=small_augmix_view)
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        adapter(3 * batches(1)[0])


@pytest.mark.parametrize("augment", [roid_view, crop_and_flip, augmix_view])
def test_no_copy_of_memo_is_another(augment):
    seen = []
    model = tiny()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    adapter = tt.adapt(model, "memo", views=4, augment=augment)
    adapter(batches(1, 2)[0].clamp(0, 1))
    copies = [batch for batch in seen if len(batch) == 4]
    assert len(copies) == 2
    for four in copies:
        apart = torch.cdist(four.flatten(1), four.flatten(1)).fill_diagonal_(1)
        assert float(apart.min()) > 1e-3


def test_memo_does_not_remember_order():
    x = batches(1, 6)[0]
    adapter = tt.adapt(tiny(), "memo", lr=1e-2, views=2, augment=plain)
    torch.testing.assert_close(adapter(x).flip(0), adapter(x.flip(0)))
