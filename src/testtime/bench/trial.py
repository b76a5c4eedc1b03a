"""One cell, from its record to its rows: a pure function, but for the time and memory it takes."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import testtime as tt
from testtime._core.devices import wait_for
from testtime._core.errors import InputError
from testtime._core.registry import find
from testtime.adaptation.knowledge import fingerprint
from testtime.adaptation.outputs import read_logits
from testtime.bench.cells import Cell
from testtime.bench.draws import CLEAN_SAMPLES, SOURCE_SAMPLES, draw
from testtime.bench.machine import PeakMemory, check_device, describe_machine, torch_threads
from testtime.bench.metrics import NOT_PACED, OPEN_SET, Recognition, Score, worst_class
from testtime.bench.models import load_model, preprocessing
from testtime.bench.own import at_home, python_file
from testtime.bench.pace import on_average, schedule
from testtime.bench.watched import method_code_hash, model_code_hash
from testtime.measures.confidence import confidence
from testtime.streams.batches import UNKNOWN, Batch, Stream
from testtime.streams.data import load_data, stack
from testtime.streams.open_set import held_out
from testtime.streams.recorded import Recorded
from testtime.streams.scenarios import Scenario

PLAIN = 25
"""Batches at most that plain inference is timed on, for the pace of a stream that does not wait."""


def run_cell(
    cell: Cell,
    *,
    on_start: Callable[[int], None] | None = None,
    on_batch: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs one cell: a row for each domain of its stream.

    Args:
        cell: from `plan`.
        on_start: called with the number of batches before the first.
        on_batch: called after each batch.

    Raises:
        InputError: the device is not here, or the model cannot run on the data.
        TesttimeError: whatever loading the data and the model, or the method, complains of.
    """
    file = python_file(cell.model)
    with torch_threads(cell.threads), at_home(file and file.parent):
        return _run(cell, on_start or (lambda _: None), on_batch or (lambda: None))


def _run(
    cell: Cell, on_start: Callable[[int], None], on_batch: Callable[[], None]
) -> list[dict[str, Any]]:
    device = check_device(cell.device)
    memory = PeakMemory(device)
    scenario = Scenario.from_toml(cell.stream)
    dataset = load_data(cell.data)
    code = {
        "model_code_sha256": model_code_hash(cell.model),
        "method_code_sha256": method_code_hash(cell.method),
    }
    model = load_model(cell.model).to(device)
    _check_fit(cell, model, dataset, device)
    stream = scenario.stream(dataset, seed=cell.seed)
    adapter = _adapter(cell, model, scenario, device)
    on_start(len(stream))
    domains: dict[str, Domain] = {}
    seconds: list[float] = []
    plain: list[float] = []
    for number, batch in enumerate(stream):
        if batch.reset:
            adapter.reset()
        inputs = batch.inputs.to(device)
        wait_for(device)
        start = time.perf_counter()
        logits = read_logits(adapter(inputs))
        wait_for(device)
        seconds.append(time.perf_counter() - start)
        told = adapter.events[-1].measured.get("outlier")
        scores = told if isinstance(told, Tensor) else None
        _share_out(domains, number, batch, logits.cpu(), scores, opened=bool(scenario.unknown))
        if cell.paced and len(plain) < PLAIN:
            plain.append(_plain_seconds(model, inputs, device))
        on_batch()
    peak, counts = memory.megabytes(), adapter.counts
    before, after = _clean_errors(dataset, scenario, model, adapter, device)
    late: dict[str, dict[str, Any]] = {}
    if cell.paced:
        pace, taken = median(plain), on_average(seconds)
        late = paced(cell, scenario.stream(dataset, seed=cell.seed), _adapter(
            cell, model, scenario, device), device, pace=pace, seconds=taken)  # fmt: skip
    common = {
        **vars(cell),
        "cell": cell.key,
        "stream": _name(scenario),
        "scenario": cell.stream,
        "pattern": scenario.pattern,
        "order": scenario.labels,
        "reset_rule": "at each domain" if scenario.pattern == "reset" else "never",
        "severity": scenario.severity,
        "batch_size": scenario.batch_size,
        "clean_error": after,
        "source_clean_error": before,
        **worst_class(
            [domain.score for domain in domains.values()], getattr(dataset, "classes", ())
        ),
        "seconds_per_batch": median(seconds),
        "forwards_per_sample": counts.forwards / counts.samples,
        "backwards_per_sample": counts.backwards / counts.samples,
        "peak_memory_mb": peak,
        "preprocessing": preprocessing(model),
        "weights_sha256": fingerprint(model),
        **code,
        "samples_sha256": _order_hash(stream),
        "version": tt.__version__,
        "torch_version": torch.__version__,
        "machine": describe_machine(device),
    }
    return [
        {
            **common,
            "domain": name,
            "position": position,
            **domain.row(),
            **late.get(name, NOT_PACED),
        }
        for position, (name, domain) in enumerate(domains.items())
    ]


