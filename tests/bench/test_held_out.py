"""Tables of features as streams: which classes come, and what features suffer."""

import pytest
import torch

from scripts import script


@pytest.mark.parametrize(
    ("stream", "classes", "size"), [("two classes", 2, 64), ("one class", 1, 64), ("single", 3, 1)]
)
def test_a_stream_holds_the_classes_that_it_names(stream, classes, size):
    batches = list(script("held_out").sent("wine", stream))
    assert len(torch.cat([labels for _, labels in batches]).unique()) == classes
    assert max(len(x) for x, _ in batches) == size
    assert all(len(x) == len(labels) for x, labels in batches)


def test_what_a_sensor_suffers_is_the_same_in_all_batches():
    disturbed, x = script("held_out").disturbed, torch.ones(4, 5)
    drift, again = (disturbed(x, "drift", torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(drift, again)
    assert (drift == drift[0]).all()
    assert not torch.equal(drift, x)
    noise, other = (disturbed(x, "noise", torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(noise, other)
    assert torch.equal(disturbed(x, "clean", torch.Generator()), x)


def test_halves_of_a_table_share_no_row_and_one_scale():
    x, y, other, answers = script("held_out").table("wine")
    assert len(x) + len(other) == len(y) + len(answers) == 178
    torch.testing.assert_close(x.mean(0), torch.zeros(13), rtol=0, atol=0.1)
    assert not torch.equal(other.mean(0), x.mean(0))
