"""Two processes with half a batch each adapt as one process does with the whole."""

import gc
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import testtime as tt
from models import Experts, batches, tiny, tiny_vit
from testtime._core.errors import InputError, OptionError, StateError
from testtime._core.outcomes import Outcome
from testtime.adaptation.parts.views import plain


def dimmed(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw for a batch of any size, so that chance goes on alike on ranks."""
    return x * (0.5 + 0.5 * torch.rand((), generator=generator))


SAME = {"views": 1, "augment": dimmed, "threshold": 1.0}
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
    "eata": {"lr": 1e-2, "redundancy": 0.8},
    "cotta": {"restore": 0.0, **SAME},
    "psmt": {"share": 0.2, **SAME},
    "petal": {"share": 0.2, **SAME},
    "rmt": {"contrast": 0.0, "augment": dimmed},
    "roid": {"lr": 1e-2, "augment": dimmed},
    "domainadaptor": {"lr": 1e-2},
    "sade": {"augment": dimmed},
    "sqrl": {"lr": 1e-3},
    "foa": {"population": 4, "chunk": 40},
}
"""Methods for which two ranks are one, where chance has no part."""

AGREE = {
    "cotta": {"restore": 0.2, "views": 2},
    "rmt": {},
    "vcotta": {"views": 2},
    "tesla": {"views": 2, "queue": 4},
}
"""Methods that draw for each sample, or contrast a rank's own: ranks agree on what is learnt."""

ALONE = {"memo": {"lr": 1e-2, "views": 2, "augment": plain}, "dent": {"steps": 2}}
"""Methods whose samples teach none of another rank."""


def model_of(name: str) -> torch.nn.Module:
    """In double precision: Adam turns the rounding of a gradient near zero into a whole step."""
    return {"foa": tiny_vit, "sade": lambda: Experts(tiny())}.get(name, tiny)().double()


def stream(count: int, seed: int = 1) -> list[torch.Tensor]:
    return [x.double() for x in batches(count, seed=seed)]


def known(name: str) -> tt.SourceKnowledge | None:
    loader = [(x, torch.arange(len(x)) % 5) for x in stream(2, seed=5)]
    needs = tt.methods()[name].needs
    return tt.fit_source(model_of(name), loader, methods=name) if needs else None


def adapter_of(name: str, options: dict, **more) -> tt.Adapter:
    return tt.adapt(model_of(name), name, source=known(name), **options, **more)


def no_label(indices: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(indices), dtype=torch.long)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    answers = {}
    for name, options in OPTIONS.items():
        adapter = adapter_of(name, options, process_group=dist.group.WORLD)
        given = [adapter(x[:10] if rank == 0 else x[10:]) for x in stream(4)]
        answers[name] = given, adapter.snapshot().tensors
    for name, options in {**AGREE, **ALONE}.items():
        adapter = adapter_of(name, options, process_group=dist.group.WORLD)
        given = [adapter(x[:10] if rank == 0 else x[10:]) for x in stream(4)]
        state = adapter.snapshot()
        teacher = {**(state.teacher or {}), **(state.teacher_averages or {})}
        answers[name, "apart"] = given, state.tensors, teacher
    asked = tt.adapt(tiny(), "simatta", oracle=no_label, process_group=dist.group.WORLD)
    try:
        asked(batches(1)[0])
    except OptionError as error:
        answers["asked"] = str(error)
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
    adapter, waits, reduce = (
        adapter_of("tent", {}, process_group=dist.group.WORLD),
        [],
        dist.all_reduce,
    )
    adapter(stream(1)[0])
    dist.all_reduce = lambda *args, **more: waits.append(1) or reduce(*args, **more)
    adapter(stream(1)[0])
    answers["waits"] = len(waits)
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    layers = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model_of("tent").modules())
    for half in halves:
        assert half["refused"] == [True] * 10
        assert half["after"].isfinite().all()
        # the batch; each layer forward and backward; the loss, its samples and both's way back; the gradient
        assert half["waits"] <= 1 + 2 * layers + 4 + 1
    for name, options in OPTIONS.items():
        adapter = adapter_of(name, options)
        for step, x in enumerate(stream(4)):
            joined = torch.cat([half[name][0][step] for half in halves])
            torch.testing.assert_close(joined, adapter(x), rtol=0, atol=1e-6, msg=name)
        assert adapter.counts.updates or name in ("source", "bn-adapt", "lame", "adanpc")
        for key, value in adapter.snapshot().tensors.items():
            assert torch.equal(halves[0][name][1][key], halves[1][name][1][key])
            torch.testing.assert_close(halves[0][name][1][key], value, rtol=0, atol=1e-6, msg=name)
    for name in AGREE:
        (_, one, teacher), (_, other, its) = (half[name, "apart"] for half in halves)
        source = dict(model_of(name).named_parameters())
        assert any(not torch.equal(value, source[key]) for key, value in one.items())
        for key, value in one.items():
            assert torch.equal(value, other[key]), (name, key)
        for key, value in teacher.items():
            assert torch.equal(value, its[key]), (name, key)
    for name, options in ALONE.items():
        for rank, half in enumerate(halves):
            adapter = adapter_of(name, options)
            for step, x in enumerate(stream(4)):
                own = adapter(x[:10] if rank == 0 else x[10:])
                torch.testing.assert_close(half[name, "apart"][0][step], own)
    assert all("one process" in half["asked"] for half in halves)


