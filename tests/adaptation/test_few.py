"""Samples that may not teach pay for no backward where no layer mixes samples; numbers stay."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from models import batches, tiny, tiny_vit
from testtime.adaptation import shortcuts
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import answers_alone
from testtime.adaptation.methods.deyo import deyo
from testtime.adaptation.methods.eta import eta
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.scope import norm_affine
from testtime.adaptation.parts.statistics import SourceStatistics

MARGINS = {"group": 0.65, "layer": 0.62, "batch": 0.85, "vit": 0.43}


def recipe_of(name: str, kind: str):
    """A method, with a margin that about half of the samples pass."""
    margin = MARGINS[kind]
    own = eta(lr=0.01, margin=margin, redundancy=1.0)
    return {
        "eta": own,
        "eta on source statistics": replace(own, statistics=SourceStatistics()),
        "sar": sar(lr=0.01, margin=margin, recover_below=0.0, scope=norm_affine),
        "deyo": deyo(
            lr=0.01, entropy_margin=margin, drop_margin=-0.05, patches=2, scope=norm_affine
        ),
    }[name]


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(shortcuts, "WORTH", 1)


def run(adapter, xs, *, few: float = 0.5) -> list[Tensor]:
    """Answers; the engine parts samples never (0), by the share, or always (2)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortcuts, "FEW", few)
        return [adapter(x) for x in xs]


@pytest.mark.parametrize("kind", ["group", "layer", "batch", "vit"])
@pytest.mark.parametrize("name", ["eta", "eta on source statistics", "sar", "deyo"])
def test_both_routes_agree(name, kind):
    model = (tiny_vit() if kind == "vit" else tiny(kind)).double()
    xs = [x.double() for x in batches(6)]
    whole, parted = tt.adapt(model, recipe_of(name, kind)), tt.adapt(model, recipe_of(name, kind))
    expected, answers = run(whole, xs, few=0), run(parted, xs, few=2)
    for mine, theirs in zip(answers, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for key, value in whole.snapshot().tensors.items():
        torch.testing.assert_close(parted.snapshot().tensors[key], value, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(parted.events, whole.events, strict=True):
        assert mine.outcome is theirs.outcome
        assert mine.used == theirs.used
    if kind != "batch" or "source statistics" in name:
        assert 0 < whole.snapshot().teaching < 1
        assert parted.counts.backwards < whole.counts.backwards
    else:
        assert parted.counts == whole.counts


def test_float32_agrees_within_rounding():
    xs = batches(6)
    expected = run(tt.adapt(tiny("group"), recipe_of("eta", "group")), xs, few=0)
    answers = run(tt.adapt(tiny("group"), recipe_of("eta", "group")), xs, few=2)
    for mine, theirs in zip(answers, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_step_without_teachers_costs_a_forward():
    recipe = eta(margin=0.0)
    adapter = tt.adapt(tiny("group"), recipe)
    run(adapter, batches(3))
    assert adapter.counts.backwards == 0
    assert adapter.counts.forwards == adapter.counts.samples == 48
    assert adapter.counts.skipped == 3


@pytest.mark.parametrize("name", ["eta", "sar"])
def test_dense_logits_part_by_image(name):
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("group").double()

        def forward(self, x):
            return self.net(x)[..., None, None] * torch.cat([x[:, :1], 0 * x[:, :1] + 0.4], 2)

    xs = [x.double() for x in batches(5)]
    whole, parted = (tt.adapt(Dense().eval(), recipe_of(name, "group")) for _ in range(2))
    for mine, theirs in zip(run(parted, xs, few=2), run(whole, xs, few=0), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert parted.counts.backwards < whole.counts.backwards


def test_the_choice_is_saved(monkeypatch, tmp_path):
    first = tt.adapt(tiny("group"), recipe_of("eta", "group"))
    second = tt.adapt(tiny("group"), recipe_of("eta", "group"))
    xs = batches(8)
    run(first, xs[:4])
    first.save(tmp_path / "state")
    second.load(tmp_path / "state")
    assert first.snapshot().teaching == second.snapshot().teaching is not None
    assert all(map(torch.equal, run(first, xs[4:]), run(second, xs[4:])))


class Mixing(nn.Module):
    """Mixes samples where no layer does: openly, or without a gradient."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = tiny("group"), how

    def forward(self, x):
        z = self.net(x)
        mean = z.mean(0)
        before = torch.cat([torch.zeros_like(z[:1]), z[:-1]])
        return {
            "not": z, "open": z - mean, "hidden": z - mean.detach(),
            "weakly": z - 0.005 * mean.detach(), "one way": z + before,
            "one way, hidden": z + before.detach(),
        }[self.how]  # fmt: skip


MIXED = ["open", "hidden", "weakly", "one way", "one way, hidden"]


@pytest.mark.parametrize(("how", "apart"), [("not", True), *((how, False) for how in MIXED)])
def test_a_look_finds_models_that_mix(how, apart):
    model = Mixing(how).eval()
    loan = Loan(model, norm_layers(model))
    assert answers_alone(loan, batches(1)[0]) is apart
    adapter = tt.adapt(model, recipe_of("eta", "group"))
    run(adapter, batches(3), few=2)
    assert (adapter.snapshot().teaching is not None) is apart


@pytest.mark.parametrize("how", MIXED)
def test_a_look_at_samples_that_are_the_same_finds_them_too(how):
    model = Mixing(how).eval()
    x = batches(1)[0]
    x[-1] = x[0]
    assert answers_alone(Loan(model, norm_layers(model)), x) is False


def test_answers_that_are_not_finite_show_nothing():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny("group")

        def forward(self, x):
            size = x.flatten(1).sum(1, keepdim=True)
            return self.net(x) * (size / size)

    adapter, xs = tt.adapt(Scaled().eval(), recipe_of("eta", "group")), batches(3)
    run(adapter, [torch.zeros_like(xs[0]), *xs], few=2)
    assert adapter.snapshot().teaching is not None


@pytest.mark.parametrize(
    ("kind", "recipe", "parts"),
    [
        ("group", eta(), True),
        ("layer", eta(), True),
        ("rms", eta(), True),
        ("instance", eta(), True),
        ("batch", eta(), False),
        ("sync", eta(), False),
        ("frozen", eta(), False),
        ("batch", replace(eta(), statistics=SourceStatistics()), True),
        ("group", tent(), False),  # all teach
        ("group", replace(tent(), optimizer=SGD(lr=0.1)), False),
        ("group", deyo(), True),
    ],
)
def test_who_parts(kind, recipe, parts):
    adapter = tt.adapt(tiny(kind), recipe)
    adapter(batches(1)[0])
    assert (adapter.snapshot().teaching is not None) is parts


def test_layers_without_stored_statistics_mix():
    model = tiny("batch")
    for layer in (model.norm1, model.norm2):
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    recipe = replace(eta(), statistics=SourceStatistics())
    adapter = tt.adapt(model, recipe)
    adapter(batches(1)[0])
    assert adapter.snapshot().teaching is None
