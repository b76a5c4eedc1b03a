import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from testtime._core.errors import InputError, OptionError
from testtime.decode.uncertainty import (
    LEVELS,
    answer_entropy,
    error_prediction,
    judge,
    judge_prompt,
    read_rating,
)


def entropy(row):
    p = np.exp(row - row.max())
    p /= p.sum()
    return -sum(x * math.log(x) for x in p if x > 0)


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(2, 5), st.integers(2, 9))
def test_the_entropy_is_that_of_the_distributions_before_the_answer(seed, rows, tokens, vocabulary):
    chance = torch.Generator().manual_seed(seed)
    shape = rows, tokens, vocabulary
    logits = 5 * torch.randn(shape, generator=chance, dtype=torch.float64)
    answer = torch.rand(rows, tokens, generator=chance) < 0.6
    answer[:, 0], answer[:, 1] = False, True
    for shift, after in ((1, False), (0, True)):
        expected = [
            [entropy(logits[r, t - shift].numpy()) for t in range(tokens) if answer[r, t]]
            for r in range(rows)
        ]
        for aggregate, reduce in (("mean", np.mean), ("max", np.max), ("sum", np.sum)):
            found = answer_entropy(logits, answer, aggregate=aggregate, after=after)
            assert found.tolist() == pytest.approx([reduce(e) for e in expected], abs=1e-9)


def test_limits_of_the_entropy():
    answer = torch.tensor([[False, True]])
    assert answer_entropy(torch.zeros(1, 2, 262_144), answer).item() == pytest.approx(
        math.log(262_144), rel=1e-6
    )
    one_hot = torch.full((1, 2, 9), -math.inf).index_fill(2, torch.tensor([3]), 0.0)
    assert answer_entropy(one_hot, answer).item() == 0.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_auc_equals_scikit_learn_also_on_ties(seed):
    chance = torch.Generator().manual_seed(seed)
    score = torch.rand(60, generator=chance, dtype=torch.float64).mul(6).round() / 6
    wrong = torch.rand(60, generator=chance) < 0.4
    topics = ["maths" if i % 3 else "law" for i in range(60)]
    found = error_prediction(score, wrong, topics)
    assert list(found) == ["all", *dict.fromkeys(topics)]
    for name, worth in found.items():
        own = np.array([name in ("all", topic) for topic in topics])
        right, s = ~wrong.numpy()[own], score.numpy()[own]
        sure = 1 - s / s.max()  # as in the paper
        assert worth.questions == own.sum()
        assert worth.wrong == (~right).sum()
        area = metrics.roc_auc_score(right, sure)
        assert worth.auroc == pytest.approx(area)
        assert worth.gini == pytest.approx(abs(2 * area - 1))
        assert worth.average_precision == pytest.approx(
            metrics.average_precision_score(right, sure)
        )


def test_groups_of_one_kind_are_nan_and_small_ones_are_left_out():
    score = torch.arange(24.0)
    wrong = torch.arange(24) >= 12
    topics = ["right"] * 12 + ["wrong"] * 10 + ["few"] * 2
    found = error_prediction(score, wrong, topics)
    assert set(found) == {"all", "right", "wrong"}
    assert found["all"].auroc == 1.0
    assert math.isnan(found["right"].auroc)
    assert math.isnan(found["wrong"].gini)
    assert math.isnan(found["wrong"].average_precision)
    assert "few" in error_prediction(score, wrong, topics, least=2)


@pytest.mark.parametrize("level", LEVELS)
def test_a_reply_as_asked_for_is_read_whole(level):
    reply = (
        f"Sure:\n- **Complexity**: 0.75\n- **Level**: {level.title()}\n* knowledge: No\n"
        "reasoning : yes.\nSTEPS: Medium\n"
    )
    found = read_rating(reply)
    assert (found.complexity, found.level) == (0.75, LEVELS[level])
    assert (found.knowledge, found.reasoning, found.steps) == (False, True, "medium")


@pytest.mark.parametrize(
    ("said", "read"), [(".5", 0.5), ("0", 0.0), ("1.0", 1.0), ("**0.3** (easy)", 0.3)]
)
def test_complexity_is_read_as_it_is_written(said, read):
    assert read_rating(f"complexity: {said}").complexity == read


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no idea",
        "complexity: 7\nlevel: doctor\nsteps: many",
        "complexity: -0.5\nlevel:",
        "complexity: 50%",
    ],
)
def test_what_a_reply_does_not_say_is_none(reply):
    assert set(vars(read_rating(reply)).values()) == {None}


def test_the_judge_is_asked_about_each_question():
    asked = []

    def ask(prompts):
        asked.extend(prompts)
        return [f"complexity: 0.{i}" for i in range(len(prompts))]

    assert [each.complexity for each in judge(ask, ["Why?", "How?"])] == [0.0, 0.1]
    assert asked == [judge_prompt("Why?"), judge_prompt("How?")]
    assert all(level in asked[0] for level in LEVELS)
    with pytest.raises(InputError, match="0 replies to 1 prompts"):
        judge(lambda prompts: [], ["Why?"])


def test_bad_calls_are_refused():
    logits, answer = torch.zeros(1, 3, 4), torch.tensor([[False, True, True]])
    with pytest.raises(InputError, match="expected"):
        answer_entropy(logits, answer[:, :2])
    with pytest.raises(InputError, match="expected"):
        answer_entropy(logits, answer.int())
    with pytest.raises(InputError, match="no token of an answer"):
        answer_entropy(logits, torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="first token"):
        answer_entropy(logits, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(OptionError, match="median"):
        answer_entropy(logits, answer, aggregate="median")
    with pytest.raises(InputError, match=r"bool \(n,\)"):
        error_prediction(torch.zeros(2), torch.zeros(2))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(InputError, match="NaN"):
            answer_entropy(torch.full((1, 3, 4), bad), answer)
    with pytest.raises(InputError, match="called 'all'"):
        error_prediction(torch.zeros(2), torch.tensor([True, False]), ["all", "b"])
    with pytest.raises(InputError, match="1 groups for 2"):
        error_prediction(torch.zeros(2), torch.tensor([True, False]), ["a"])
    with pytest.raises(InputError, match="NaN"):
        error_prediction(torch.tensor([torch.nan, 0]), torch.tensor([True, False]))
