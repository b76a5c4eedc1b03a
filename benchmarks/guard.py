"""Never worse than frozen: methods with and without a guard on every kind of stream.

    python benchmarks/guard.py                    all methods; goes on where it was interrupted
    python benchmarks/guard.py --methods tent     some
    python benchmarks/guard.py --again            guarded errors again, of an earlier rule
    python benchmarks/guard.py --seconds 300      stops after the cell that passes 300 seconds
    python benchmarks/guard.py --alike            only the windows that look alike and are not
    python benchmarks/guard.py --evidence MODEL   only what else could tell gain from harm
    python benchmarks/guard.py --page             only the page, from the files of numbers

Writes `benchmarks/guard.json`, `benchmarks/alike.json`, `benchmarks/evidence.json` and `docs/never-worse.md`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import evidence
import held_out
import many_classes
import other_networks
import testtime as tt
from between import write_json
from guard_page import TOP
from guard_streams import CLASSES, METHODS, OPTIONS, STREAMS, sent, source_of, streams_of
from guarded import Errors, error, errors_table, kept, line, said
from names import names_of
from testtime._core.seeds import generator
from testtime.bench.machine import describe_machine
from testtime.bench.models import load_model
from testtime.papers.digits import digits
from testtime.streams.data import labels_of, load_data, stack
from testtime.streams.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[1]
NUMBERS, PAGE = ROOT / "benchmarks/guard.json", ROOT / "docs/never-worse.md"
ALIKE = ROOT / "benchmarks/alike.json"
WINDOW = 256
HELPED = ("long-tailed", "inverse")
HARMED = ("recurring", "mixed", "continual, 16")
DOUBTED = (*HELPED, *HARMED, "open-set", *CLASSES)
DOUBTED_METHODS = ("bn-adapt", "tent", "tent 10x", "deyo")
"""Streams and methods whose windows are looked at for other evidence."""
SIGNS = ("more even", "kept", "agree", "second choice", "surer", "tells more")
RULE = 9
"""Of the guard; raised by one when what it decides changes, so that its errors are measured again."""


def page(found: Sequence[dict[str, Any]], pair: Sequence[dict[str, Any]]) -> str:
    """The page: for each model a line for each stream, a column for each method."""
    rows = [
        line([row["stream"], f"{row['gain']:+.1f}", *(f"{row[name]:.2f}" for name in SIGNS)])
        for row in pair
    ]
    table = [line(["stream", "points won", *SIGNS]), line(["---", *["--:"] * (len(SIGNS) + 1)])]
    told = "\n".join([*table, *rows])
    parts, cells = list[str](), list[tuple[dict[str, float], Errors]]()
    for model in dict.fromkeys(row["model"] for row in found):
        mine = {(row["method"], row["stream"]): row for row in found if row["model"] == model}
        methods = [name for name in METHODS[model] if any(name == key[0] for key in mine)]
        frozen = {
            stream: mine["source", stream]["error"]
            for stream in streams_of(model)
            if ("source", stream) in mine
        }
        errors = {
            key: (row["error"], row["guarded"]) for key, row in mine.items() if key[0] in methods
        }
        cells.append((frozen, errors))
        parts += [f"### {model}", "\n".join(errors_table(methods, frozen, errors))]
    total = said(cells)
    old = sum("guarded" in row and row.get("rule", 1) != RULE for row in found)
    if old:
        total += f" Of these, {old} were measured before the last change of the rule (`--again`)."
    top = TOP.format(
        total=total, machine=found[0]["machine"], window=WINDOW, alike=told, evidence=evidence.table(),
        methods=", ".join(f"`{name}`" for name in DOUBTED_METHODS), doubted="; ".join(DOUBTED),
        nearest=evidence.NEAREST, few=evidence.FEW,
    )  # fmt: skip
    more = many_classes.section(), held_out.section(), other_networks.section()
    return "\n\n".join([top.strip(), *parts, *more]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--methods",
        type=names_of(chain.from_iterable(METHODS.values())),
        help="names with commas between; default: all of the page",
    )
    parser.add_argument("--again", action="store_true", help="guarded errors of an earlier rule")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--alike", action="store_true", help="only windows that look alike")
    parser.add_argument("--evidence", metavar="MODEL", choices=METHODS, help="only other evidence")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the digits' networks are trained here: threads change them
    until = time.monotonic() + given.seconds
    found: list[dict[str, Any]] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    if given.alike:
        write_json(ALIKE, alike())
    elif given.evidence:
        searched(given.evidence, found)
    elif not given.page:
        for model, methods in METHODS.items():
            chosen = given.methods or methods
            mine = [name for name in methods if name in chosen]
            run(found, model, mine, again=given.again, until=until)
    PAGE.write_text(page(found, json.loads(ALIKE.read_text())))


def run(
    found: list[dict[str, Any]], name: str, methods: Sequence[str], *, again: bool, until: float
) -> None:
    """All cells of a model that are not there yet; each is written when it is done."""
    there = {(row["model"], row["method"], row["stream"]): row for row in found}
    model = source_of(name)
    for method in ("source", *methods):
        for stream in streams_of(name):
            row = there.get((name, method, stream))
            old = row is not None and "guarded" in row and row.get("rule", 1) != RULE
            if (row is not None and not (old and again)) or time.monotonic() > until:
                continue
            if row is None:
                machine = describe_machine(torch.device("cpu"))
                row = {"model": name, "method": method, "stream": stream, "machine": machine}
                found.append(row)
            row |= cell(model, method, name, stream, only_guarded=old) | {"rule": RULE}
            write_json(NUMBERS, found)
            print(*row.values(), flush=True)


def cell(
    model: torch.nn.Module, method: str, which: str, stream: str, *, only_guarded: bool
) -> dict[str, Any]:
    """Errors without and with a guard, and what the guard did."""
    name, options = method.partition(" ")[0], OPTIONS.get(method, {})
    source = None
    if tt.methods()[name].needs:
        source = tt.fit_source(model, labelled(64), methods=[name])
    found: dict[str, Any] = {}
    runs = (("error", None), ("guarded", True))
    for what, guard in runs[:1] if name == "source" else runs[only_guarded:]:
        adapter = tt.adapt(model, name, source=source, guard=guard, **options)
        begun = time.perf_counter()
        found[what] = error(adapter, sent(which, stream))
        found[f"{what} seconds"] = time.perf_counter() - begun
        counts = adapter.counts
        found |= {f"{what} forwards": counts.forwards / counts.samples}
        found["distrusted"] = counts.distrusted / counts.steps
    return found


def labelled(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two thousand source samples in batches."""
    held = load_data("fashion-mnist:sample", split="train")
    index = torch.randperm(len(labels_of(held)), generator=generator(0, "guard", "draw"))[:2000]
    return [stack(held, part) for part in index.split(size)]


