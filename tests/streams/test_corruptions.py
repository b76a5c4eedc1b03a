"""Corruptions at their door: images stay images, a seed decides, bad input is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pictures import SIZES, pictures, run
from testtime._core.errors import InputError, UnknownName
from testtime._core.seeds import generator
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


@pytest.mark.filterwarnings("error")
def test_images_may_ask_for_gradients():
    images = pictures(2, 1, 8, 8)
    assert torch.equal(
        run(images.clone().requires_grad_(), "contrast", 3).detach(), run(images, "contrast", 3)
    )


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


@pytest.mark.parametrize("severity", range(1, 6))
def test_affine_changes_are_those_of_their_severity(severity):
    """A dot is found again where the matrix of MNIST-C sends it."""
    images = torch.zeros(8, 1, 57, 57)
    images[:, :, 27:30, 37:40] = 1  # ten to the right of the middle
    radians = (0.2, 0.4, 0.6, 0.8, 1.0)[severity - 1]
    share = (0.9, 0.8, 0.7, 0.6, 0.5)[severity - 1]
    step = (1, 2, 3, 4, 5)[severity - 1] * 57 / 28
    places = torch.arange(57.0) - 28
    for name, x, y in (
        ("rotation", 10 * math.cos(radians), 10 * math.sin(radians)), ("scale", 10 * share, 0.0),
        ("translation", 10.0, step),
    ):  # fmt: skip
        out = run(images, name, severity)[:, 0]
        mass = out.sum((1, 2))
        found_x, found_y = (out.sum(1) @ places) / mass, (out.sum(2) @ places) / mass
        moved = (found_x - x).abs()
        expected = torch.full((8,), step if name == "translation" else 0.0)
        torch.testing.assert_close(moved, expected, atol=0.3, rtol=0)
        torch.testing.assert_close(found_y.abs(), torch.full((8,), y), atol=0.3, rtol=0)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5, 3.0, "3", True, None, [3], torch.tensor([3, 3]),
                                      np.array([1, 2])])  # fmt: skip
def test_refuses_other_severities(severity):
    with pytest.raises(InputError, match="severity must be 1, 2, 3, 4 or 5"):
        corrupt(pictures(1, 1, 8, 8), "fog", severity, generator=generator(0))


def test_a_severity_may_be_of_any_kind_that_counts():
    images = pictures(1, 1, 8, 8)
    three, *others = (
        corrupt(images, "fog", severity, generator=generator(0))
        for severity in (3, np.int64(3), torch.tensor(3))
    )
    assert all(torch.equal(three, other) for other in others)


@pytest.mark.parametrize("name", [None, 5, b"fog", ["fog"]])
def test_what_is_no_name_is_an_unknown_name(name):
    with pytest.raises(UnknownName, match="no corruption is called"):
        corrupt(pictures(1, 1, 8, 8), name, 1, generator=generator(0))


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
        (torch.zeros(1, 3, 8, 8).to_sparse(), "to_dense"),
    ],
)
def test_refuses_what_is_no_image(images, message):
    for name in ("clean", "fog"):
        with pytest.raises(InputError, match=message):
            corrupt(images, name, 1, generator=generator(0))


def test_refuses_the_global_generator():
    with pytest.raises(InputError, match=r"must be a torch\.Generator"):
        corrupt(pictures(1, 1, 8, 8), "fog", 1, generator=None)
