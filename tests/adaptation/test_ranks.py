"""Two processes with half a batch each adapt as one process does with the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import testtime as tt
from models import batches, tiny
from testtime._core.errors import InputError
from testtime.adaptation.parts.views import plain

OPTIONS = {
    "source": {},
    "bn-adapt": {},
    "tent": {"lr": 1e-2},
    "eta": {"lr": 1e-2, "redundancy": 0.8},
    "sar": {"lr": 1e-2, "margin": 0.6},
    "ostta": {"lr": 1e-2},
    "deyo": {"lr": 1e-2, "entropy_margin": 0.9, "drop_margin": -1.0, "patches": 1},
    "rdumb": {"lr": 1e-2, "margin": 0.9, "redundancy": 0.8, "reset_every": 3},
    "lame": {},
    "rotta": {"capacity": 16, "every": 16},
    "lerm": {"lr": 1e-2},
    "stamp": {"lr": 1e-2, "margin": 0.9, "capacity": 24, "views": 1, "augment": plain},
    "cafa": {"lr": 1e-2},
    "adanpc": {"k": 5, "beta": 0.28},
}


def known(name: str) -> tt.SourceKnowledge | None:
    needs = tt.methods()[name].needs
    return tt.fit_source(tiny(), batches(2, seed=5), methods=name) if needs else None


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    answers = {}
    for name, options in OPTIONS.items():
        adapter = tt.adapt(
            tiny(), name, source=known(name), process_group=dist.group.WORLD, **options
        )
        given = [adapter(x[:10] if rank == 0 else x[10:]) for x in batches(4)]
        answers[name] = given, adapter.snapshot().tensors
    adapter = tt.adapt(tiny(), "tent", process_group=dist.group.WORLD)
    x = batches(1)[0]
    adapter(x)
    answers["refused"] = []
    for bad in (x * torch.nan, x[:0], x[:, :, 0], x.double(), torch.rand(4, 7, 8, 8)):
        for new in (adapter, tt.adapt(tiny(), "tent", process_group=dist.group.WORLD)):
            mark = new.snapshot()
            try:
                new(x if rank == 0 else bad)
            except InputError:
                answers["refused"].append(new.snapshot().steps == mark.steps)
    answers["after"] = adapter(x)
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for half in halves:
        assert half["refused"] == [True] * 10
        assert half["after"].isfinite().all()
    for name, options in OPTIONS.items():
        adapter = tt.adapt(tiny(), name, source=known(name), **options)
        for step, x in enumerate(batches(4)):
            joined = torch.cat([half[name][0][step] for half in halves])
            torch.testing.assert_close(joined, adapter(x), rtol=0, atol=2e-3)
        for key, value in adapter.snapshot().tensors.items():
            assert torch.equal(halves[0][name][1][key], halves[1][name][1][key])
            torch.testing.assert_close(halves[0][name][1][key], value, rtol=0, atol=2e-3)
