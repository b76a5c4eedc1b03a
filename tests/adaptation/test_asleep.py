"""Models of which a part runs for some batches alone, and writes to itself when it does."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from battery import LEARNING, adapter_of
from models import batches, norm_layer


class Expert(nn.Module):
    """A pruned normalisation, whose weight a hook makes anew, a count and a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = prune.l1_unstructured(norm_layer("group", 6), "weight", amount=0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.last = self.norm(x)
        return x


class Routed(nn.Module):
    """Batches go to the one expert or to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.dark, self.bright = Expert(), Expert()

    def forward(self, x: Tensor) -> Tensor:
        expert = self.bright if x.mean() > 0.5 else self.dark
        return self.head(expert(self.stem(x)).mean((2, 3)))


def routed() -> Routed:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Routed().eval()


ONE_TENSOR = ["source", *(name for name in LEARNING if name != "sade")]


@pytest.mark.parametrize("name", ONE_TENSOR)
def test_what_a_part_writes_that_slept_at_first_is_taken_back(name):
    dark, bright = 0.5 * batches(1)[0], 0.5 + 0.5 * batches(1)[0]
    model = routed()
    held = [(expert, expert.norm.weight) for expert in (model.dark, model.bright)]
    adapter = adapter_of(name, model)
    adapter(dark)
    for _ in range(3):
        adapter(bright)
    adapter.predict(bright)
    for expert, weight in held:
        assert expert.count == 0
        assert expert.last is None
        assert expert.norm.weight is weight
