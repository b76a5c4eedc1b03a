"""Collapse of an adapted model: shares of classes, their narrowness, disagreement with the source."""

import math
import warnings

import pytest
import torch
from torch import Tensor

import testtime as tt
from testtime._core.errors import InputError
from testtime.bench.models import load_model
from testtime.guard.betting import Mixture
from testtime.guard.collapse import Collapse
from testtime.guard.monitor import Monitor
from testtime.streams.data import load_data, stack
from testtime.streams.scenarios import Scenario


def draw(seed, *shape):
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=chance, dtype=torch.float64)


def logits(answers, classes=10, height=6.0):
    return height * torch.nn.functional.one_hot(torch.as_tensor(answers), classes).double()


def test_collapse_is_told_from_rare_classes_and_from_useful_changes():
    chance = torch.Generator().manual_seed(0)
    source = torch.randint(10, (6400,), generator=chance)
    repaired = torch.where(torch.rand(6400, generator=chance) < 0.4, source.flip(0), source)
    alone = torch.full((6400,), 3)
    for adapted, beside, expected in (
        (source, source, False), (repaired, source, False), (alone, alone, False),
        (alone, source, True), (source.roll(1), source, True), (source % 4, source, True),
    ):  # fmt: skip
        monitor = Monitor(Collapse(classes=10))
        for a, s in zip(logits(adapted).split(50), logits(beside).split(50), strict=True):
            alarm = monitor.update(a, s)
        assert bool(alarm) == expected


@pytest.mark.parametrize("block", [8, 32, 40])
def test_collapse_bets_on_what_its_statistics_exceed_their_limits_by(block):
    """On shares in each 16 samples of a block, and in what is left at its end."""
    adapted, source = draw(0, 2 * block, 3), draw(1, 2 * block, 3)
    limits = {"share": 0.2, "narrowness": 0.05, "disagreement": 0.3}
    test = Collapse(classes=3, block=block, bets=Mixture(fractions=(0.5,)), **limits)
    wealth = torch.ones(5, dtype=torch.float64)
    for ours, theirs in zip(adapted.split(block), source.split(block), strict=True):
        a, s = ours.argmax(1), theirs.argmax(1)
        for u, v in zip(a.split(16), s.split(16), strict=True):
            shares = [float(((u == c).double() - (v == c).double()).mean()) for c in range(3)]
            payoffs = [(each - 0.2) / 1.2 for each in shares]
            wealth[:3] *= 1 + torch.tensor(payoffs, dtype=torch.float64) / 2
        p, q = (torch.bincount(each, minlength=3).double() / block for each in (a, s))
        narrow = float(p.xlogy(p).sum() - q.xlogy(q).sum()) / math.log(3)
        differ = float((a != s).double().mean())
        payoffs = [(narrow - 0.05) / 1.05, (differ - 0.3) / 0.3]
        wealth[3:] *= 1 + torch.tensor(payoffs, dtype=torch.float64) / 2
    parts = torch.stack([wealth[:3].mean(), wealth[3], wealth[4]])
    alarm = Monitor(test).update(adapted, source)
    torch.testing.assert_close(alarm.parts.exp(), parts)
    torch.testing.assert_close(alarm.log_wealth.exp(), parts.mean())


