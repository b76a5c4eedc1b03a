"""Tree-of-Frames on generators that know what they made."""

import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime._core.errors import InputError, OptionError
from testtime.decode.frames import (
    Images,
    at_least_median,
    best_version,
    checklist,
    linear_search,
    passing,
    tree_of_frames,
)
from testtime.decode.search import Path, Step


def frames(seed):
    chance = random.Random(seed)
    return lambda paths: [Step(chance.gauss(0, 1)) for _ in paths]


def walk(path):
    return tuple(step.content for step in path.steps)


def total(paths):
    return [sum(walk(path)) for path in paths]


def brightest(paths):
    return [walk(path)[-1] for path in paths]


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 6))
def test_a_tree_without_branches_is_one_plain_rollout(seed, units):
    tree = tree_of_frames(frames(seed), total, units=units, branches=())
    plain = linear_search(frames(seed), total, samples=1, units=units)
    assert tree == plain
    chance = random.Random(seed)
    assert walk(tree.best) == tuple(chance.gauss(0, 1) for _ in range(units))


@settings(deadline=None)
@given(
    st.integers(0, 99), st.lists(st.integers(1, 3), max_size=4), st.lists(st.integers(1, 3), max_size=4),
    st.sets(st.integers(0, 4)),
)  # fmt: skip
def test_the_cost_is_what_the_generator_made_and_what_the_formula_says(
    seed, branches, versions, at
):
    made = []

    def generator(paths):
        made.append(len(paths))
        return frames(seed)(paths)

    found = tree_of_frames(
        generator, total, units=5, branches=branches,
        stages=dict.fromkeys(at, (total, at_least_median)),
        images=Images(brightest, tuple(versions)),
    )  # fmt: skip
    assert found.spent.steps == sum(made)
    assert found.spent.calls == len(made) == 5
    live, expected = 1, []
    for depth in range(5):
        live *= branches[depth] if depth < len(branches) else 1
        expected.append(live * (versions[depth] if depth < len(versions) else 1))
        live = (
            live - live // 2 if depth in at else live
        )  # distinct scores: half of them, rounded up
    assert made == expected
    assert len(found.paths) == live


def test_each_unit_is_the_brightest_of_its_versions():
    kept = tree_of_frames(
        frames(0), total, units=2, branches=(2, 2), images=Images(brightest, (3, 2))
    )
    chance = random.Random(0)
    first = [max(chance.gauss(0, 1) for _ in range(3)) for _ in range(2)]
    second = [max(chance.gauss(0, 1) for _ in range(2)) for _ in range(4)]
    assert [walk(path) for path in kept.paths] == [(first[i // 2], second[i]) for i in range(4)]
    assert kept.best.score == max(map(sum, map(walk, kept.paths)))
    assert kept.spent.steps == 6 + 8
    assert kept.spent.scores == 6 + 8 + 4


def test_a_stage_scores_afresh_where_its_question_is_another():
    asked = []

    def judge(name):
        def verify(paths):
            asked.append((name, len(paths)))
            return total(paths)

        return verify

    scene, motion, end = map(judge, ("scene", "motion", "end"))
    stages = {0: (scene, at_least_median), 1: (motion, at_least_median)}
    found = tree_of_frames(frames(1), end, units=2, branches=(8,), stages=stages)
    assert asked == [("scene", 8), ("motion", 4), ("end", 2)]
    asked.clear()
    stages = {1: (end, at_least_median)}
    again = tree_of_frames(frames(1), end, units=2, branches=(8,), stages=stages)
    assert asked == [("end", 8)]
    assert found.spent.verifier_calls == 3
    assert again.spent.verifier_calls == 1

    class Judge:
        def verify(self, paths):
            return total(paths)

    own = Judge()  # each look-up of a method makes another object of it
    last = tree_of_frames(
        frames(1), own.verify, units=2, branches=(8,), stages={1: (own.verify, at_least_median)}
    )
    assert last.spent.verifier_calls == 1


def scored(*scores):
    return [Path(score=s) for s in scores]


def kept(rule, *scores):
    return [path.score for path in rule(scored(*scores))]


def test_rules_keep_what_they_say():
    assert kept(at_least_median, 3.0, 1.0, 2.0, 2.0) == [3.0, 2.0, 2.0]
    assert kept(at_least_median, -1.0) == [-1.0]
    assert kept(passing(), 1.0, 0.5, 1.0) == [1.0, 1.0]
    assert kept(passing(), 0.2, -0.5, 0.6) == [0.2, 0.6]
    assert kept(passing(), -0.5, -0.2, -0.2) == [-0.2]
    assert kept(passing(perfect=0.5), 0.5, 0.4) == [0.5]
    assert kept(best_version(2), 1.0, 2.0, 5.0, 5.0, 0.0) == [2.0, 5.0, 0.0]
    assert checklist([True, False], [3.0, 1.0]) == 1.0
    done = Path((Step(0, final=True),), 9.0)
    grown = [Path((Step(0), Step(i)), float(i)) for i in range(2)]
    assert best_version(2)([done, *grown]) == [done, grown[1]]


def test_more_samples_never_make_the_mean_worse():
    means = [
        fmean(linear_search(frames(s), total, samples=n, units=4).best.score for s in range(200))
        for n in (1, 2, 5, 10)
    ]
    assert means == sorted(means)


def test_bad_calls_are_refused():
    with pytest.raises(OptionError, match="units"):
        tree_of_frames(frames(0), total, units=0)
    with pytest.raises(OptionError, match=r"branches\[1\]"):
        tree_of_frames(frames(0), total, units=2, branches=(1, 0))
    with pytest.raises(OptionError, match=r"versions\[0\]"):
        tree_of_frames(frames(0), total, units=2, images=Images(total, (0,)))
    with pytest.raises(OptionError, match="depth 2"):
        tree_of_frames(frames(0), total, units=2, stages={2: (total, at_least_median)})
    for bad in (([], None), ([True], [1.0, 2.0])):
        with pytest.raises(InputError):
            checklist(*bad)
