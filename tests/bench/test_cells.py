"""Cells: what is the same has the same record, and what is written can be read."""

import pytest

from testtime._core.errors import OptionError, UnknownName
from testtime.bench.cells import label, parse_method, plan, split_methods, stream_words
from testtime.streams.scenarios import Scenario


def named(*methods):
    stream = Scenario(domains=("fog",))
    return plan(methods=methods, models=["m"], data="d", streams=[stream], seeds=1)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("tent", "{}"),
        (" tent ( lr = 0.01 ) ", '{"lr": 0.01}'),
        ("tent(lr=1)", '{"lr": 1.0}'),
        ("tent(lr=2e-3)", '{"lr": 0.002}'),
        ("tent(steps=2, lr=0.001)", '{"steps": 2}'),
        ("tent(episodic=True)", '{"episodic": true}'),
        ("tent()", "{}"),
        ("eata(redundancy=0.4)", '{"redundancy": 0.4}'),
        ("eata(redundancy=None)", "{}"),
        ("lame(affinity='rbf')", '{"affinity": "rbf"}'),
    ],
)
def test_options_are_read_and_written_the_same(text, options):
    assert parse_method(text)[1] == options
    method, _ = parse_method(text)
    assert parse_method(label({"method": method, "options": options})) == (method, options)


@pytest.mark.parametrize(
    "text",
    [
        "tent(lr", "tent lr=1", "tent(0.1)", "tent)", "tent(lr=x)", "tent(lr=__import__('os'))",
        "tent(lr=1)(steps=2)", "tent(**{})", "tent(lr=1, lr=2)", "tent(lr='a')", "tent(steps=1.5)",
        "tent(steps=True)", "tent(episodic=1)", "tent(lrr=1)", "sar(scope=1)", "tent(steps=0)",
        "tent(lr=None)", "tent(lr=[1])", "eata(redundancy='a')", "tent(lr=0.1),x", f"tent(lr={10**400})",
        f"tent(steps={10**400})",
    ],
)  # fmt: skip
def test_what_is_no_method_is_refused(text):
    with pytest.raises((OptionError, UnknownName)):
        parse_method(text)


def test_commas_in_brackets_belong_to_the_method():
    assert split_methods("tent,, sar(lr=0.1, margin=0.5),lame") == [
        "tent", "sar(lr=0.1, margin=0.5)", "lame",
    ]  # fmt: skip


def test_all_is_every_method_once_and_the_source_first():
    import testtime as tt

    methods = [cell.method for cell in named("all", "tent")]
    assert methods[0] == "source"
    assert sorted(methods) == sorted(tt.methods())


def test_every_value_of_a_record_changes_its_key():
    (cell,) = named()
    changes = {"method": "tent", "options": '{"lr": 1.0}', "model": "n", "data": "e",
               "stream": "x", "seed": 1, "device": "cuda", "threads": 2, "paced": True}  # fmt: skip
    assert set(changes) == set(vars(cell))
    keys = {type(cell)(**{**vars(cell), name: value}).key for name, value in changes.items()}
    assert len(keys | {cell.key}) == len(changes) + 1


@pytest.mark.parametrize(
    "text",
    ["continual", "stationary,domains=fog", "recurring,sorted,rounds=4,severity=3,samples=50",
     "mixed,dirichlet,delta=0.01,long-tailed,ratio=20.0", "gradual,inverse,domains=fog+snow",
     "continual,unknown=noise+class:3,unknown_share=0.25"],
)  # fmt: skip
def test_words_of_a_stream_are_read_back(text):
    scenario = Scenario.parse(text)
    assert Scenario.parse(stream_words(scenario)) == scenario