def test_a_model_that_only_became_surer_has_not_collapsed():
    """A hundred classes in a long tail, an unsure source, and not one answer that differs."""
    chance, monitor = torch.Generator().manual_seed(0), Monitor(Collapse(classes=100))
    often = 1 / torch.arange(1.0, 101)
    for _ in range(8):
        source = torch.randn(2048, 100, generator=chance)
        shown = torch.multinomial(often, 2048, replacement=True, generator=chance)
        source[torch.arange(2048), shown] += math.log(100)
        alarm = monitor.update(3 * source, source)
    assert not alarm
    assert alarm.parts[1] < 0


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_answers_as_even_as_the_source_s_make_a_fair_bet_however_sure_and_of_many_classes(classes):
    """The limit of narrowness is 0: its wealth has the mean 1."""
    chance, wealth = torch.Generator().manual_seed(4), list[Tensor]()
    test = Collapse(classes=classes, narrowness=0, bets=Mixture(fractions=(0.5,)))
    often = 1 / torch.arange(1.0, classes + 1)
    for _ in range(100):
        drawn = torch.multinomial(often, 1024, replacement=True, generator=chance)
        ours, theirs = logits(drawn[:512], classes, 20), logits(drawn[512:], classes, 3)
        wealth.append(Monitor(test).update(ours, theirs).parts[1].exp())
    spread, mean = torch.std_mean(torch.stack(wealth))
    assert abs(mean - 1) < 0.4 * spread  # four standard errors


@pytest.mark.parametrize("classes", [100, 1000])
def test_crowding_in_a_hundredth_of_many_classes_is_narrow(classes):
    chance = torch.Generator().manual_seed(5)
    source = torch.randint(classes, (2560,), generator=chance)
    alarm = Monitor(Collapse(classes=classes, disagreement=0.999)).update(
        logits(source % (classes // 100), classes), logits(source, classes)
    )
    assert alarm.parts[1] > math.log(3 / 0.05)


@pytest.mark.parametrize("name", ["tent", "bn-adapt"])
def test_single_samples_that_statistics_of_one_collapse_raise_the_alarm(name):
    """Batch normalisation by single samples, nine errors in ten: one class answered, or two."""
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    options = {"lr": 0.01} if name == "tent" else {}
    adapter, watch = tt.adapt(model, name, **options), Monitor(Collapse(classes=10))
    images, labels = stack(data, range(1152))
    wrong = 0
    for x, y in zip(images.split(1), labels.split(1), strict=True):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            ours = adapter(x)
            alarm = watch.update(ours, model(x))
        wrong += int(ours.argmax(1) != y)
    assert wrong > 0.8 * len(labels)
    assert alarm


def test_a_source_that_is_mostly_wrong_may_be_disagreed_with():
    """Fog: the source answers nearly one class, and statistics of the batch are right more often."""
    model, data = load_model("embedded:batch"), load_data("fashion-mnist:sample")
    adapter, watch = tt.adapt(model, "bn-adapt"), Monitor(Collapse(classes=10))
    stream = Scenario.parse("stationary,domains=fog,samples=1000").stream(data, seed=2)
    for batch in stream:
        with torch.no_grad():
            alarm = watch.update(adapter(batch.inputs), model(batch.inputs))
    assert not alarm


def test_crowding_as_the_limit_allows_raises_no_alarm():
    """A class a quarter of all samples more frequent than the source says, in 200 streams."""
    chance, test, alarms = torch.Generator().manual_seed(3), Collapse(classes=4), 0
    for _ in range(200):
        source = torch.randint(1, 4, (1000,), generator=chance)
        crowds = torch.rand(1000, generator=chance) < test.share
        alarms += bool(Monitor(test).update(logits(source * ~crowds, 4), logits(source, 4)))
    assert alarms <= 200 * test.alpha


def test_collapse_collects_blocks_whatever_the_batches():
    chance = torch.Generator().manual_seed(0)
    adapted, source = torch.randn(2, 300, 4, generator=chance)
    test = Collapse(classes=4, block=32)
    whole = Monitor(test).update(adapted, source)
    monitor = Monitor(test)
    for a, s in zip(adapted.split(7), source.split(7), strict=True):
        alarm = monitor.update(a, s)
    assert torch.equal(alarm.parts, whole.parts)
    assert monitor.state_dict()["seen"] == 300 % 32
    for bad in (adapted[:, :3], adapted[:0], adapted * math.nan):
        with pytest.raises(InputError):
            monitor.update(bad, source[: len(bad)])
    with pytest.raises(InputError, match="same samples"):
        monitor.update(adapted, source[:-1])
