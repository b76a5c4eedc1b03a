"""Models that take batches of one size: as they come they do, and what needs another size says so."""

import pytest
import torch
from torch import nn

import testtime as tt
from testtime._core.errors import InputError


class Net(nn.Module):
    """Any batch with `size` -1, else one of that size."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 12 * 12, 5)

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        return self.head(h.view(self.size, -1) if self.size > 0 else h.flatten(1))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    free, fixed = Net(-1).eval(), Net(16).eval()
    fixed.load_state_dict(free.state_dict())
    return free, fixed


def batches(count=3):
    chance = torch.Generator().manual_seed(1)
    return [torch.rand(16, 1, 12, 12, generator=chance) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"guard": True}, {"deferred": True}])
@pytest.mark.parametrize("name", ["tent", "eta", "sar", "bn-adapt", "lame", "source"])
def test_it_answers_as_one_that_takes_any_size(pair, name, options):
    free, fixed = (tt.adapt(net, name, **options) for net in pair)
    first = batches()[0]
    assert torch.equal(fixed.predict(first), free.predict(first))
    for x in batches():
        assert torch.equal(fixed(x), free(x))
    assert torch.equal(fixed.export()(first), free.export()(first))


def test_a_budget_is_counted_on_the_whole_batch(pair):
    free, fixed = (tt.adapt(net, "tent", budget=0.5) for net in pair)
    x = batches()[0]
    assert fixed(x).shape == (16, 5)
    assert fixed.plan(x).tensors == (free(x), free.plan(x).tensors)[1]


@pytest.mark.parametrize("name", ["memo", "rotta"])
def test_methods_that_run_other_sizes_say_so(pair, name):
    adapter, many = tt.adapt(pair[1], name), batches(5)
    with pytest.raises(
        InputError, match=r"Net could not take a batch of \d+: .*It was seen to take 16"
    ):
        _ = [adapter(x) for x in many]


def test_a_later_batch_of_another_size_is_refused_and_changes_nothing(pair):
    one, other = tt.adapt(pair[1], "tent", lr=0.1), tt.adapt(pair[1], "tent", lr=0.1)
    first, second, third = batches()
    one(first), other(first)
    with pytest.raises(InputError, match=r"could not take a batch of 7: .* Give batches of 16"):
        one(second[:7])
    with pytest.raises(InputError, match="Give batches of 16"):
        one.predict(second[:2])
    assert torch.equal(one(third), other(third))


def test_a_first_batch_that_it_cannot_take_is_told_by_its_own_size(pair):
    with pytest.raises(
        InputError, match=r"not take a batch of shape \(7, 1, 12, 12\).*\(16x252 and"
    ):
        tt.adapt(pair[1], "tent")(batches()[0][:7])


@pytest.mark.parametrize(("name", "margin"), [("eta", 0.9), ("sar", 0.7)])
def test_large_batches_leave_no_samples_out(pair, name, margin):
    """A model that takes any size has a shorter backward here, of the samples that teach."""
    free, fixed = Net(-1).eval(), Net(16).eval()
    free.norm = nn.GroupNorm(2, 4)
    fixed.norm = free.norm
    free.head = fixed.head = nn.Linear(4 * 160 * 160, 5)
    free.first = fixed.first
    chance = torch.Generator().manual_seed(2)
    adapters = [tt.adapt(net, name, margin=margin, lr=0.01) for net in (free, fixed)]
    for _ in range(3):
        x = torch.rand(16, 1, 160, 160, generator=chance)
        ours, theirs = (adapter(x) for adapter in adapters)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_exported_program_is_borrowed(pair):
    x = batches()[0]
    program = torch.export.export(pair[0], (x,)).module()
    assert torch.equal(tt.adapt(program, "source")(x), program(x))
    adapter = tt.adapt(program, "source")
    adapter(x)
    with pytest.raises(InputError, match=r"take a batch of 5: .* dynamic_shapes= of torch\.export"):
        adapter(x[:5])


def test_source_knowledge_of_such_a_model(pair):
    loader = [(x, torch.arange(16) % 5) for x in batches()]
    free, fixed = (tt.fit_source(net, loader, methods=["cafa"]) for net in pair)
    for name, values in free.entries.items():
        for key, value in values.items():
            torch.testing.assert_close(fixed.entries[name][key], value)
