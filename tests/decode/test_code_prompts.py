import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import codes as reference
from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.decode.code_prompts import (
    KINDS,
    ORDER,
    compress_code,
    rank_kinds,
    tokens,
    without_kind,
)

SOURCE = '''@cached
def total(items: list[int], *, start=0) -> int:
    """Sums é."""
    if (lambda n: n)(items):  # not empty
        for i, x in enumerate(items):
            start += x.value(i)
    elif not start and "é": return 0
    match = items
    match items:
        case [first, *_] if first in match:
            pass
    return [y for y in start if y]
'''
METHOD = "".join(f"    {line}\n" for line in SOURCE.splitlines())
orders = st.permutations(KINDS).flatmap(lambda all_: st.integers(0, 6).map(lambda n: all_[:n]))


def kinds_of(source):
    return [(token.text, token.kind) for token in tokens(source)]


def test_kinds_of_one_function():
    found = kinds_of(SOURCE)
    head = found[: [text for text, _ in found].index('"""Sums é."""')]
    assert {kind for _, kind in head} == {"signature"}
    assert (head[0][0], head[-1][0]) == ("@", ":")
    body = found[len(head) :]
    assert body[0] == ('"""Sums é."""', "other")
    of = dict(body)
    assert [of[word] for word in ("if", "for", "elif", "case")] == ["structure"] * 4
    assert [of[word] for word in ("enumerate", "value", "lambda")] == ["invocation"] * 3
    assert [of[word] for word in ("+=", "(", "not", ":", "in")] == ["symbol"] * 5
    assert [of[word] for word in ("pass", "return", "0", "# not empty")] == ["other"] * 4
    assert [kind for text, kind in body if text == "match"] == [
        "identifier",  # a name that is assigned
        "structure",
        "structure",  # the same name in the head of a case
    ]
    assert [kind for text, kind in body if text == "start"] == [
        "identifier", "structure", "identifier"]  # fmt: skip


def test_an_indented_method_has_the_kinds_of_the_function():
    assert kinds_of(METHOD) == kinds_of(SOURCE)
    assert all(METHOD[t.start : t.end] == t.text for t in tokens(METHOD))


@settings(max_examples=80, deadline=None)
@given(source=st.sampled_from([SOURCE, METHOD]), ratio=st.floats(0, 1), order=orders)
def test_removal_equals_the_reference(source, ratio, order):
    found = tokens(source)
    texts, kinds = [t.text for t in found], [t.kind for t in found]
    rest = [kind for kind in KINDS if kind not in order]
    if len(rest) > 1:  # of kinds that were not named none goes before another
        order = [*order, *rest]
    expected = reference.shortened(texts, kinds, ratio, order)
    assert len(expected) == round(len(texts) * (1 - ratio))
    left = compress_code(source, ratio, order=order)
    for text in expected:  # in their old order
        assert text in left
        left = left[left.index(text) + len(text) :]


def test_ratio_zero_changes_nothing_and_one_leaves_nothing():
    assert compress_code(SOURCE, 0) == SOURCE
    assert compress_code(METHOD, 0) == METHOD
    assert compress_code(SOURCE, 1) == compress_code("", 0.5) == ""


def test_lines_and_indents_stay_where_tokens_stay():
    assert compress_code("if a:\n    f(x)\n    g(y)\n", 0.55, order=("symbol", "structure")) == (
        "if\n    f x\n    g y"
    )
    assert compress_code("a = 1\r\nb = 2\r\n", 0.5, order=("symbol", "other")) == "a 1\r\nb"
    assert compress_code("a = 1\r\nb = 2\r\n", 0.6, order=("symbol", "other")) == "a\nb"


def test_without_kind_and_the_order_found_by_ablation():
    assert without_kind(SOURCE, "signature")[0].lstrip().startswith('"""Sums')

    def loss(codes):  # only names count, and of those the called ones most
        return sum(2 * ("go" not in code) + ("x" not in code) for code in codes)

    found = rank_kinds(["x = go(1)", "if x: go(2)"], loss)
    # x, =, go, (, 1, )  and  if, x, :, go, (, 2, )
    assert found["symbol"] == 0
    assert found["structure"] == pytest.approx(1 / (2 / 13))
    assert found["identifier"] == pytest.approx(1 / (1 / 13))
    assert found["invocation"] == pytest.approx(4 / (4 / 13))
    assert list(found)[:2] == ["symbol", "structure"]
    assert math.isnan(found["signature"])
    assert list(found)[-2:] == ["signature", "other"]


def test_what_is_no_code_is_refused():
    for source in ("def f(:", "x = (", "\0", "a\rb", "x = 'a"):
        with pytest.raises(InputError):
            tokens(source)
    with pytest.raises(OptionError, match=r"ratio=1\.5"):
        compress_code(SOURCE, 1.5)
    with pytest.raises(OptionError, match="twice"):
        compress_code(SOURCE, 0.5, order=("symbol", "symbol"))
    with pytest.raises(UnknownName, match="did you mean symbol"):
        compress_code(SOURCE, 0.5, order=("symbols",))
    with pytest.raises(InputError, match="no example"):
        rank_kinds([], len)


def test_the_default_order_names_every_kind():
    assert set(ORDER) == set(KINDS)
