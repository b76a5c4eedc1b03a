"""Layers that are called past their hooks, several times in a forward, for one sample, or not at all."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import ALL, adapter_of
from models import batches, tiny
from reference.methods import RobustNorm
from testtime._core.errors import InputError, ScopeError
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.outputs import read_logits
from testtime.adaptation.parts.statistics import RunningStatistics, SourceStatistics
from testtime.adaptation.recipe import Recipe

HOOKING = ("dent", "domainadaptor", "tesla")
"""Methods that themselves put hooks on normalisation layers."""


class Direct(nn.Module):
    """Calls its normalisation, calls it past its hooks, or reads what it stored."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.stem, self.norm = how, nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.unused, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.norm.running_mean = torch.full((6,), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        norm, x = self.norm, self.stem(x)
        if self.how == "called":
            x = norm(x)
        elif self.how == "past its hooks":
            x = norm.forward(x)
        elif self.how == "by function":
            args = norm.running_mean, norm.running_var, norm.weight, norm.bias
            x = nn.functional.batch_norm(x, *args, training=self.training)
        else:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            x = (x.movedim(1, -1) - norm.running_mean) * scale + norm.bias
            x = x.movedim(-1, 1)
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore:a batch of one")
@pytest.mark.parametrize("name", [name for name in ALL if name not in HOOKING])
def test_layers_may_be_called_past_their_hooks(name):
    one, two = (adapter_of(name, Direct(how).eval()) for how in ("called", "past its hooks"))
    for x in (*batches(2), batches(1)[0][:1]):
        assert torch.equal(read_logits(one(x)), read_logits(two(x)))


@pytest.mark.parametrize("how", ["by function", "as a scale"])
@pytest.mark.parametrize("name", ["tent", "bn-adapt", "rotta", "memo"])
def test_statistics_that_a_model_reads_itself_are_no_others(name, how):
    model = Direct(how).eval()
    (x,) = batches(1)
    expected = model(x)
    adapter = tt.adapt(model, name)
    mark = adapter.snapshot()
    with pytest.raises(ScopeError, match="reads the statistics that norm, unused stored itself"):
        adapter(x)
    assert adapter.snapshot() is mark
    assert torch.equal(model(x), expected)
    assert torch.equal(tt.adapt(model, "source")(x), expected)
    kept = tt.adapt(model, replace(tent(), statistics=SourceStatistics()))
    torch.testing.assert_close(kept(x), expected)
    assert kept.counts.updates == 1


class Twice(nn.Module):
    """Runs one normalisation layer two times, as what takes frames one by one does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("robust", [False, True])
def test_averages_follow_each_run_of_a_layer(robust):
    model = Twice().eval()
    other = copy.deepcopy(model)
    statistics = RunningStatistics(momentum=0.1, robust=robust, unbiased=not robust)
    adapter = tt.adapt(model, Recipe(statistics=statistics))
    if robust:
        other.norm = RobustNorm(other.norm, 0.1)
    for x in batches(3):
        answer = adapter(x)
        with torch.no_grad():
            other.train()(x)
            torch.testing.assert_close(answer, other.eval()(x))
    mean = other.norm.m if robust else other.norm.running_mean
    torch.testing.assert_close(adapter.snapshot().averages["norm.mean"], mean)


class Routing(nn.Module):
    """Sends each sample to the expert that it belongs to, with normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        second = mean[:, 0] > 0.6
        answers = self.experts[0](mean)
        if second.any():
            answers = answers.clone()
            answers[second] = self.experts[1](mean[second])
        return answers


def test_a_layer_that_gets_one_value_says_so():
    model = Routing().eval()
    (x,) = batches(1)
    alone = x / 2
    alone[3] = 0.9
    adapter = tt.adapt(model, "tent")
    adapter(x / 2 + 0.5)
    mark = adapter.snapshot()
    with pytest.raises(InputError, match="a normalisation layer of Routing a single value"):
        adapter(alone)
    assert adapter.snapshot() is mark
    for name, options in (("bn-adapt", {"prior": 16}), ("rotta", {}), ("lame", {})):
        assert tt.adapt(model, name, **options)(alone).isfinite().all()


class Overwriting(nn.Module):
    """Writes to what the backward of its activation needs, as inference may."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: Tensor) -> Tensor:
        h = self.net.norm1(self.net.conv1(x)).relu()
        return self.net.head(self.net.norm2(self.net.conv2(h.mul_(0.5))).mean((2, 3)))


@pytest.mark.parametrize("name", ["eata", "petal", "psmt"])
def test_a_source_through_which_nothing_can_be_learnt_says_so(name):
    loader = [(x, torch.arange(len(x)) % 5) for x in batches(1)]
    with pytest.raises(ScopeError, match="written for inference alone"):
        tt.fit_source(Overwriting().eval(), loader, methods=[name])


def test_a_later_source_batch_that_the_model_refuses_is_told_of():
    x = batches(1)[0]
    with pytest.raises(InputError, match=r"a batch of shape \(16, 2, 8, 8\)"):
        tt.fit_source(tiny(), [x, x[:, :2]], methods=["eata"])
