"""An adapter that learns only where data part from the source's."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import testtime as tt
from models import batches, tiny, tiny_vit
from testtime._core.errors import NeedsSource, OptionError, StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation.gating import AGAIN
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.source_like import SourceLike, effect, pooled, summaries, summed
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.monitor import Monitor
from testtime.measures.entropy import entropy

KINDS = ["batch", "sync", "frozen", "group", "layer", "instance", "rms"]


def clean(count: int = 8, size: int = 64, seed: int = 3) -> list[Tensor]:
    """Batches like those whose statistics `tiny` stored."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.rand(count, size, 3, 8, 8, generator=generator).unbind(0))


def shifted(**more) -> list[Tensor]:
    return [0.4 * x + 0.5 for x in clean(**more)]


def trained() -> nn.Module:
    """A tiny network that stored the statistics of such batches."""
    model = tiny()
    for norm in (model.norm1, model.norm2):
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for x in clean(16, seed=8):
            model.train()(x)
    return model.eval()


def gated(kind: str = "batch", name: str = "tent", **more) -> tt.Adapter:
    model = tiny(kind)
    known = tt.fit_source(model, clean(16, seed=8), methods=[name], gate=True)
    return tt.adapt(model, name, source=known, gate=True, **more)


def outcomes(adapter: tt.Adapter, xs: list[Tensor]) -> list[Outcome]:
    return [(adapter(x), adapter.events[-1].outcome)[1] for x in xs]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3), min_size=2, max_size=9)
)
def test_the_effect_is_the_mean_of_unbiased_squares(rows):
    samples, mean = torch.tensor(rows).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    found = summed([samples])
    count, told = float(len(samples)), (found["sum"], found["square"], mean)
    spread = torch.tensor([2.0, 1.0, 0.5]).double()
    want = [
        ((c.mean() - m) ** 2 - c.var() / len(c)) / s
        for c, m, s in zip(samples.T, mean, spread, strict=True)
    ]
    torch.testing.assert_close(effect(count, *told, spread, 0.0).mean(), sum(want) / 3)
    own = [((c.mean() - m) ** 2 - c.var() / len(c)) / (c.var() + 0.1)
           for c, m in zip(samples.T, mean, strict=True)]  # fmt: skip
    torch.testing.assert_close(effect(count, *told, torch.nan * mean, 0.1).mean(), sum(own) / 3)