def test_an_adapter_outlives_its_group_and_keeps_none_of_its_threads(tmp_path):
    place = f"file://{tmp_path}/alone"
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    held = weakref.ref(dist.group.WORLD)
    try:
        adapter, x = tt.adapt(tiny(), "tent", process_group=dist.group.WORLD), batches(1)[0]
        adapter(x)
    finally:
        dist.destroy_process_group()
    gc.collect()
    assert held() is None
    with pytest.raises(StateError, match="destroyed"):
        adapter(x)


class Picky:
    """A guard of one rank's own mind; its third word is an error."""

    def __init__(self, words):
        self.words, self.at = words, 0

    def update(self, adapted, source):
        said = self.words[min(self.at, len(self.words) - 1)]
        self.at += 1
        if isinstance(said, Exception):
            raise said
        return said

    def reset(self):
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def watch(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place, soon = f"file://{folder}/meeting", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2, timeout=soon)
    own = (lambda x: x[:30]) if rank == 0 else (lambda x: x[30:])
    words = [False] * 24 + [rank == 1] * 3 + [False, None if rank == 0 else False, False]
    answers = {}
    for name, guard in (("own", Picky(words)), ("default", True)):
        adapter = tt.adapt(tiny(), "tent", guard=guard, process_group=dist.group.WORLD)
        for x in batches(80, size=40):
            adapter(own(x))
        answers[name] = adapter.snapshot().tensors, [e.outcome for e in adapter.events]
    words = [False, RuntimeError("no word") if rank == 0 else False]
    adapter = tt.adapt(tiny(), "tent", guard=Picky(words), process_group=dist.group.WORLD)
    x = batches(1, size=40)[0]
    adapter(own(x))
    try:
        adapter(own(x))
    except (RuntimeError, InputError) as error:
        answers["error"] = str(error)
    answers["steps"] = adapter.snapshot().steps
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while another still listens may end in an abort of gloo's
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_unequal_batches_look_roll_back_and_fail_together(tmp_path):
    mp.spawn(watch, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name in ("own", "default"):
        assert one[name][1] == two[name][1]
        assert all(torch.equal(one[name][0][n], two[name][0][n]) for n in one[name][0])
    assert Outcome.ROLLED_BACK in one["own"][1]
    assert Outcome.TRUSTED in one["own"][1]
    assert Outcome.UNSURE in one["own"][1]
    assert one["error"] == "no word"
    assert two["error"] == "the guard of another rank raised an error"
    assert one["steps"] == two["steps"] == 1
