import random
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import compute as reference
from testtime._core.errors import InputError
from testtime.decode.votes import (
    hierarchical_vote,
    majority_vote,
    normalised,
    shortest_answer,
    shortest_majority_vote,
    weighted_vote,
)

ballots = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(2, 9000)), max_size=30
)
VOTES = [
    lambda answers, numbers: majority_vote(answers),
    weighted_vote,
    shortest_majority_vote,
    shortest_answer,
]


@settings(deadline=None)
@given(ballots)
def test_votes_equal_their_definitions(cast):
    answers, numbers = [a for a, _ in cast], [n for _, n in cast]
    assert majority_vote(answers) == reference.weighted(answers, [1] * len(cast))
    assert weighted_vote(answers, numbers) == reference.weighted(answers, numbers)
    expected = reference.shortest_majority(answers, numbers)
    assert shortest_majority_vote(answers, numbers) == expected


@settings(deadline=None)
@given(ballots, st.integers(2, 9000))
def test_equal_lengths_and_equal_weights_are_a_majority_vote(cast, number):
    answers, numbers = [a for a, _ in cast], [number] * len(cast)
    assert shortest_majority_vote(answers, numbers) == majority_vote(answers)
    assert weighted_vote(answers, numbers) == majority_vote(answers)
    assert hierarchical_vote([[a] for a in answers], [[n] for n in numbers]) == majority_vote(
        answers
    )


@pytest.mark.parametrize("vote", VOTES)
@settings(deadline=None)
@given(cast=ballots, seed=st.integers(0, 100))
def test_the_order_of_samples_changes_exact_ties_only(vote, cast, seed):
    # lengths and weights that make every group's weight its own
    distinct = [(a, n + 0.1 * "abc".find(a or "")) for a, n in cast]
    mixed = random.Random(seed).sample(distinct, len(distinct))
    first, second = (
        vote([a for a, _ in order], [n for _, n in order]) for order in (distinct, mixed)
    )
    if first != second:
        answers, numbers = [a for a, _ in distinct], [n for _, n in distinct]
        # a tie: without the samples of the one, the other wins in either order, and as heavily
        assert {first, second} <= {a for a in answers if a is not None}
        assert _weight(vote, first, answers, numbers) == _weight(vote, second, answers, numbers)


def _weight(vote, answer, answers, numbers):
    own = [n for a, n in zip(answers, numbers, strict=True) if a == answer]
    return {
        VOTES[0]: len(own), weighted_vote: sum(own), shortest_answer: min(own),
        shortest_majority_vote: (len(own), sum(own)),
    }[vote]  # fmt: skip


@settings(deadline=None)
@given(ballots)
def test_samples_without_an_answer_do_not_count(cast):
    answered = [(a, n) for a, n in cast if a is not None]
    for vote in VOTES:
        whole, part = (vote([a for a, _ in c], [n for _, n in c]) for c in (cast, answered))
        assert whole == part
        assert (whole is None) == (not answered)


def test_the_penalty_is_mild():
    assert shortest_majority_vote(["x"] * 9 + ["y"] * 8, [6000] * 9 + [3000] * 8) == "x"
    assert shortest_majority_vote(["x"] * 2 + ["y"] * 2, [6000] * 2 + [3000] * 2) == "y"


def test_a_chain_sends_its_winner_on():
    # flat, "b" has 1.2 against 1.1; its votes are lost inside the chains that "a" and "c" win
    chains = [["a", "b", "b"], ["c", "b"], ["a"]]
    weights = [[0.9, 0.4, 0.4], [0.5, 0.4], [0.2]]
    assert weighted_vote([*chain.from_iterable(chains)], [*chain.from_iterable(weights)]) == "b"
    assert hierarchical_vote(chains, weights) == "a"
    assert hierarchical_vote([["a"], [None, None]], [[0.1], [0.9, 0.9]]) == "a"
    assert hierarchical_vote([], []) is None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (r"thus $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"), (r"\boxed{3} or \boxed{4}", "4"),
        (r"\boxed{\sqrt{\frac{1}{x^{2}}}}", r"\sqrt{\frac{1}{x^{2}}}"),
        (r"\boxed{3} and \boxed{4", "3"),
        ("12,345.50", "24691/2"), ("1,2", "1,2"), ("  New   York. ", "new york"), ("0.50", "1/2"),
        ("1/0", "1/0"), ("-7", "-7"), ("3 6", "3 6"), ("3 / 6", "1/2"), ("", ""), ("1e999999999", "1e999999999"), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_answers_that_mean_the_same_are_one_key(text, key):
    assert normalised(text) == key


def test_bad_ballots_are_refused():
    with pytest.raises(InputError, match="2 answers and 1 weights"):
        weighted_vote(["a", "b"], [1.0])
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="weights hold"):
            weighted_vote(["a", "b"], [1.0, weight])
    with pytest.raises(InputError, match="above 1"):
        shortest_majority_vote(["a"], [1])
    assert shortest_majority_vote([None, "a"], [0, 5]) == "a"
    with pytest.raises(InputError, match="finite"):
        shortest_answer(["a"], [float("nan")])
    with pytest.raises(InputError, match="as many"):
        hierarchical_vote([["a"]], [])
    with pytest.raises(InputError, match="as many"):
        hierarchical_vote([["a"]], [[1.0, 2.0]])
