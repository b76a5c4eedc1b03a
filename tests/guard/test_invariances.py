"""What must change nothing, or change with its cause: units, moves, turns, the order of classes and of signals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime.guard.betting import Mixture
from testtime.guard.collapse import Collapse
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.feature_shift import feature_shift
from testtime.guard.independence import Independence
from testtime.guard.monitor import Monitor
from testtime.guard.predictive_uncertainty import predictive_uncertainty
from testtime.guard.relative_uncertainty import RelativeUncertainty
from testtime.guard.tarp import tarp
from testtime.guard.two_sample import TwoSample
from testtime.guard.witnesses import WITNESSES

SEEDS = st.integers(0, 10**6)


def draw(seed, *shape):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=chance, dtype=torch.float64)


def turned(x, seed):
    """Turned, and moved."""
    turn = torch.linalg.qr(draw(seed, x.shape[1], x.shape[1]))[0]
    return x @ turn + 10 * draw(seed + 1, x.shape[1])


INCREASING = {
    "cubed": lambda x: x**3, "exp": torch.exp, "flat": torch.atan, "units": lambda x: 1e-3 * x + 7,
    "far": lambda x: 1e200 * x,
}  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, name=st.sampled_from(sorted(INCREASING)), ties=st.booleans())
def test_no_increasing_map_of_a_signal_changes_a_bet_on_exchangeability(seed, name, ties):
    reference, stream = draw(seed, 60, 2), draw(seed + 1, 50, 2) + 0.5
    if ties:
        reference, stream = (each.round() for each in (reference, stream))
    plain = Monitor(Exchangeability.fit(reference, seed=seed)).update(stream)
    mapped = INCREASING[name]
    other = Monitor(Exchangeability.fit(mapped(reference), seed=seed)).update(mapped(stream))
    assert torch.equal(other.parts, plain.parts)
    assert plain.parts.abs().max() > 0


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, beta=st.floats(0, 2))
@pytest.mark.parametrize("witness", WITNESSES)
def test_moves_and_turns_change_no_bet_on_independence(witness, seed, beta):
    x = draw(seed, 40, 3)
    y = beta * x[:, :2] + draw(seed + 1, 40, 2)
    test = Independence(gamma_x=0.2, gamma_y=0.3, witness=witness, bets=Mixture(fractions=(0.5,)))
    plain = Monitor(test).update(x, y).log_wealth
    other = Monitor(test).update(turned(x, seed + 2), turned(y, seed + 4)).log_wealth
    torch.testing.assert_close(other, plain, atol=1e-6, rtol=1e-6)
    assert plain != 0


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_units_moves_and_turns_change_no_bet_on_two_samples(seed, scale):
    first, reference, new = draw(seed, 3, 40, 2)
    new = new + 0.5

    def wealth(moved):
        test = TwoSample.fit(moved(first), bets=Mixture(fractions=(0.5,)))
        return Monitor(test).update(moved(reference), moved(new)).log_wealth

    torch.testing.assert_close(
        wealth(lambda x: scale * turned(x, seed)), wealth(lambda x: x), atol=1e-6, rtol=1e-6
    )


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_neither_the_order_of_classes_nor_how_sure_answers_are_counts_as_collapse(seed):
    adapted, source = draw(seed, 2, 150, 5)
    test = Collapse(classes=5, share=0.05, narrowness=0.0, disagreement=0.1)
    plain = Monitor(test).update(adapted, source)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    surer = 1 + 9 * draw(seed + 1, 150, 1).abs()
    for ours, theirs in (
        (adapted[:, order], source[:, order]),
        (surer * adapted + draw(seed + 2, 150, 1), source),
    ):
        other = Monitor(test).update(ours, theirs)
        torch.testing.assert_close(other.parts, plain.parts)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, members=st.integers(1, 5), classes=st.integers(1, 5), scale=st.floats(0, 30))
def test_uncertainties_know_no_order_and_are_never_negative(seed, members, classes, scale):
    logits = scale * draw(seed, members, 3, classes)
    found = predictive_uncertainty(logits)
    chance = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(size, generator=chance) for size in (members, classes)]
    moved = logits[orders[0]][:, :, orders[1]] + draw(seed + 1, members, 3, 1)
    other = predictive_uncertainty(moved)
    for name in ("total", "aleatoric", "epistemic", "entropy", "mutual_information"):
        value = getattr(found, name)
        assert bool((value >= 0).all())
        torch.testing.assert_close(getattr(other, name), value, atol=1e-9, rtol=1e-9)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_classes_changes_no_relative_uncertainty(seed):
    logits, order = 2 * draw(seed, 60, 4), torch.tensor([2, 0, 3, 1])
    labels = torch.where(draw(seed + 1, 60) > 0, logits.argmax(1), torch.arange(60) % 4)
    plain = RelativeUncertainty.fit(logits, labels)
    other = RelativeUncertainty.fit(logits[:, order], order.argsort()[labels])
    torch.testing.assert_close(other.score(logits[:, order]), plain.score(logits))
    torch.testing.assert_close(plain.score(logits + 5), plain.score(logits))


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3), metric=st.sampled_from(["euclidean", "manhattan"]))
def test_units_of_a_parameter_and_the_order_of_samples_change_no_coverage(seed, scale, metric):
    mean, truth = draw(seed, 2, 60, 2)
    samples, near = mean + draw(seed + 1, 30, 60, 2), mean + draw(seed + 2, 60, 2)
    unit, shift = torch.tensor([scale, 1.0]), 5 * draw(seed + 3, 2)

    def coverage(moved, order):
        found = tarp(
            moved(samples)[order],
            moved(mean + truth),
            references=moved(near),
            metric=metric,
            bins=6,
        )
        return found.coverage

    plain = coverage(lambda x: x, slice(None))
    assert torch.equal(coverage(lambda x: unit * x + shift, torch.arange(29, -1, -1)), plain)


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_where_features_lie_does_not_matter_to_their_shift(seed):
    x, y = draw(seed, 80, 3), draw(seed + 1, 80, 3)
    y[:, 1] += 1
    away = 100 * draw(seed + 2, 3)
    plain, other = (feature_shift(x + a, y + a, bootstrap=20) for a in (0, away))
    torch.testing.assert_close(other.statistic, plain.statistic, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.threshold, plain.threshold, rtol=1e-6, atol=1e-9)
