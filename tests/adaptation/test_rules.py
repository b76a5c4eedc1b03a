"""SQRL: rules of training data, in numbers and as text, and a model that learns to keep them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import testtime as tt
from reference import rules as reference
from testtime._core.errors import InputError, NeedsSource, TesttimeWarning
from testtime._core.outcomes import Outcome
from testtime.adaptation.methods.sqrl import rule_losses, sqrl
from testtime.adaptation.parts import rules as parts
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.rules import (
    Intervals,
    class_rules,
    nested_intervals,
    outside,
    outside_nested,
    quantile_intervals,
    rules_from_json,
    rules_to_json,
    trusted,
    violations,
)
from testtime.adaptation.ranks import Ranks


def table(n=150, features=5, classes=3, seed=0):
    """Features of which two tell classes apart, and one has few values."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=chance)
    values = torch.randn(n, features, generator=chance, dtype=torch.float64)
    values[:, :2] += 2 * labels[:, None]
    values[:, 2] = values[:, 2].round()
    return values, labels


def learnt(values, labels, purity=0.9, validated=0.8, limit=1000, groups=5):
    place = torch.arange(len(values))
    return class_rules(
        values, labels, place * groups // len(values), place % 3 == 2,
        purity=purity, validated=validated, limit=limit,
    )  # fmt: skip


def as_set(rules):
    columns = [rules[name].tolist() for name in parts.COLUMNS]
    return sorted(zip(*columns, strict=True))


@pytest.mark.parametrize("size", [4_000_000, 300])
def test_rules_equal_those_of_the_reference(monkeypatch, size):
    monkeypatch.setattr(parts, "SIZE", size)  # few columns at a time, or all
    for seed in range(4):
        values, labels = table(seed=seed)
        rules = learnt(values, labels)
        place = np.arange(150)
        expected = reference.class_rules(
            values.numpy(), labels.numpy(), place * 5 // 150, place % 3 == 2, 0.9, 0.8
        )
        assert len(expected) > 2
        np.testing.assert_allclose(as_set(rules), sorted(expected), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 500), coverage=st.floats(50, 99))
def test_intervals_are_numpy_s_percentiles(seed, coverage):
    values, labels = table(seed=seed)
    found = quantile_intervals(values, labels, classes=4, coverage=coverage)
    for label in range(3):
        own = values[labels == label].numpy()
        tails = np.percentile(own, [(100 - coverage) / 2, (100 + coverage) / 2], axis=0)
        np.testing.assert_allclose(torch.stack(found)[:, label].numpy(), tails, atol=1e-6)
    assert found.low[3].isnan().all()  # a class without samples


def test_a_fresh_split_leaves_two_percent_of_the_intervals():
    values, labels = table(6000, features=20)
    rules = quantile_intervals(values[:3000], labels[:3000], classes=3)
    count, distance = outside(values[3000:], labels[3000:], rules)
    assert float(count.sum()) / (3000 * 20) == pytest.approx(0.02, abs=0.005)
    assert ((distance > 0) == (count > 0)).all()


def test_nested_intervals_are_percentiles_within_quartiles():
    values, labels = table(n=400)
    found = nested_intervals(values, labels, classes=4, coverage=90)
    own = values[labels == 1].numpy()
    edges = np.percentile(own[:, 0], [25, 50, 75])
    for place in range(4):
        part = own[(own[:, 0, None] > edges).sum(1) == place, 3]
        for end, percent in zip(found.rules, (5, 95), strict=True):
            assert float(end[1, 0, place, 3]) == pytest.approx(
                np.percentile(part, percent), rel=1e-4, abs=1e-5
            )
    assert found.rules.low[:, 2, :, 2].isnan().all()  # a feature says nothing of itself
    assert found.rules.low[3].isnan().all()  # a class without samples
    count, distance = outside_nested(values, labels, found)
    assert 0.05 * 20 < float(count.double().mean()) < 0.15 * 20
    assert torch.equal(count > 0, distance > 0)


def test_intervals_that_another_split_does_not_confirm_are_dropped():
    low = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0]])
    rules = Intervals(low, torch.tensor([[0.5, 0.5, 0.0, 2.0, 0.5]]))
    held = Intervals(low, torch.tensor([[0.45, 0.40, 0.0, 2.0, 0.50]]))
    kept = ~trusted(rules, held, overlap=0.8).low.isnan()
    assert kept.tolist() == [[True, False, False, False, True]]  # 0.8 is not more than 0.8
    kept = ~trusted(rules, held, overlap=0.6, limit=2).low.isnan()
    assert kept.tolist() == [[True, False, False, False, True]]
    count, _ = outside(torch.full((1, 5), 9.0), torch.tensor([0]), trusted(rules, held))
    assert count.tolist() == [2]
    values, labels = table(n=2000)
    values = values / 20  # narrower than 1
    one = nested_intervals(values[::2], labels[::2], classes=3)
    other = nested_intervals(values[1::2], labels[1::2], classes=3, edges=one.edges)
    assert torch.equal(one.edges, other.edges)
    alike = trusted(one.rules, other.rules, overlap=0.5)
    assert 0 < int((~alike.low.isnan()).sum()) < alike.low.numel()