def alike() -> list[dict[str, Any]]:
    """Two windows of tent with GroupNorm that look most alike without labels: help, and harm."""
    model, data = load_model("embedded:group"), load_data("fashion-mnist:sample")
    found: list[dict[str, Any]] = []
    for stream in (*HELPED, *HARMED):
        adapter, parts = tt.adapt(model, "tent"), []
        for batch in Scenario.parse(STREAMS[stream]).stream(data, seed=2):
            with torch.no_grad():
                source = model(batch.inputs)
            parts.append((adapter(batch.inputs), source, batch.labels))
        ours, theirs, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        for number, part in enumerate(torch.arange(len(labels)).split(WINDOW)):
            right = [(x[part].argmax(1) == labels[part]).double().mean() for x in (ours, theirs)]
            gain = 100 * float(right[0] - right[1])
            if len(part) == WINDOW and (gain > 3 if stream in HELPED else gain < -3):
                row = {"stream": stream, "window": number, "gain": gain}
                found.append(row | evidence.signs(ours[part], theirs[part]))
    shown = torch.tensor([[row[name] for name in SIGNS] for row in found], dtype=torch.float64)
    shown = (shown - shown.mean(0)) / shown.std(0)
    helped = torch.tensor([row["gain"] > 0 for row in found])
    apart = torch.cdist(shown[helped], shown[~helped])
    one, other = divmod(int(apart.argmin()), int((~helped).sum()))
    won, lost = ([row for row in found if (row["gain"] > 0) is sign] for sign in (True, False))
    return [row | {"apart": float(apart.min())} for row in (won[one], lost[other])]


def searched(name: str, found: Sequence[dict[str, Any]]) -> None:
    """Looks for other evidence in what a model's adapters do without a guard."""
    digital = name.startswith("digits:")
    model, streams = source_of(name), streams_of(name) if digital else DOUBTED
    held = digits(0, "train")
    labels = (held.images, held.labels) if digital else labelled(2000)[0]
    methods = {m: OPTIONS.get(m, {}) for m in METHODS[name] if m in DOUBTED_METHODS}
    rows = evidence.search(model, {s: list(sent(name, s)) for s in streams}, methods, labels)
    mine = {(row["method"], row["stream"]): row for row in found if row["model"] == name}
    frozen = {stream: mine["source", stream]["error"] for stream in streams_of(name)}
    cells = {key: row for key, row in mine.items() if key[0] != "source"}
    failed = {
        key for key, row in cells.items() if not kept(frozen[key[1]], row["error"], row["guarded"])
    }
    evidence.write(name, rows, failed)


if __name__ == "__main__":
    main()
