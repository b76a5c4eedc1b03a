"""The methods on the kinds of streams: the error matrix, and its page.

    testtime bench ...                            see COMMAND
    python benchmarks/matrix.py runs/matrix       numbers of a run, and the page of them
    python benchmarks/matrix.py                   only the page, from the file of numbers

Writes `benchmarks/matrix.json` and `docs/matrix.md`. The bench goes on where it was interrupted.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from between import write_json
from testtime._core.registry import entries
from testtime.bench.metrics import OPEN_SET, summarise
from testtime.bench.store import read_run
from testtime.streams.scenarios import PRESETS, Scenario

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/matrix.json"
PAGE = ROOT / "docs/matrix.md"

COMMAND = r"""testtime bench --methods all --model embedded:batch,embedded:group --seeds 1 --out runs/matrix \
    --stream all,domains=gaussian_noise+motion_blur+fog+jpeg_compression,samples=128,batch_size=32"""

TOP = """---
hide: [toc]
---

# Methods by streams

Which method helps on which kind of stream? The numbers are errors in percent of the answers given while adapting.

- <span class="gain">Green</span>: more than a point below the source model.
- <span class="harm">Red</span>: more than a point above it.
- **Bold**: the lowest of its column. Empty: not run.

How it was measured:

- **Data**: Fashion-MNIST under corruption at severity 5: {domains}, {samples} images of each, in batches of {batch};
  {seeds}. {machine}
- **Methods** have the options of their papers. The streams are short ({images} images): methods whose step sizes are made
  for thousands of batches have little time to learn here. `simatta` has nobody to ask for labels, and `sqrl` finds no
  rules in pixels: both answer as the source does.
- **Streams**: `single` sends one image at a time. `open-set` adds as many images of no class (blobs); its errors are those
  on known images.

```bash
{command}
python benchmarks/matrix.py runs/matrix
```

The first command goes on where it was interrupted, and the second writes this page.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run")
    given = parser.parse_args()
    if given.run is not None:
        planned = json.loads((given.run / "run.json").read_text()).values()
        records = numbers(read_run(given.run, partial=True), planned)
        write_json(NUMBERS, records)
    if not NUMBERS.exists():
        sys.exit("no numbers yet: give the folder of a run")
    PAGE.write_text(page(json.loads(NUMBERS.read_text())))


def numbers(rows: list[dict[str, Any]], planned: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each model, stream and method; without numbers where it was not run."""
    machines = {row["cell"]: row["machine"] for row in rows}
    kept = ("model", "method", "error", "error_std", "clean_error", "seeds", "scenario", *OPEN_SET)
    found = [
        {name: record[name] for name in kept if name in record}
        | {"name": short(Scenario.from_toml(record["scenario"])), "machine": next(iter(machines.values()))}
        for record in summarise(rows)
    ]  # fmt: skip
    held = {(record["model"], record["method"], record["name"]) for record in found}
    every = [(r["model"], r["method"], short(Scenario.from_toml(r["stream"]))) for r in planned]
    missing = [
        dict(zip(("model", "method", "name"), key, strict=True)) for key in every if key not in held
    ]
    return [*found, *missing]


def short(scenario: Scenario) -> str:
    """The one word that tells a stream from the others of the matrix."""
    plain = Scenario()
    if scenario.batch_size == 1:
        return "single"
    if scenario.unknown:
        return "open-set"
    for name in ("labels", "distribution", "pattern"):
        if getattr(scenario, name) != getattr(plain, name):
            return str(getattr(scenario, name))
    return "continual"


def page(records: list[dict[str, Any]]) -> str:
    """The page: a table for each model, a line for each method, a column for each stream."""
    run = [record for record in records if "error" in record]
    scenarios = [Scenario.from_toml(record["scenario"]) for record in run]
    widest = max(scenarios, key=lambda each: len(each.domains))
    seeds = max(record["seeds"] for record in run)
    top = TOP.format(
        domains=", ".join(name.replace("_", " ") for name in widest.domains),
        samples=widest.samples, batch=widest.batch_size, images=len(widest.domains) * (widest.samples or 0),
        seeds="one seed" if seeds == 1 else f"means over {seeds} seeds",
        machine=f"{records[0]['machine']}.", command=COMMAND,
    )  # fmt: skip
    parts = [top.strip()]
    for model in dict.fromkeys(record["model"] for record in records):
        mine = [record for record in records if record["model"] == model]
        there = {record["method"] for record in mine}
        away = [name for name in entries("method") if name not in there]
        said = f"Not for this model: {', '.join(f'`{name}`' for name in away)}." if away else ""
        own = [record for record in mine if "error" in record]
        parts += [f"## {model}", table(own), said, left_out(mine), unknowns(own)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(records: list[dict[str, Any]]) -> str:
    """Errors of one model, and the clean error after the continual stream."""
    names = {record["name"] for record in records}
    streams = [name for name in PRESETS if name in names]
    error = {(r["method"], r["name"]): r["error"] for r in records}
    clean = {r["method"]: r["clean_error"] for r in records if r["name"] == "continual"}
    methods = ["source", *sorted({r["method"] for r in records} - {"source"})]
    best = {s: min(error.get((m, s), float("inf")) for m in methods) for s in streams}

    def cell(method: str, stream: str) -> str:
        value = error.get((method, stream))
        if value is None:
            return ""
        text = f"{value:.1f}"
        text = f"**{text}**" if value <= best[stream] else text
        change = value - error.get(("source", stream), value)
        kind = "gain" if change < -1 else "harm" if change > 1 else ""
        return f'<span class="{kind}">{text}</span>' if kind else text

    lines = [
        line(["method", *streams, "clean afterwards"]),
        line(["---", *["--:"] * (len(streams) + 1)]),
        *(
            line([
                f"[`{method}`](methods/{method}.md)",
                *(cell(method, stream) for stream in streams),
                f"{clean[method]:.1f}" if method in clean else "",
            ])
            for method in methods
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def left_out(records: list[dict[str, Any]]) -> str:
    """A sentence on what was not run."""
    missing: dict[str, list[str]] = {}
    for record in records:
        if "error" not in record:
            missing.setdefault(record["method"], []).append(record["name"])
    alike: dict[str, list[str]] = {}
    for method in sorted(missing):
        names = [name for name in PRESETS if name in missing[method]]
        alike.setdefault(", ".join(names), []).append(f"`{method}`")
    said = "; ".join(f"{', '.join(methods)} on {names}" for names, methods in alike.items())
    return f"Not run: {said}." if said else ""


def unknowns(records: list[dict[str, Any]]) -> str:
    """How well images of no class are told apart on the open-set stream, where it was run."""
    own = sorted(
        (r for r in records if r["name"] == "open-set" and "auroc" in r),
        key=lambda r: (r["method"] != "source", -r["auroc"]),
    )
    if not own:
        return ""
    lines = [
        "Images of no class on `open-set`, told apart by the method's own score where it has one "
        "(`ostta`, `stamp`), else by the largest probability; in percent but for the first:",
        "",
        line(["method", "AUROC", "FPR95", "OSCR", "H-score"]),
        line(["---", *["--:"] * 4]),
        *(
            line([
                f"[`{r['method']}`](methods/{r['method']}.md)",
                f"{r['auroc']:.3f}", *(f"{100 * r[name]:.1f}" for name in OPEN_SET[1:]),
            ])
            for r in own
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