def test_rules_go_to_json_and_back():
    values, labels = table()
    rules = learnt(values.float(), labels)
    again = rules_from_json(rules_to_json(rules))
    assert again.keys() == rules.keys()
    for name, column in rules.items():
        assert torch.equal(again[name], column)
        assert again[name].dtype == column.dtype
    first = json.loads(rules_to_json(rules))[0]
    assert list(first) == ["if feature", list(first)[1], "then class", "with F1 from", "to"]
    none = {name: column[:0] for name, column in rules.items()}
    assert rules_from_json(rules_to_json(none))["feature"].shape == (0,)
    for bad in ("no json", "[3]", '[{"if feature": 1}]', '{"a": 1}'):
        with pytest.raises(InputError, match="no rules"):
            rules_from_json(bad)


def test_right_answers_break_few_rules_and_wrong_ones_many():
    values, labels = table()
    rules = learnt(values, labels, purity=0.95, validated=0.9)
    right, wrong = (violations(values, y, rules).sum() for y in (labels, (labels + 1) % 3))
    assert 10 * right < wrong


def test_data_without_rules_have_none():
    values, labels = (
        torch.randn(40, 3, generator=torch.Generator().manual_seed(0)),
        torch.arange(40) % 2,
    )
    rules = learnt(values, labels, purity=1.0, validated=1.0)
    assert [len(column) for column in rules.values()] == [0] * 6


def test_the_limit_keeps_the_rules_that_match_most():
    values, labels = table()
    few, many = learnt(values, labels, limit=2), learnt(values, labels)
    assert few["label"].bincount().max() == 2
    size = parts.matches(values[torch.arange(150) % 3 != 2], many).sum(0)
    for label in few["label"].unique().tolist():
        kept = parts.matches(values[torch.arange(150) % 3 != 2], few).sum(0)[few["label"] == label]
        assert kept.min() >= size[many["label"] == label].sort().values[-2:].min() - 5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 500))
def test_the_loss_equals_its_definition(seed):
    values, labels = table(seed=seed % 5)
    rules = learnt(values, labels)
    chance = torch.Generator().manual_seed(seed)
    batch = values[torch.randperm(150, generator=chance)[:20]]
    logits = 2 * torch.randn(20, 3, generator=chance, dtype=torch.float64)
    losses = rule_losses(logits, batch, rules, ranks=Ranks())
    expected = reference.rule_loss(logits.numpy(), batch.numpy(), as_set(rules))
    loss = losses.sum() / (losses > 0).sum().clamp(min=1)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def linear(values, labels):
    model = nn.Linear(5, 3, dtype=torch.float64)
    with torch.no_grad():
        chance = torch.Generator().manual_seed(0)
        model.weight.copy_(torch.randn(3, 5, generator=chance))
        model.bias.zero_()
    source = tt.fit_source(model, [(values[:80], labels[:80]), (values[80:], labels[80:])],
                           methods=[sqrl(purity=0.9, validated=0.8)])  # fmt: skip
    return model, source


def test_a_step_follows_the_loss_and_is_told():
    values, labels = table()
    model, source = linear(values, labels)
    recipe = replace(sqrl(purity=0.9, validated=0.8), optimizer=SGD(lr=0.1))
    adapter = tt.adapt(model, recipe, source=source)
    rules, x = source["rules"], values[:40]
    answer = adapter(x)
    assert torch.equal(answer, model(x))
    weight = model.weight.detach().clone().requires_grad_()
    losses = rule_losses(x @ weight.T + model.bias.detach(), x, rules, ranks=Ranks())
    (losses.sum() / (losses > 0).sum()).backward()
    moved = adapter.snapshot().tensors["weight"]
    torch.testing.assert_close(moved, (weight - 0.1 * weight.grad).detach())
    event = adapter.events[-1]
    assert event.outcome is Outcome.ADAPTED
    assert event.measured["violations"] == violations(x, answer.argmax(1), rules).sum()


def test_nothing_moves_where_no_rule_is_broken():
    values, labels = table()
    model, source = linear(values, labels)
    adapter = tt.adapt(model, sqrl(purity=0.9, validated=0.8), source=source)
    adapter(values[:40])
    before = adapter.snapshot()
    nowhere = {name: column[:0] for name, column in source["rules"].items()}
    adapter._engine.known["rules"] = nowhere
    adapter(values[40:80])
    assert adapter.events[-1].outcome is Outcome.NOTHING_RELIABLE
    after = adapter.snapshot()
    assert after.tensors is before.tensors
    assert adapter.counts.skipped == 1


def test_rules_are_saved_with_what_is_known_and_needed(tmp_path):
    values, labels = table()
    model, source = linear(values, labels)
    source.save(tmp_path / "known")
    again = tt.SourceKnowledge.load(tmp_path / "known")
    assert all(torch.equal(again["rules"][name], own) for name, own in source["rules"].items())
    with pytest.raises(NeedsSource, match="rules"):
        tt.adapt(model, "sqrl")


def test_data_that_no_rule_describes_are_told_of_before_the_model_adapts():
    values, labels = torch.rand(60, 4), torch.arange(60) % 3
    model = nn.Linear(4, 3)
    with pytest.warns(TesttimeWarning, match="no rule and sqrl will answer as the source"):
        source = tt.fit_source(model, [(values, labels)], methods=["sqrl"])
    adapter = tt.adapt(model, "sqrl", source=source)
    assert torch.equal(adapter(values), model(values))


def test_every_third_sample_validates_and_batches_are_groups():
    values, labels = table()
    _, source = linear(values, labels)
    place = torch.arange(150)
    expected = class_rules(
        values, labels, (place >= 80).long(), place % 3 == 2,
        purity=0.9, validated=0.8, limit=1000,
    )  # fmt: skip
    assert len(expected["label"]) > 2
    assert as_set(source["rules"]) == as_set(expected)