def test_the_effect_is_unbiased_for_batches_of_any_size():
    generator = torch.Generator().manual_seed(0)
    for size in (4, 64):
        drawn = torch.randn(20000 // size, size, 3, generator=generator).double() + 0.3
        sums, squares = drawn.sum(1), drawn.square().sum(1)
        got = effect(float(size), sums, squares, torch.zeros(3), torch.ones(3), 0.0)
        assert got.mean() == pytest.approx(0.09, abs=0.01)


def test_small_batches_are_judged_with_those_before_them():
    sums, samples = None, torch.arange(100.0)[:, None]
    signal = torch.zeros(1, dtype=torch.long)
    for sample in samples.split(8):
        sums = pooled(sums, summed([sample]), 64, signal)
    assert sums["count"] == [pytest.approx(64, abs=8)]
    assert 40 < sums["sum"] / sums["count"][0] < 75  # a mean of late ones
    assert pooled(sums, summed([torch.ones(64, 1)]), 64, signal)["sum"] == 64


def test_signals_of_more_samples_fade_by_themselves():
    signal = torch.tensor([0, 0, 1])
    one = summed([torch.ones(8, 2), torch.ones(40, 1)])
    sums = pooled(one, one, 64, signal)
    assert sums["count"] == [16, 64]
    assert sums["sum"].tolist() == pytest.approx([16, 16, 64])
    asleep = summed([torch.ones(0, 2), torch.ones(8, 1)])  # a layer that did not run
    assert pooled(sums, asleep, 64, signal)["sum"].tolist() == pytest.approx([0, 0, 64])
    assert pooled(asleep, one, 64, signal)["count"] == [8, 48]


@pytest.mark.parametrize("kind", KINDS)
def test_summaries_are_of_channels_wherever_these_stand(kind):
    model, x = tiny(kind), clean(1)[0]
    layer = norm_layers(model)[0]
    got = summaries(layer, model.conv1(x))
    planes = model.conv1(x).double().flatten(2)
    want = torch.cat([planes.mean(2), planes.square().mean(2)], 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    tokens = torch.rand(4, 5, 8)
    norm = norm_layers(tiny_vit())[0]
    torch.testing.assert_close(summaries(norm, tokens)[:, :8], tokens.mean(1))


@pytest.mark.parametrize("kind", KINDS)
def test_data_like_the_source_are_answered_by_the_source(kind):
    adapter, model = gated(kind), tiny(kind)
    for x in clean():
        bare = copy.deepcopy(model)  # whose InstanceNorm rounds its own averages at each run
        assert torch.equal(adapter(x), bare(x).detach())
    assert adapter.counts.spared == 8
    assert adapter.counts.forwards == adapter.counts.samples
    assert adapter.counts.backwards == adapter.counts.updates == 0
    assert set(outcomes(adapter, clean(2))) == {Outcome.LIKE_SOURCE}
    event = adapter.events[-1]
    assert event.entropy == pytest.approx(
        float(entropy(model(clean(2)[-1]).detach()).mean()), rel=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_is_learnt_from_as_without_a_gate(kind):
    plain, adapter = tt.adapt(tiny(kind), "tent"), gated(kind)
    for x in shifted():
        assert torch.equal(adapter(x), plain(x))
    assert adapter.counts.updates == plain.counts.updates == 8
    asked = adapter.counts.forwards - plain.counts.forwards
    assert asked == 64 * math.ceil(8 / AGAIN)


class Routes(nn.Module):
    """Bright batches take one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.bright = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        y = self.always(x)
        return self.head((self.bright(y) if x.mean() > 1.0 else y).mean((2, 3)))


def test_a_layer_that_no_longer_runs_does_not_hold_the_gate_open():
    generator = torch.Generator().manual_seed(0)
    dark = torch.randn(8, 64, 3, 4, 4, generator=generator)
    model, gate = Routes().eval(), SourceLike()
    gate.begin(norm_layers(model), None)

    def opened(x):
        with torch.no_grad(), gate.watching():
            logits = model(x)
        return gate.update(entropy(logits) / math.log(5))

    assert opened(3 * dark[0] + 2)
    assert len(gate._seen) == 2
    assert not any(map(opened, dark))


def test_where_no_watched_layer_runs_the_entropy_is_judged():
    model, gate = tiny("group"), SourceLike()
    known = tt.fit_source(model, clean(8), methods=["tent"], gate=True).entries["signals"]
    gate.begin(norm_layers(model), known)
    mean, spread = known["entropy.mean"], known["entropy.var"].sqrt()
    usual = mean + spread * torch.linspace(-1, 1, 64)
    assert not gate.update(usual)
    assert gate.update(usual + 2 * spread)
    unknowing = SourceLike()
    unknowing.begin(norm_layers(trained()), None)
    assert unknowing.update(usual)  # nothing to judge by


def test_without_source_data_the_stored_statistics_serve():
    adapter = tt.adapt(trained(), "tent", gate=True)
    assert set(outcomes(adapter, clean())) == {Outcome.LIKE_SOURCE}
    assert set(outcomes(adapter, shifted())) == {Outcome.ADAPTED}
    back = outcomes(adapter, clean())
    assert back[-AGAIN:] == [Outcome.LIKE_SOURCE] * AGAIN
    for kind in ("group", "layer", "instance"):
        with pytest.raises(NeedsSource, match="gate=True"):
            tt.adapt(tiny(kind), "tent", gate=True)


def test_entropy_alone_opens_the_gate():
    x, gate = clean(1)[0], SourceLike()
    model = tiny()
    known = tt.fit_source(model, clean(16, seed=8), gate=True)["signals"]
    gate.begin(norm_layers(model), known)
    values = torch.full((64,), float(known["entropy.mean"]))
    for more, opened in ((0.0, False), (0.4, False), (0.6, True)):
        with gate.watching():
            model(x)
        assert gate.update(values + more * float(known["entropy.var"].sqrt())) is opened


def test_the_entropy_of_calm_samples_serves_where_nobody_told_it():
    model, gate = trained(), SourceLike()
    gate.begin(norm_layers(model), None)
    generator = torch.Generator().manual_seed(0)
    said = []
    for number, x in enumerate([*clean(6), clean(1)[0]]):
        with gate.watching():
            model(x)
        said.append(gate.update(0.3 + 0.1 * torch.rand(64, generator=generator) + (number == 6)))
    assert said == [False] * 6 + [True]


def test_few_samples_are_learnt_from_until_there_are_enough():
    adapter = gated(name="sar")
    got = outcomes(adapter, [x[:4] for x in clean(24)])
    assert got[0] is not Outcome.LIKE_SOURCE
    assert got[-4:] == [Outcome.LIKE_SOURCE] * 4
    one = gated("group", deferred=True)
    outcomes(one, [x[:1] for x in clean(100)])
    assert one.counts.spared > 0


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("name", ["tent", "rdumb", "memo"])
def test_a_gate_is_saved_restored_and_reset_with_the_state(name, deferred, tmp_path):
    if name == "memo" and deferred:
        return
    more = {"views": 2} if name == "memo" else {}
    more |= {"reset_every": 2} if name == "rdumb" else {}
    xs = [x[:16] for x in [*clean(3), *shifted(count=2), *clean(5)]]
    one, two = (gated(name=name, deferred=deferred, **more) for _ in range(2))
    begin = [one(x) for x in xs[:4]]
    mark = one.snapshot()
    one.save(tmp_path / "state")
    later = [one(x) for x in xs[4:]]
    two.load(tmp_path / "state")
    assert all(torch.equal(two(x), y) for x, y in zip(xs[4:], later, strict=True))
    one.restore(mark)
    assert all(torch.equal(one(x), y) for x, y in zip(xs[4:], later, strict=True))
    one.reset()
    assert all(torch.equal(one(x), y) for x, y in zip(xs[:4], begin, strict=True))
    assert one.counts.spared > 0


class Bound:
    """A monitor of nobody's: alarms where the mean is above a bound, and counts its batches."""

    def __init__(self) -> None:
        self.reset()

    def update(self, values: Tensor) -> bool:
        assert values.shape == (16,)
        assert 0 <= values.min() <= values.max() <= 1
        self.batches += 1
        return bool(values.mean() > 0.5)

    def reset(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def test_any_monitor_is_a_gate():
    xs, model = batches(12), tiny()
    adapter = tt.adapt(model, "tent", gate=Bound())
    for x in xs:
        sure = float(entropy(model(x).detach()).mean()) / math.log(5)
        left = (adapter.snapshot().gate or {"left": 0})["left"]
        adapter(x)
        spared = adapter.events[-1].outcome is Outcome.LIKE_SOURCE
        assert spared == (not left and sure <= 0.5)
    assert 0 < adapter.snapshot().gate["memory"]["batches"] < 12


def test_a_monitor_of_one_signal_is_a_gate(tmp_path):
    xs, model = batches(20), tiny()
    known = torch.cat([entropy(model(x).detach()) / math.log(5) for x in xs[:10]])
    test = Exchangeability.fit(known[:, None])
    one, other = (tt.adapt(model, "tent", gate=Monitor(test)) for _ in range(2))
    for x in xs[10:]:
        one(x)
    assert {event.outcome for event in one.events} == {Outcome.LIKE_SOURCE}
    one.save(tmp_path / "state")
    other.load(tmp_path / "state")
    for x in xs:
        assert torch.equal(other(0.02 * x), one(0.02 * x))
    assert one.events[-1].outcome is Outcome.ADAPTED


def test_chance_stays_where_the_stream_is_while_the_source_answers():
    doubts = {float(entropy(tiny()(x).detach()).mean() / math.log(5)): x for x in batches(12)}
    least, most = min(doubts), max(doubts)
    calm, wild, gate = doubts[least], doubts[most], Bound()
    gate.update = lambda values: bool(values.mean() > (least + most) / 2)
    adapter = tt.adapt(tiny(), "deyo", entropy_margin=1.0, gate=gate)
    begin = adapter.snapshot()
    adapter(wild)
    assert not torch.equal(adapter.snapshot().generator, begin.generator)
    adapter.restore(begin)
    assert outcomes(adapter, [calm]) == [Outcome.LIKE_SOURCE]
    assert torch.equal(adapter.snapshot().generator, begin.generator)


def test_an_error_leaves_the_gate_where_it_was(monkeypatch):
    adapter = tt.adapt(trained(), "tent", gate=True)
    outcomes(adapter, clean(2))
    mark = adapter.snapshot()
    monkeypatch.setattr("testtime.adaptation.engine.Engine.gradient", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(shifted(count=1)[0])
    assert adapter.snapshot() is mark


def test_a_state_of_another_gate_is_refused():
    one, other = gated(), tt.adapt(tiny(), "tent", gate=Bound())
    other(clean(1)[0][:16])
    before = one(clean(1)[0])
    with pytest.raises(StateError, match="another gate"):
        one.restore(other.snapshot())
    assert torch.equal(one(clean(1)[0]), before)


def test_no_gate_is_refused():
    with pytest.raises(OptionError, match="instance"):
        tt.adapt(tiny(), "tent", gate=SourceLike)
    for wrong in (3, "yes", object()):
        with pytest.raises(OptionError, match="update"):
            tt.adapt(tiny(), "tent", gate=wrong)
    assert tt.adapt(tiny(), "tent", gate=False)._gate is None
    for options in ({"effect": -1}, {"samples": 3}):
        with pytest.raises(OptionError):
            SourceLike(**options)


def test_a_mild_shift_opens_the_gate_once_many_samples_show_it():
    x, gate, model = clean(1)[0], SourceLike(), tiny()
    known = tt.fit_source(model, clean(16, seed=8), gate=True)["signals"]
    gate.begin(norm_layers(model), known)
    spread = torch.linspace(-math.sqrt(3), math.sqrt(3), 64)  # of mean 0 and variance 1

    def said(shift: float, count: int) -> list[bool]:
        found = []
        for _ in range(count):
            with gate.watching():
                model(x)
            entropies = known["entropy.mean"] + (shift + spread) * known["entropy.var"].sqrt()
            found.append(gate.update(entropies))
        return found

    assert said(0.0, 6) == [False] * 6
    mild = said(0.35, 10)
    assert not any(mild[:3])
    assert all(mild[6:])
    assert said(0.0, 12)[-1] is False
    assert said(3.0, 2) == [True, True]
    assert said(0.0, 2) == [False, False]  # what lies far away is forgotten at once


def test_what_another_version_kept_is_refused():
    gate = SourceLike()
    with pytest.raises(StateError, match="another version"):
        gate.load_state_dict({"recent": {}, "calm": None})
