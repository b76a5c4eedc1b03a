import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from reference import codes as reference
from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.decode.ranking import ALGORITHMS, ndcg, rank

different = st.lists(st.integers(0, 999), min_size=1, max_size=40, unique=True)
every = pytest.mark.parametrize("algorithm", ALGORITHMS)


class Judge:
    """Compares by score, ties undecided, and counts."""

    def __init__(self, scores):
        self.scores, self.calls, self.pairs = scores, [], []

    def __call__(self, pairs):
        self.calls.append(len(pairs))
        self.pairs += [frozenset(pair) for pair in pairs]
        return [(self.scores[a] > self.scores[b]) - (self.scores[a] < self.scores[b])
                for a, b in pairs]  # fmt: skip


@every
@settings(max_examples=60, deadline=None)
@given(scores=different, data=st.data())
def test_a_judge_without_contradictions_gives_the_sorted_order(algorithm, scores, data):
    k = data.draw(st.integers(1, len(scores)))
    batch = data.draw(st.integers(1, 9))
    judge = Judge(scores)
    found = rank(judge, len(scores), k=k, algorithm=algorithm, batch_size=batch)
    assert [scores[i] for i in found.order] == sorted(scores, reverse=True)[:k]
    assert found.inferences == len(judge.calls)
    assert max(judge.calls, default=0) <= batch
    assert len(judge.pairs) == len(set(judge.pairs)) == found.comparisons - found.hits


@every
@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_ties_keep_every_item_once_and_the_best_first(algorithm, scores):
    found = rank(Judge(scores), len(scores), algorithm=algorithm)
    assert sorted(found.order) == list(range(len(scores)))
    assert [scores[i] for i in found.order] == sorted(scores, reverse=True)


@every
@settings(max_examples=40, deadline=None)
@given(answers=st.lists(st.integers(-1, 1), min_size=45, max_size=45), k=st.integers(1, 10))
def test_a_judge_full_of_contradictions_still_ends_with_k_different_items(algorithm, answers, k):
    table = iter(answers)
    known = {(a, b): next(table) for a in range(10) for b in range(a + 1, 10)}
    found = rank(lambda pairs: [known[pair] for pair in pairs], 10, k=k, algorithm=algorithm)
    assert len(set(found.order)) == k


@settings(max_examples=60, deadline=None)
@given(scores=different, data=st.data())
def test_calls_of_quicksort_are_those_of_the_formula(scores, data):
    k, b = data.draw(st.integers(1, len(scores))), data.draw(st.integers(1, 9))
    found = rank(Judge(scores), len(scores), k=k, batch_size=b)
    assert found.inferences == reference.quicksort_inferences(scores, k, b)


@settings(max_examples=60, deadline=None)
@given(scores=different, data=st.data())
def test_bubblesort_asks_what_the_textbook_asks_and_the_cache_answers_what_returns(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    asked, fresh = reference.bubble_comparisons(scores, k)
    cached = rank(Judge(scores), len(scores), k=k, algorithm="bubblesort")
    plain = rank(Judge(scores), len(scores), k=k, algorithm="bubblesort", cache=False)
    assert (cached.comparisons, cached.inferences, cached.hits) == (asked, fresh, asked - fresh)
    assert (plain.comparisons, plain.inferences, plain.hits) == (asked, asked, 0)


def test_batches_shorten_quicksort_and_leave_heapsort():
    scores = [(37 * i) % 101 for i in range(100)]
    calls = {(algorithm, b): rank(Judge(scores), 100, k=10, algorithm=algorithm, batch_size=b,
                                  cache=False).inferences
             for algorithm in ("heapsort", "quicksort") for b in (1, 2, 64)}  # fmt: skip
    assert calls["heapsort", 1] == calls["heapsort", 64]
    assert calls["quicksort", 64] < calls["quicksort", 2] < calls["quicksort", 1]


def test_wrong_calls_are_refused():
    with pytest.raises(OptionError, match="k=4"):
        rank(Judge([1, 2]), 2, k=4)
    with pytest.raises(OptionError, match="count=0"):
        rank(Judge([]), 0)
    with pytest.raises(OptionError, match="batch_size=0"):
        rank(Judge([1, 2]), 2, batch_size=0)
    with pytest.raises(UnknownName, match="did you mean quicksort"):
        rank(Judge([1, 2]), 2, algorithm="quiksort")
    with pytest.raises(InputError, match=r"answered \[\] to 1"):
        rank(lambda pairs: [], 2)
    with pytest.raises(InputError, match=r"answered \[2\]"):
        rank(lambda pairs: [2], 2)


@settings(max_examples=30, deadline=None)
@given(gains=st.lists(st.integers(0, 5), min_size=2, max_size=15), k=st.integers(1, 12))
def test_ndcg_equals_scikit_learn(gains, k):
    order = sorted(range(len(gains)), key=lambda i: (7 * i) % len(gains))
    scores = [0.0] * len(gains)
    for place, item in enumerate(order):
        scores[item] = -float(place)
    expected = metrics.ndcg_score([gains], [scores], k=k)
    assert math.isclose(ndcg(order, gains, k=k), expected, abs_tol=1e-12)


def test_ndcg_without_a_relevant_item_is_zero_and_without_gains_an_error():
    assert ndcg([1, 0], [0.0, 0.0]) == 0
    for bad in ([], [-1.0, 2.0], [math.nan, 1.0]):
        with pytest.raises(InputError):
            ndcg(range(len(bad)), bad)
