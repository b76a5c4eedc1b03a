"""What the guard of `guard=True` looks at, and what it says of it."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from testtime._core.errors import OptionError
from testtime.adaptation.explained import probabilities, tells, theil
from testtime.adaptation.never_worse import NeverWorse, excess, information

answers = st.lists(st.integers(0, 3), min_size=4, max_size=40)


def logits(labels: Tensor, classes: int = 10) -> Tensor:
    return 5.0 * nn.functional.one_hot(labels, classes).float()


def drawn(count: int, seed: int = 0, classes: int = 10) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def blurred(labels: Tensor, share: float, seed: int = 1) -> Tensor:
    """The same labels, a share of them drawn anew."""
    chance = torch.Generator().manual_seed(seed)
    anew = torch.rand(len(labels), generator=chance) < share
    return torch.where(anew, drawn(len(labels), seed + 1), labels)


def said(adapted: Tensor, source: Tensor, size: int = 64) -> list[bool | None]:
    return told(logits(adapted), logits(source), size)


def told(adapted: Tensor, source: Tensor, size: int = 64) -> list[bool | None]:
    guard = NeverWorse()
    pairs = zip(adapted.split(size), source.split(size), strict=True)
    return [guard.update(*pair) for pair in pairs]


def trusts(words: list[bool | None]) -> bool:
    return all(word is False for word in words)


@given(answers, st.randoms(use_true_random=False))
def test_information_is_that_of_counts(a, chance):
    b = [chance.choice([x, 0, 2]) for x in a]
    shared, one, other = information(torch.tensor(a), torch.tensor(b), 4)
    assert shared == pytest.approx(mutual_info_score(a, b), abs=1e-9)
    assert one == pytest.approx(mutual_info_score(a, a), abs=1e-9)
    assert other == pytest.approx(mutual_info_score(b, b), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=5, max_size=12))
def test_the_excess_is_nought_on_the_mean_of_all_orders(a):
    chance = random.Random(0)
    means = [excess(torch.tensor(chance.sample(a, len(a)))) for _ in range(600)]
    assert sum(means) / len(means) == pytest.approx(0, abs=0.06)


def test_answers_that_have_nothing_to_do_with_the_source_s_are_not_trusted():
    labels = drawn(1280)
    assert all(said(drawn(1280, 5), labels)[1:])
    same = blurred(labels, 0.3)
    assert set(said(same, same)) == {None}  # nothing differs, so that nobody knows


def test_where_labels_come_in_order_the_better_follows_it():
    labels = torch.arange(10).repeat_interleave(25).repeat(6)
    for better, worse in ((0.1, 0.3), (0.0, 0.2)):
        good, bad = blurred(labels, better), blurred(labels, worse, 7)
        assert trusts(said(good, bad)[4:])
        assert all(said(bad, good)[4:])


def test_a_lead_below_its_error_is_none():
    labels = torch.arange(10).repeat_interleave(25).repeat(6)
    source = blurred(labels, 0.2)
    few = source.clone()
    wrong = (few != labels).nonzero()[:, 0]
    right = wrong[-len(wrong) // 2 :][:: len(wrong) // 4][:2]
    few[right] = labels[right]  # ahead, but by too few to be told from chance
    assert said(few, source)[-1] is None
    assert said(source, few)[-1] is None  # nor is it one for the other
    few[wrong[::2]] = labels[wrong[::2]]
    assert said(few, source)[-1] is False


def test_what_is_lost_of_late_is_not_made_up_for_by_what_was_gained_before():
    labels = torch.arange(10).repeat_interleave(25).repeat(6)[:1408]
    source, good = blurred(labels, 0.3), blurred(labels, 0.0)
    late = torch.cat([good[:1152], blurred(labels, 0.7, 9)[1152:]])
    words = said(late, source)
    assert words[17] is False
    assert words[-1] is not False


def test_a_few_answers_less_even_are_no_proof_of_harm():
    labels = drawn(256)
    narrower = labels.clone()
    counts = labels[-128:].bincount()  # of those that evenness is judged by
    narrower[(labels == counts.argmin()).nonzero()[-1]] = counts.argmax()
    assert said(narrower, labels)[-1] is None


def test_equal_neighbours_are_not_enough_where_labels_come_in_order():
    labels = drawn(1344 // 4).repeat_interleave(4)
    source, crowded = blurred(labels, 0.1), labels // 2
    blocks = [
        (excess(a), excess(s)) for a, s in zip(crowded.split(64), source.split(64), strict=True)
    ]
    assert sum(a for a, _ in blocks) > sum(s for _, s in blocks)
    assert said(crowded, source)[-1] is not False
    assert said(labels, source)[-1] is False


def test_where_they_do_not_narrower_answers_are_not_trusted():
    labels = drawn(1280)
    crowded = torch.where((labels > 5) & (drawn(1280, 3) < 5), 0, labels)
    assert all(said(crowded, labels)[2:])
    assert trusts(said(labels, crowded))


def test_trust_that_was_earned_lasts_as_long_as_the_lead():
    labels = torch.arange(10).repeat(64)
    crowded, barely = labels.clone(), labels.clone()
    crowded[(labels == 1) & (torch.arange(640) % 3 > 0)] = 0
    barely[600] = 1  # of 0: a lead of the other, below its standard error
    earned = said(torch.cat([labels, labels]), torch.cat([crowded, barely]))
    unearned = said(labels, barely)
    assert trusts(earned)
    assert set(unearned) == {None}
    behind = said(torch.cat([labels, barely]), torch.cat([crowded, labels]))
    assert behind[9] is False
    assert behind[-1] is None


def test_who_mends_a_source_of_one_answer_must_be_even_and_sure():
    same, labels = logits(torch.zeros(512, dtype=torch.long)), drawn(512)
    assert told(logits(labels), same)[1:] == [False] * 7
    assert told(logits(labels), same)[0] is None  # too few to say so
    assert all(told(logits(labels) / 3, same))  # even, and not sure
    assert False not in told(logits(labels // 2), same)  # sure, and not even
    assert False not in told(logits(labels), logits(blurred(labels, 0.9)) * 2)  # not stuck
    assert set(told(same, same)) == {None}


def test_one_answer_of_two_that_is_split_is_mended_by_a_surer_model_alone():
    split, one = logits(drawn(512, classes=2), 2), logits(torch.zeros(512, dtype=torch.long), 2)
    assert told(split, one)[-1] is False
    assert False not in told(0.8 * split, one)  # even, and told of: as one class in two halves is
    third = logits(drawn(512, classes=3), 3), logits(torch.zeros(512, dtype=torch.long), 3)
    assert told(0.9 * third[0], third[1])[-1] is False  # a bit more than one answer tells


def test_who_keeps_nothing_mends_a_source_of_one_answer_alone():
    spread, three = logits(drawn(512)), drawn(512, 3, classes=3)
    assert False not in told(
        spread, 0.6 * logits(three)
    )  # as one class and its mistakes are spread
    nearly_one = torch.where(drawn(512, 3) == 0, 3, 0)
    assert told(spread, 0.6 * logits(nearly_one))[-1] is False
    many = 3.0 * logits(drawn(512, classes=1000), 1000)
    for some, word in ((50, False), (300, None)):  # few of a thousand are as good as one of ten
        crowded = 1.5 * logits(drawn(512, 3, classes=some), 1000)
        assert told(many, crowded)[-1] is word


def test_who_begins_to_mend_a_source_of_one_answer_is_at_least_half_as_even_as_can_be():
    one = torch.where(drawn(512) == 0, 3, 0)
    splits = torch.where((one == 0) & (drawn(512, 3) < 2), 1, one)  # as statistics of a batch do
    mends = torch.where((one == 0) & (drawn(512, 3) < 6), drawn(512, 5), one)
    assert set(said(splits, one)) == {None}
    assert trusts(said(mends, one)[1:])
    pairs = torch.where(drawn(512) < 5, 3, 0)  # no more than one answer often enough to doubt
    four = torch.where(drawn(512, 3) < 3, 1 + pairs, pairs)
    words = said(torch.cat([four, splits]), torch.cat([pairs, one]))
    assert trusts(words[1:])  # who was trusted before the source gave one answer goes on


def test_answers_that_are_more_even_and_less_sure_must_be_told_more_of():
    labels = drawn(512)
    crowded = torch.where(labels % 2 == 0, 0, 5)
    assert told(0.84 * logits(labels), logits(crowded))[-1] is None
    assert told(0.96 * logits(labels), logits(labels.clamp(max=7)))[-1] is False  # little more even
    stuck = torch.where(labels == 1, 1, 0)
    nearly = torch.where(
        (drawn(512, 3) < 3) & (labels != 1), 0, labels
    )  # known, and not quite even
    assert told(0.8 * logits(nearly), logits(stuck))[-1] is False


def test_a_surer_model_that_is_no_more_even_is_not_yet_known_to_know():
    labels = torch.arange(512) * 3 % 10
    pairs = labels.view(-1, 2).clone()
    pairs[::3] = pairs[::3].flip(1)  # answers that differ, each as often as before
    assert set(told(logits(labels), 0.3 * logits(pairs.flatten()))) == {None}


def test_the_last_block_alone_suspends_trust():
    labels = drawn(512)
    late = (torch.arange(512) >= 448)[:, None]
    adapted = torch.where(late, 0.02, 1.0) * logits(labels)
    source = torch.where(late, 1.0, 0.1) * logits(labels // 2 * 2)
    assert told(adapted, source)[-2:] == [False, None]


def test_answers_spread_by_doubt_are_not_better_where_few_classes_come():
    two = drawn(512, classes=2)
    doubted, sure = logits(blurred(two, 0.5)) / 2, logits(two)
    assert all(told(doubted, sure))
    crowded = drawn(512) // 2 * 2
    assert not any(told(logits(drawn(512)), logits(crowded) / 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(2, 6), st.floats(0.1, 5), st.integers(0, 99))
def test_theil_s_coefficient_is_what_the_input_tells_over_what_is_open(n, classes, scale, seed):
    x = scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    p = x.double().softmax(1)
    told = (p * (p / p.mean(0)).log()).sum(1).mean()
    most = -(p.mean(0) * p.mean(0).log()).sum()
    parts = torch.stack([probabilities(part.double()) for part in x.split(7)]).sum(0)
    assert theil(parts) == pytest.approx(float(told / most), abs=1e-9)
    assert tells(parts) == pytest.approx(float(told), abs=1e-9)


def test_what_is_kept_of_a_stream_is_bounded():
    guard, labels = NeverWorse(), drawn(20 * 1024 + 32)
    for part in logits(labels).split(32):
        guard.update(part, part)
    state = guard.state_dict()
    assert state["answers"].shape[1] <= 1024
    assert len(state["parts"]) == 4  # of the last 256 samples
    assert state["part"].shape == (2, 11)


def test_nobody_is_trusted_before_a_block_was_seen_nor_with_nan():
    guard, labels = NeverWorse(), drawn(48)
    even, crowded = logits(labels), logits(labels // 3)
    parts = zip(even.split(16), crowded.split(16), strict=True)
    assert [guard.update(*part) for part in parts] == [None, None, False]
    assert guard.update(even * math.nan, even) is True
    assert guard.update(even[:1], crowded[:1]) is False


def test_what_is_old_is_forgotten():
    labels, other = drawn(4096), drawn(4096, 3)
    adapted = torch.cat([other[:2048], labels[2048:]])
    got = said(adapted, labels)
    assert all(got[1:32])
    assert True not in got[-16:]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=3, max_size=12), st.integers(0, 99))
def test_it_goes_on_where_its_state_was_taken(sizes, seed):
    labels = drawn(sum(sizes), seed)
    pairs = list(
        zip(
            logits(blurred(labels, 0.6, seed)).split(sizes),
            logits(labels).split(sizes),
            strict=True,
        )
    )
    whole, half = NeverWorse(memory=128), NeverWorse(memory=128)
    want = [whole.update(*pair) for pair in pairs]
    got = []
    for pair in pairs:
        other = NeverWorse(memory=128)
        other.load_state_dict(half.state_dict())
        got.append(other.update(*pair))
        half = other
    assert got == want


def test_a_class_that_is_left_out_is_no_answer_missing():
    labels = drawn(64)
    x = logits(labels).masked_fill(torch.arange(10) == 9, -math.inf)
    assert NeverWorse().update(x, x) is None
    assert NeverWorse().update(torch.full_like(x, -math.inf), x)


@pytest.mark.parametrize(
    "option", [{"kept": -0.1}, {"kept": 2}, {"memory": 1}, {"recent": 0}, {"block": 0}]
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(OptionError):
        NeverWorse(**option)


def test_two_models_that_are_as_sure_but_for_rounding():
    labels = drawn(512) % 6  # too few classes to be called even
    source = logits(labels // 3 * 3)
    trusted = {scale: told(scale * logits(labels), source)[-1] for scale in (1, 0.9999, 0.999)}
    assert trusted == {1: False, 0.9999: False, 0.999: None}
