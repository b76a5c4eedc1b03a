import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime._core.errors import InputError, OptionError
from testtime.decode.compute_optimal import (
    cross_validate,
    difficulty_levels,
    fit_policy,
    inference_of_small,
)

names = ["best-of-N", "beams", "revisions"]


def table(seed, questions=60):
    chance = torch.Generator().manual_seed(seed)
    easiness = torch.rand(questions, generator=chance).mul(8).round() / 8  # with ties
    return easiness, torch.rand(3, questions, generator=chance, dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 7))
def test_levels_are_quantile_bins_that_keep_ties_together(seed, bins):
    easiness, _ = table(seed)
    levels = difficulty_levels(easiness, bins=bins)
    order = easiness.argsort()
    assert (levels[order].diff() >= 0).all()
    for value in easiness.unique():
        assert len(levels[easiness == value].unique()) == 1
    distinct = torch.randperm(bins * 9, generator=torch.Generator().manual_seed(seed)).double()
    counts = difficulty_levels(distinct, bins=bins).bincount(minlength=bins)
    assert counts.max() - counts.min() <= 1


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 6))
def test_a_policy_is_the_best_strategy_of_each_level(seed, bins):
    easiness, correct = table(seed)
    policy = fit_policy(easiness, correct, names, bins=bins)
    levels = difficulty_levels(easiness, bins=bins)
    for value, level in zip(easiness.tolist(), levels.tolist(), strict=True):
        mean = correct[:, levels == level].mean(1)
        assert mean[names.index(policy.choose(value))] == mean.max()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.integers(0, 9))
def test_no_question_has_a_say_in_its_own_choice(seed, split):
    easiness, correct = table(seed)
    found = cross_validate(easiness, correct, names, bins=3, seed=split)
    assert found.accuracy == pytest.approx(
        correct.gather(0, found.chosen[None]).mean().item(), abs=1e-12
    )
    for question in range(0, 60, 7):  # whatever it says, the strategy it gets is the same
        for says in torch.eye(3, dtype=torch.float64) * 1e3:
            changed = correct.clone()
            changed[:, question] = says
            again = cross_validate(easiness, changed, names, bins=3, seed=split)
            assert again.chosen[question] == found.chosen[question]


def test_where_strategies_do_not_differ_nothing_is_won_by_choosing():
    chance = torch.Generator().manual_seed(0)
    correct = (torch.rand(4, 4000, generator=chance) < 0.5).double()
    found = cross_validate(torch.rand(4000, generator=chance), correct, list("abcd"))
    assert found.accuracy == pytest.approx(0.5, abs=0.03)


def test_a_level_without_questions_gets_the_best_over_all():
    policy = fit_policy(
        torch.tensor([1.0] * 5), torch.tensor([[0.0] * 5, [1.0] * 5]), ["a", "b"], bins=3
    )
    assert policy.choices == ("b", "b", "b")
    ties = fit_policy(torch.arange(4.0), torch.ones(2, 4), ["cheap", "dear"], bins=2)
    assert ties.choices == ("cheap", "cheap")


def test_two_questions_are_enough_and_one_is_not():
    found = cross_validate(torch.tensor([0.0, 1.0]), torch.eye(2), ["a", "b"], bins=1)
    assert found.accuracy == 0.0  # each gets what was right for the other
    with pytest.raises(InputError, match="one question"):
        cross_validate(torch.tensor([0.0]), torch.ones(1, 1), ["a"])


def test_flops_of_training_buy_tokens():
    p, train, answer, times = 7.0, 11.0, 13.0, 14.0
    more = inference_of_small(times=times, pretraining=train, inference=answer)
    small = 6 * p * train + 2 * p * answer * more
    assert small == pytest.approx(times * (6 * p * train + 2 * p * answer))


def test_bad_calls_are_refused():
    with pytest.raises(InputError, match="strategies, questions"):
        fit_policy(torch.ones(3), torch.ones(2, 4), ["a", "b"])
    with pytest.raises(InputError, match="at least one strategy"):
        fit_policy(torch.ones(3), torch.ones(0, 3), [])
    with pytest.raises(InputError, match="NaN"):
        fit_policy(torch.ones(3), torch.full((1, 3), torch.nan), ["a"])
    with pytest.raises(InputError, match="NaN"):
        difficulty_levels(torch.tensor([torch.nan]))
    with pytest.raises(InputError, match="at least one"):
        difficulty_levels(torch.empty(0))
    with pytest.raises(OptionError, match="bins"):
        difficulty_levels(torch.ones(2), bins=0)
    for bad in ({"times": 0.5}, {"pretraining": -1}, {"inference": 0}):
        with pytest.raises(OptionError):
            inference_of_small(**({"times": 2, "pretraining": 1, "inference": 1} | bad))
