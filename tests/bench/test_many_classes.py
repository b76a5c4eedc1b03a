"""A thousand classes out of ten: what an image is, and its class; which cells of a guard hold."""

import torch

from scripts import script


def test_a_class_is_three_garments_in_their_order():
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    wide, classes = script("many_classes").triples(
        images, torch.tensor([7, 0, 9, 2]), torch.tensor([[0, 1, 2], [3, 3, 0]])
    )
    assert classes.tolist() == [709, 227]
    assert wide.shape == (2, 1, 2, 6)
    assert wide[0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_guard_holds_that_keeps_most_of_a_gain_and_does_no_harm():
    kept = script("guarded").kept
    assert kept(40.0, 20.0, 24.0)
    assert not kept(40.0, 20.0, 24.5)
    assert kept(40.0, 60.0, 41.0)
    assert not kept(40.0, 39.5, 41.5)
