"""Methods x models x scenarios x seeds: each cell a pure function of its record."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import testtime as tt
from testtime.adaptation.knowledge import fingerprint
from testtime.adaptation.outputs import read_logits
from testtime.bench.metrics import score
from testtime.bench.models import load_model
from testtime.bench.store import read_cell, write_cell, write_plan
from testtime.streams.batches import Batch
from testtime.streams.data import labels_of, load_data, stack
from testtime.streams.scenarios import Scenario


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one model, one stream and one seed.

    Attributes:
        method: name of the method.
        options: of the method, as JSON.
        model: as `load_model` takes it.
        data: as `load_data` takes it.
        stream: a scenario, as TOML.
        seed: of the stream and of the method.
    """

    method: str
    options: str = "{}"
    model: str
    data: str
    stream: str
    seed: int

    @property
    def key(self) -> str:
        """A name that depends on the whole record and on the version of the library."""
        record = json.dumps({**vars(self), "version": tt.__version__}, sort_keys=True)
        return hashlib.sha256(record.encode()).hexdigest()[:16]


def plan(
    *, methods: Sequence[str], models: Sequence[str], data: str, streams: Sequence[Scenario],
    seeds: int,
) -> list[Cell]:  # fmt: skip
    """The cells of a run. The source model is always among the methods."""
    names = list(dict.fromkeys(["source", *methods]))
    return [
        Cell(method=method, model=model, data=data, stream=stream.to_toml(), seed=seed)
        for model in models
        for stream in streams
        for seed in range(seeds)
        for method in names
    ]


def run(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    on_start: Callable[[Cell, int], None] | None = None,
    on_batch: Callable[[], None] | None = None,
    on_done: Callable[[Cell], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs the cells that are not finished yet and returns the rows of all.

    Each finished cell is written at once, so that the same call goes on after an interruption of
    any kind. A piece that cannot be read is made again. Two processes in one folder do no harm but
    double work.

    Args:
        cells: from `plan`.
        out: folder of the run; made when it is not there.
        on_start: called with a cell and its number of batches before it runs.
        on_batch: called after each batch.
        on_done: called with each cell that is finished, also those found finished.
    """
    out = Path(out)
    write_plan(out, {cell.key: vars(cell) for cell in cells})
    rows: list[dict[str, Any]] = []
    for cell in cells:
        own = read_cell(out, cell.key)
        if own is None:
            own = run_cell(cell, on_start=on_start, on_batch=on_batch)
            write_cell(out, cell.key, own)
        rows += own
        if on_done is not None:
            on_done(cell)
    return rows


def run_cell(
    cell: Cell,
    *,
    on_start: Callable[[Cell, int], None] | None = None,
    on_batch: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs one cell: a row for each domain of its stream."""
    scenario = Scenario.from_toml(cell.stream)
    dataset = load_data(cell.data)
    model = load_model(cell.model)
    adapter = _adapter(cell, model, scenario)
    stream = scenario.stream(dataset, seed=cell.seed)
    if on_start is not None:
        on_start(cell, len(stream))
    domains: dict[str, Domain] = {}
    seconds: list[float] = []
    memory = Memory()
    for number, batch in enumerate(stream):
        if batch.reset:
            adapter.reset()
        with memory:
            start = time.perf_counter()
            logits = read_logits(adapter(batch.inputs))
            seconds.append(time.perf_counter() - start)
        _share_out(domains, number, batch, logits)
        if on_batch is not None:
            on_batch()
    images, labels = clean(dataset, labels_of(dataset))
    parts = images.split(scenario.batch_size if scenario.batch_size > 1 else 64)
    after = torch.cat([read_logits(adapter.predict(part)) for part in parts])
    with torch.no_grad():
        before = torch.cat([read_logits(model(part)) for part in parts])
    counts = adapter.counts
    order = [tuple(s) for s in stream.order()]
    common = {
        **vars(cell),
        "cell": cell.key,
        "stream": _name(scenario),
        "scenario": cell.stream,
        "severity": scenario.severity,
        "batch_size": scenario.batch_size,
        "clean_error": score(after, labels)["error"],
        "source_clean_error": score(before, labels)["error"],
        "seconds_per_batch": median(seconds),
        "forwards_per_sample": counts.forwards / counts.samples,
        "backwards_per_sample": counts.backwards / counts.samples,
        "peak_memory_mb": memory.peak,
        "weights_sha256": fingerprint(model),
        "samples_sha256": hashlib.sha256(repr(order).encode()).hexdigest(),
        "version": tt.__version__,
    }
    return [
        {**common, "domain": name, "position": position, **domain.row()}
        for position, (name, domain) in enumerate(domains.items())
    ]


def clean(dataset: Dataset[Any], labels: Tensor, *, limit: int = 2000) -> tuple[Tensor, Tensor]:
    """At most `limit` clean samples, spread over the data set."""
    step = max(1, len(labels) // limit)
    index = torch.arange(0, len(labels), step)[:limit]
    return stack(dataset, index)[0], labels[index]


def _adapter(cell: Cell, model: nn.Module, scenario: Scenario) -> tt.Adapter:
    source = None
    if tt.methods()[cell.method].needs:
        held = load_data(cell.data, split="train")
        index = torch.arange(min(2000, len(labels_of(held))))
        loader = (stack(held, part)[0] for part in index.split(max(scenario.batch_size, 16)))
        source = tt.fit_source(model, loader, methods=[cell.method])
    options = json.loads(cell.options)
    return tt.adapt(model, cell.method, seed=cell.seed, source=source, **options)


class Domain:
    """What was answered in one domain."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.trace: list[dict[str, Any]] = []

    def row(self) -> dict[str, Any]:
        """Its metrics, and its error in each batch."""
        return {**score(torch.cat(self.logits), torch.cat(self.labels)), "trace": self.trace}


def _share_out(domains: dict[str, Domain], number: int, batch: Batch, logits: Tensor) -> None:
    for name in dict.fromkeys(batch.domains):
        mine = torch.tensor([domain == name for domain in batch.domains])
        domain = domains.setdefault(name, Domain())
        domain.logits.append(logits[mine].cpu())
        domain.labels.append(batch.labels[mine])
        wrong = (domain.logits[-1].argmax(1) != domain.labels[-1]).double().mean()
        domain.trace.append(
            {"batch": number, "samples": int(mine.sum()), "error": 100 * float(wrong)}
        )


def _name(scenario: Scenario) -> str:
    words = [scenario.pattern]
    words += [scenario.labels] * (scenario.labels != "shuffled")
    words += [scenario.distribution] * (scenario.distribution != "natural")
    return " ".join(words)


class Memory:
    """Peak memory in megabytes while it is entered, beyond what was held before.

    On CUDA the allocator's peak. On the CPU growth of the process's largest resident size, which is
    coarse: what an earlier cell of the same process took at its peak is not seen again.
    benchmarks/ measures each method in a process of its own.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        self.base = self._now()

    def _now(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size / (2**20 if sys.platform == "darwin" else 2**10)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.peak = max(self.peak, self._now() - self.base)
