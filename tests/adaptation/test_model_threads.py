"""A model that runs parts of itself in threads of its own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import testtime as tt
from models import batches, tiny


class Halves(nn.Module):
    """Looks at both halves of an image with one network: one after the other, or in two threads."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.net, self.threads = tiny(), threads
        self.together = threading.Barrier(2)

    def forward(self, x):
        halves = x[..., :4], x[..., 4:].square()
        if self.threads == 1:
            return sum(map(self.net, halves))
        check = nn.BatchNorm2d._check_input_dim

        def wait(layer, x):  # each thread is there before one of them goes on
            self.together.wait(30)
            check(layer, x)

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(nn.BatchNorm2d, "_check_input_dim", wait)
            return sum(pool.map(self.quiet, halves))

    def quiet(self, x):
        with torch.no_grad():
            return self.net(x)


@pytest.mark.parametrize("options", [{"prior": 16}, {"momentum": 0.1}, {}], ids=str)
def test_threads_of_a_model_do_not_take_each_others_statistics(options):
    alone, threads = (tt.adapt(Halves(n).eval(), "bn-adapt", **options) for n in (1, 2))
    x = batches(1)[0]
    for adapter in (alone, threads):
        adapter.predict(x)
    assert torch.equal(alone.predict(x), threads.predict(x))
