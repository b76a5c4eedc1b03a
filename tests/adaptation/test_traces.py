"""What a forward leaves behind goes with all that says that it is there."""

import copy
from collections import deque

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from testtime.adaptation.traces import TORCHS


class Net(nn.Module):
    """A network whose forward writes to itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.place, self.size, self.kept = torch.zeros(1), 0, self.begin()
        self.register_buffer("later", None)

    begin = list

    def write(self, x: Tensor) -> None:
        """Before its places are read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        self.write(x)
        return self.head((x + self.place).relu().mean((2, 3)))


class Sized(Net):
    """Keeps what belongs to a size, as rotary embeddings do."""

    def write(self, x: Tensor) -> None:
        if self.size != x.shape[-1]:
            self.place, self.size = torch.linspace(0, 1, x.shape[-1]), x.shape[-1]


class Built(Net):
    """Makes what it needs when it first runs."""

    def write(self, x: Tensor) -> None:
        if not self.size:
            self.built, self.size = torch.ones(1), 1
        self.place = 2 * self.built


class Registered(Net):
    """Makes buffers when it first runs."""

    def write(self, x: Tensor) -> None:
        if not self.size:
            self.later, self.size = torch.ones(1), 1
            self.register_buffer("late", torch.ones(1))
        self.place = self.later + self.late


class Pairs(Net):
    """Keeps keys and values."""

    def write(self, x: Tensor) -> None:
        self.kept.append((x, 2 * x))


class Deep(Net):
    """Keeps what it sees under a name."""

    def begin(self):
        return {"seen": [torch.zeros(1)]}

    def write(self, x: Tensor) -> None:
        self.kept["seen"].append(x)


class Queue(Net):
    """Keeps the latest."""

    def begin(self):
        return deque(maxlen=2)

    def write(self, x: Tensor) -> None:
        self.kept.append(x)


class Counting(Net):
    """Counts in place."""

    def write(self, x: Tensor) -> None:
        self.place += 1


class Scaled(Net):
    """Counts in place, in tensors that its answer is scaled by."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.place += 1
        self.count += 1
        return super().forward(x) * self.place * self.count


class Below(Net):
    """Gives a layer below a table for its size."""

    def forward(self, x: Tensor) -> Tensor:
        if self.size != x.shape[-1]:
            self.size, self.head.table = x.shape[-1], torch.linspace(0.5, 1, x.shape[-1])
        return super().forward(x * self.head.table)


class Hooked(Net):
    """Hooks a layer when it first runs."""

    def write(self, x: Tensor) -> None:
        if not self.size:
            self.head.register_forward_hook(lambda _, args, output: 2 * output)
            self.head.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
            self.size = 1


class HookedAndBuilt(Hooked):
    """And makes what it needs."""

    def write(self, x: Tensor) -> None:
        if not self.size:
            self.place = torch.ones(1)
        super().write(x)


class Unhooked(Net):
    """Drops a hook when it runs."""

    def __init__(self):
        super().__init__()
        self.handle = self.head.register_forward_hook(lambda _, args, output: 2 * output)

    def write(self, x: Tensor) -> None:
        if not self.size:
            self.handle.remove()
            self.size = 1


def held(model: nn.Module) -> str:
    """All that a model and its layers hold themselves, and their hooks."""
    own = [
        {key: value for key, value in vars(module).items() if key not in TORCHS}
        for module in model.modules()
    ]
    hooks = [
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if "_hooks" in key
    ]
    return repr((own, model._buffers, hooks))


def images() -> list[Tensor]:
    return [
        torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(side))
        for side in (8, 10, 8)
    ]


@pytest.mark.parametrize("method", ["source", "bn-adapt", "tent"])
@pytest.mark.parametrize(
    "kind",
    [
        Sized,
        Built,
        Registered,
        Pairs,
        Deep,
        Queue,
        Counting,
        Scaled,
        Below,
        Hooked,
        HookedAndBuilt,
        Unhooked,
    ],
)
def test_a_model_stays_as_it_was(kind, method):
    torch.manual_seed(0)
    model = kind().eval()
    before, adapter = held(model), tt.adapt(model, method)
    answers = [adapter(x) for x in images()]
    assert held(model) == before
    if method == "source":
        with torch.no_grad():
            expected = [copy.deepcopy(model)(x) for x in images()]
            assert all(torch.equal(y, z) for y, z in zip(answers, expected, strict=True))
