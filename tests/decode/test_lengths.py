"""The study of lengths, against plain loops."""

import math
from statistics import fmean

import pytest
import torch

from testtime._core.errors import InputError
from testtime.decode.lengths import doubts, length_study


def drawn(seed, questions=7, samples=5):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (questions, samples), generator=draw)  # with ties
    return lengths, torch.rand(questions, samples, generator=draw) < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_study_equals_plain_loops(seed):
    lengths, right = drawn(seed)
    found = length_study(lengths, right)
    rows = [
        sorted(zip(own, good, strict=True), key=lambda each: each[0])
        for own, good in zip(lengths.tolist(), right.tolist(), strict=True)
    ]
    assert found.accuracy == pytest.approx(
        [fmean(g for _, g in rank) for rank in zip(*rows, strict=True)]
    )
    both = [row for row in rows if {good for _, good in row} == {True, False}]
    assert found.questions == len(both) > 0
    for value, wanted in ((found.right, True), (found.wrong, False)):
        means = [fmean(n for n, good in row if good == wanted) for row in both]
        assert value == pytest.approx(fmean(means))


def test_without_a_question_of_both_kinds_there_is_no_mean():
    found = length_study(torch.tensor([[3, 1]]), torch.tensor([[True, True]]))
    assert found.accuracy == (1.0, 1.0)
    assert found.questions == 0
    assert math.isnan(found.right)
    assert math.isnan(found.wrong)


def test_whole_words_are_counted_from_short_to_long():
    texts = [["wait WAIT awaiting", "Alternatively, wait"], ["", "waits"]]
    found = doubts(texts, torch.tensor([[9, 2], [3, 3]]))
    assert found == {"wait": (0.5, 1.0), "alternatively": (0.5, 0.0)}
    assert doubts(texts, torch.tensor([[9, 2], [3, 4]]), words=["a+"]) == {"a+": (0.0, 0.0)}


def test_bad_calls_are_refused():
    lengths, right = drawn(0)
    for wrong in (
        (lengths, right[:3]), (lengths, right.long()), (lengths[0], right[0]),
        (lengths[:0], right[:0]), (lengths * math.nan, right),
    ):  # fmt: skip
        with pytest.raises(InputError, match="lengths"):
            length_study(*wrong)
    for texts, shape in ((["a"], (1, 2)), ([], (0, 0)), ([["a", "b"], ["a"]], (2, 2))):
        with pytest.raises(InputError, match="expected as many"):
            doubts(texts, torch.ones(shape))
