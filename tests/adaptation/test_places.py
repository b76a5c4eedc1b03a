"""What places in a list of classes tell of an answer, and what the guard makes of it where classes are many."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from testtime.adaptation.never_worse import NeverWorse
from testtime.adaptation.places import left_open, places


@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 99))
def test_places_are_those_of_a_sorted_list(n, classes, seed):
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randint(4, (n, classes), generator=chance).float()  # many are level
    answers = torch.randint(classes, (n,), generator=chance)
    order = logits.argsort(dim=1, descending=True, stable=True)
    assert places(logits, answers).equal((order == answers[:, None]).nonzero()[:, 1])


@given(st.integers(1, 40), st.integers(2, 300), st.integers(0, 99))
def test_no_less_is_left_open_than_places_leave(n, classes, seed):
    found = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    share = found.unique(return_counts=True)[1].double() / n
    assert left_open(found, classes) >= float(torch.special.entr(share).sum()) - 1e-9


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_where_all_places_are_alike_all_is_left_open(classes):
    assert left_open(torch.arange(classes), classes) == pytest.approx(math.log(classes))


def said(second: Tensor, first: Tensor, source: Tensor, classes: int) -> list[bool | None]:
    """Of an adapted model that answers `first` before `second`, in batches of 64."""
    hot = nn.functional.one_hot
    adapted = 5.0 * hot(first, classes) + 4.0 * hot(second, classes)
    guard = NeverWorse()
    return [
        guard.update(a, s)
        for a, s in zip(adapted.split(64), (5.0 * hot(source, classes)).split(64), strict=True)
    ]


def test_answers_that_never_come_again_are_no_sign_of_harm():
    classes, chance = 5000, torch.Generator().manual_seed(0)
    source = torch.randint(classes, (512,), generator=chance)
    other = torch.randint(classes, (512,), generator=chance)
    doubted = torch.rand(512, generator=chance) < 0.5
    near = said(source, torch.where(doubted, other, source), source, classes)
    assert True not in near  # what the source answers comes second where it does not come first
    assert set(said(other, other.flip(0), source, classes)) == {True}
