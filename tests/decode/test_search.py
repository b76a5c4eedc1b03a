"""Searches on trees small enough to know every path."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import compute as reference
from testtime._core.errors import InputError, OptionError
from testtime.decode.search import Path, Step, choose, keep_best, tree_search
from testtime.decode.strategies import (
    beam_search,
    best_of_n,
    lookahead_search,
    revise,
    step_values,
)


def contents(path):
    return tuple(step.content for step in path.steps)


def value(node, seed=0):
    return random.Random(f"{seed} {node}").random()


class Tree:
    """The n-th time that a path is asked for in one batch, its child is the n-th."""

    def __init__(self, depth, branching=10**6):
        self.depth, self.branching = depth, branching
        self.asked, self.batches = 0, 0

    def __call__(self, paths):
        self.asked += len(paths)
        self.batches += 1
        seen = {}
        made = []
        for path in paths:
            child = seen[contents(path)] = seen.get(contents(path), -1) + 1
            last = len(path.steps) == self.depth - 1
            made.append(Step(child % self.branching, tokens=3, final=last))
        return made


class Judge:
    def __init__(self, seed=0):
        self.seed, self.asked = seed, 0

    def __call__(self, paths):
        self.asked += len(paths)
        return [value(contents(path), self.seed) for path in paths]


class Dice:
    """A generator with chance: steps of a path are random, some of them final."""

    def __init__(self, seed, stop=0.3):
        self.chance, self.stop, self.seen = random.Random(seed), stop, []

    def __call__(self, paths):
        self.seen.append([contents(path) for path in paths])
        return [
            Step(self.chance.randrange(100), tokens=1, final=self.chance.random() < self.stop)
            for _ in paths
        ]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(4, 2), (4, 1), (4, 4), (9, 3), (6, 2)]), st.integers(1, 4), st.integers(0, 99)
)
def test_beams_equal_their_definition(shape, depth, seed):
    samples, width = shape
    found = beam_search(Tree(depth), Judge(seed), samples=samples, width=width)
    leaves = reference.beams(
        lambda _: range(100), lambda node: value(node, seed), samples, width, depth
    )
    assert [contents(path) for path in found.paths] == leaves
    assert contents(found.best) == max(leaves, key=lambda node: value(node, seed))


@settings(deadline=None)
@given(st.integers(2, 3), st.integers(1, 4), st.integers(0, 99))
def test_a_search_that_keeps_all_is_exhaustive(branching, depth, seed):
    found = tree_search(
        Tree(depth, branching), Judge(seed), branches=lambda _: branching,
        stages=lambda _: [(Judge(1), keep_best(branching**depth))], depth=depth,
    )  # fmt: skip
    leaves = reference.every_leaf(branching, depth)
    assert [contents(path) for path in found.paths] == leaves
    assert contents(found.best) == max(leaves, key=lambda node: value(node, seed))


@settings(deadline=None)
@given(st.sampled_from([(1, 1), (4, 2), (8, 4), (6, 6)]), st.integers(0, 99), st.integers(1, 6))
def test_no_search_takes_more_than_its_budget_and_all_count_what_they_take(shape, seed, rounds):
    samples, width = shape
    for ahead in (None, 0, 2):
        tree, judge, greedy = Dice(seed), Judge(), Dice(seed + 1)
        more = {} if ahead is None else {"greedy": greedy, "steps": ahead}
        search = beam_search if ahead is None else lookahead_search
        found = search(tree, judge, samples=samples, width=width, rounds=rounds, **more)
        sizes = [len(batch) for batch in tree.seen]
        taken = sizes + [len(batch) for batch in greedy.seen]
        assert max(sizes) <= samples
        assert len(sizes) <= rounds
        assert found.spent.steps == found.spent.tokens == sum(taken)
        assert sum(taken) <= rounds * samples * (1 + (ahead or 0))
        assert found.spent.calls == len(taken)
        assert found.spent.scores == judge.asked
        assert 1 <= len(found.paths) <= samples
    tree = Dice(seed)
    found = best_of_n(tree, Judge(), samples=samples, rounds=rounds)
    assert len(found.paths) == samples == found.spent.scores
    assert found.spent.steps == sum(path.tokens for path in found.paths)


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([1, 3, 8]))
def test_beams_of_one_child_are_independent_samples(seed, samples):
    alone = best_of_n(Dice(seed), Judge(), samples=samples)
    beams = beam_search(Dice(seed), Judge(), samples=samples, width=1)
    assert alone.paths == beams.paths
    assert alone.best == beams.best
    assert alone.spent.steps == beams.spent.steps


@settings(deadline=None)
@given(st.integers(0, 99))
def test_one_sample_is_one_sample_however_it_is_called(seed):
    one = {"samples": 1}
    found = [
        best_of_n(Dice(seed, 1.0), Judge(), **one),
        beam_search(Dice(seed, 1.0), Judge(), **one),
        lookahead_search(Dice(seed, 1.0), Judge(), greedy=Dice(0), steps=3, **one),
        revise(Dice(seed, 1.0), Judge(), sequential=1, **one),
    ]
    assert len({each.paths for each in found}) == 1
    assert {each.spent.steps for each in found} == {1}


def test_lookahead_of_no_step_is_beam_search():
    ask = {"samples": 8, "width": 2}
    plain = beam_search(Dice(3), Judge(), **ask)
    ahead = lookahead_search(Dice(3), Judge(), greedy=Dice(0), steps=0, **ask)
    assert plain == ahead


def test_a_finished_beam_keeps_its_place_and_is_not_scored_again():
    def generator(paths):  # the second first step is final and the best there is
        return [
            Step(i, final=(not path.steps and i == 1) or len(path.steps) == 2)
            for i, path in enumerate(paths)
        ]

    judged = []

    def judge(paths):
        judged.extend(map(contents, paths))
        return [0.9 if contents(path) == (1,) else 0.1 for path in paths]

    found = beam_search(generator, judge, samples=4, width=2)
    assert contents(found.best) == (1,)
    assert judged.count((1,)) == 1
    # one live beam beside the finished one: 4 + 2 + 2 or fewer steps
    assert found.spent.steps == 4 + 2 + 2


@pytest.mark.parametrize(("samples", "width"), [(16, 4), (12, 3), (7, 1), (2, 1), (4, 2)])
def test_the_width_is_the_root_or_the_next_divisor(samples, width):
    same = [beam_search(Tree(3), Judge(), samples=samples, width=given) for given in (None, width)]
    assert same[0] == same[1]


def test_revisions_see_the_latest_attempts_and_vote_in_two_rounds():
    seen = []

    def reviser(paths):
        seen.append([contents(path) for path in paths])
        return [Step(path.steps[-1].content + 1 if path.steps else 10 * i)
                for i, path in enumerate(paths)]  # fmt: skip

    found = revise(reviser, lambda paths: [0.5] * len(paths), samples=12, sequential=6)
    assert seen[0] == [(), ()]
    assert seen[-1] == [(1, 2, 3, 4), (11, 12, 13, 14)]
    assert [contents(path)[0] for path in found.paths] == [*range(6), *range(10, 16)]
    # even numbers win the first chain (0.9 each), three odd ones have less
    scores = iter([0.9, 0.1] * 3 + [0.2] * 6)
    voted = revise(
        reviser, lambda paths: [next(scores) for _ in paths], samples=12, sequential=6,
        answer=lambda path: path.steps[0].content % 2,
    )  # fmt: skip
    assert contents(voted.best) == (0,)


def test_the_vote_decides_where_there_are_answers():
    paths = [Path((Step(a),), s) for a, s in (("x", 0.9), ("y", 0.5), ("y", 0.6), (None, 1.0))]
    assert choose(paths).score == 1.0
    assert choose(paths, lambda path: path.steps[0].content).score == 0.6
    assert choose(paths, lambda path: None).score == 1.0


def test_values_of_steps_are_shares_of_right_rollouts():
    chance = random.Random(0)

    def generator(paths):
        return [Step(chance.random() < 0.25, final=len(path.steps) >= 1) for path in paths]

    done = Path((Step(True, final=True),))
    values = step_values(
        generator, [Path(), done], lambda path: path.steps[-1].content, rollouts=2000
    )
    assert values[0] == pytest.approx(0.25, abs=0.04)
    assert values[1] == 1.0


def test_bad_calls_are_refused():
    def good(paths):
        return [Step(0, final=True) for _ in paths]

    for bad, say in (
        ({"samples": 0}, "samples"), ({"samples": 4, "width": 3}, "divisor"),
        ({"samples": 4, "width": 0}, "width"), ({"samples": 4, "rounds": 0}, "depth"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=say):
            beam_search(good, Judge(), **bad)
    with pytest.raises(OptionError, match="divisor"):
        revise(good, Judge(), samples=4, sequential=3)
    with pytest.raises(OptionError, match="steps"):
        lookahead_search(good, Judge(), greedy=good, samples=1, steps=-1)
    with pytest.raises(InputError, match="0 steps for 2 paths"):
        best_of_n(lambda paths: [], Judge(), samples=2)
    with pytest.raises(InputError, match="1 scores for 2 paths"):
        best_of_n(good, lambda paths: [1.0], samples=2)
    with pytest.raises(InputError, match="NaN for 2 of 2"):
        best_of_n(good, lambda paths: [float("nan")] * 2, samples=2)
    with pytest.raises(InputError, match="weights"):
        best_of_n(good, lambda paths: [-1.0] * 2, samples=2, answer=contents)
    with pytest.raises(InputError, match="without a score"):
        choose([Path()])
    with pytest.raises(InputError, match="no path"):
        choose([])
    with pytest.raises(InputError, match="kept no path"):
        tree_search(good, Judge(), branches=lambda _: 1, depth=1,
                    stages=lambda _: [(Judge(), lambda paths: [])])  # fmt: skip