def paced(
    cell: Cell,
    stream: Stream,
    adapter: tt.Adapter,
    device: torch.device,
    *,
    pace: float,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """The scores of a stream that does not wait, by domain.

    Args:
        cell: whose method it is; the source model is never late.
        stream: from its beginning.
        adapter: that has seen nothing yet.
        device: of the model.
        pace: seconds between batches.
        seconds: that a batch takes the method.
    """
    learns = schedule(len(stream), pace=pace, seconds=pace if cell.method == "source" else seconds)
    domains: dict[str, Domain] = {}
    taught: dict[str, list[float]] = {}
    for number, batch in enumerate(stream):
        if batch.reset:
            adapter.reset()
        answer = adapter if learns[number] else adapter.predict
        logits = read_logits(answer(batch.inputs.to(device))).cpu()
        _share_out(domains, number, batch, logits, None, opened=False)
        for name in set(batch.domains):
            taught.setdefault(name, []).append(float(learns[number]))
    return {
        name: {
            "paced_error": domain.score.result()["error"],
            "paced_share": sum(taught[name]) / len(taught[name]),
        }
        for name, domain in domains.items()
    }


def _plain_seconds(model: nn.Module, inputs: Tensor, device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    with torch.no_grad():
        model(inputs)
    wait_for(device)
    return time.perf_counter() - start


def _check_fit(cell: Cell, model: nn.Module, dataset: Dataset[Any], device: torch.device) -> None:
    """Refuses a model that cannot run on the data, with both shapes in the message."""
    images, _ = stack(_seen(dataset), [0])
    try:
        with torch.no_grad():
            answers = read_logits(model(images.to(device))).shape[1]
    except Exception as error:  # models of others refuse a size in ways of their own
        size = ", as folder:PATH@SIZE" if cell.data.startswith("folder:") else ""
        raise InputError(
            f"{cell.model} cannot run on {cell.data}, whose images have the shape "
            f"{tuple(images.shape[1:])}: {error}. Give a model made for such images, or other data{size}."
        ) from error
    names = getattr(dataset, "classes", None)  # of folders, where labels are their places
    if names and len(names) != answers:
        raise InputError(
            f"{cell.data} has {len(names)} folders of classes, and {cell.model} answers with {answers} "
            "classes, so that labels, the places of the folders in order, would be wrong ones. Give "
            "file:PATH.py@FUNCTION, which returns the model with the logits of these classes alone."
        )


def _seen(dataset: Dataset[Any]) -> Dataset[Any]:
    """What is surely there of a data set: itself, or some corrupted images."""
    return dataset.some() if isinstance(dataset, Recorded) else dataset


def _adapter(cell: Cell, model: nn.Module, scenario: Scenario, device: torch.device) -> tt.Adapter:
    source, options = None, json.loads(cell.options)
    recipe = find("method", cell.method).build(**options)
    if recipe.needs:
        held = load_data(cell.data, split="train")
        size = max(scenario.batch_size, 16)
        parts = draw(held, SOURCE_SAMPLES, size=size, without=held_out(scenario.unknown))
        loader = [(images.to(device), labels) for images, labels in parts]
        source = tt.fit_source(model, loader, methods={cell.method: recipe})
    return tt.adapt(model, cell.method, seed=cell.seed, source=source, **options)


def _clean_errors(
    dataset: Dataset[Any],
    scenario: Scenario,
    model: nn.Module,
    adapter: tt.Adapter,
    device: torch.device,
) -> tuple[float, float]:
    """Error on clean samples of the source model, and of the adapted one, which learns no more.

    In batches of the stream's size; of 64 where single samples arrive. No numbers where corrupted
    images came without clean ones.
    """
    if isinstance(dataset, Recorded) and not dataset.has_clean:
        return math.nan, math.nan
    before, after = Score(), Score()
    size = scenario.batch_size if scenario.batch_size > 1 else 64
    with torch.no_grad():
        known = draw(dataset, CLEAN_SAMPLES, size=size, without=held_out(scenario.unknown))
        for images, labels in known:
            inputs = images.to(device)
            before.add(read_logits(model(inputs)), labels)
            after.add(read_logits(adapter.predict(inputs)), labels)
    return before.result()["error"], after.result()["error"]


class Domain:
    """What was answered in one domain: its metrics, and its error in each batch.

    Args:
        opened: whether samples of unknown classes come; these are no errors, and are scored apart.
    """

    def __init__(self, *, opened: bool) -> None:
        self.score = Score()
        self.recognition = Recognition() if opened else None
        self.trace: list[dict[str, Any]] = []

    def add(self, number: int, logits: Tensor, labels: Tensor, scores: Tensor | None) -> None:
        """Takes in a batch, or the part of it that is of this domain.

        Args:
            number: of the batch.
            logits: (B, C).
            labels: (B,), `UNKNOWN` for unknown classes.
            scores: (B,), higher for samples that are more likely unknown; None: 1 minus the largest
                probability.
        """
        known = labels != UNKNOWN
        count = int(known.sum())
        error = self.score.add(logits[known], labels[known]) if count else None
        self.trace.append({"batch": number, "samples": count, "error": error})
        if self.recognition is not None:
            if scores is None:
                scores = 1 - confidence(logits.double())
            self.recognition.add(scores, logits.argmax(1) == labels, ~known)

    def row(self) -> dict[str, Any]:
        """What belongs to the domain in a result row."""
        row: dict[str, Any] = {
            **self.score.result(),
            **dict.fromkeys(OPEN_SET),
            "trace": self.trace,
        }
        return row | (self.recognition.result() if self.recognition is not None else {})


def _share_out(
    domains: dict[str, Domain],
    number: int,
    batch: Batch,
    logits: Tensor,
    scores: Tensor | None,
    *,
    opened: bool,
) -> None:
    for name in dict.fromkeys(batch.domains):
        mine = torch.tensor([domain == name for domain in batch.domains], device="cpu")
        own = None if scores is None else scores.detach().cpu()[mine]
        domain = domains.setdefault(name, Domain(opened=opened))
        domain.add(number, logits[mine], batch.labels[mine], own)


def _order_hash(stream: Stream) -> str:
    digest = hashlib.sha256()
    for sample in stream.order():
        digest.update(repr(tuple(sample)).encode())
    return digest.hexdigest()


def _name(scenario: Scenario) -> str:
    words = [scenario.pattern]
    words += [scenario.labels] * (scenario.labels != "shuffled")
    words += [scenario.distribution] * (scenario.distribution != "natural")
    words += ["open-set"] * bool(scenario.unknown)
    return " ".join(words)
