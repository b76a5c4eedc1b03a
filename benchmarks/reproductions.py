"""Runs the small checks of all papers and writes down what they found.

    python benchmarks/reproductions.py                  all papers, about an hour on one core
    python benchmarks/reproductions.py --only sar,lame  these, the others as they were
    python benchmarks/reproductions.py --seeds 3        the first three seeds instead of five
    python benchmarks/reproductions.py --page           only the page, from the file of numbers

Writes `benchmarks/reproductions.json`, one record for each paper as `testtime reproduce --json`
prints it, with the processor seconds it took and the machine; and the page `docs/reproductions.md` of it.
The remarks on the page are those of the check's file.
"""

import argparse
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from names import names_of
from testtime._core.files import atomic
from testtime._core.registry import Entry, entries
from testtime.cli.reproduce import number
from testtime.papers.catalogue import record

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/reproductions.json"
PAGE = ROOT / "docs/reproductions.md"
SEEDS = 5

TOP = """# Reproductions

Each paper here has a small check of one of its claims. It uses small networks on real digits under corruption, or samples
of a known distribution. The thresholds were set beforehand. A claim counts as held only if it is true for every seed.

`testtime reproduce SLUG` runs one check. `python benchmarks/reproductions.py` writes this page.
"""


def main() -> None:
    checks = {entry.paper: entry for entry in entries("check").values()}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", type=names_of(checks), help="papers with commas between; default all"
    )
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many, from 0 on")
    args = parser.parse_args()
    known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    for slug in [] if args.page else args.only or checks:
        known[slug] = run(checks[slug], seeds=range(args.seeds))
        print(
            f"{slug}: {known[slug]['seconds']:.0f} s, held: {known[slug]['held']}", file=sys.stderr
        )
        with atomic(NUMBERS) as part:
            part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(known, checks))


def run(entry: Entry, *, seeds: Sequence[int]) -> dict[str, Any]:
    """The record of one check, its processor seconds with the training of its networks."""
    from testtime.papers.digits import trained  # noqa: PLC0415

    trained.cache_clear()
    began = time.process_time()
    found = vars(entry.factory(seeds=seeds))
    seconds = time.process_time() - began
    return {**found, "seconds": round(seconds, 1), "machine": machine()}


def machine() -> str:
    """Processor, cores and threads in use, and the version of torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, torch {torch.__version__}"


def page(known: dict[str, dict[str, Any]], checks: dict[str, Entry]) -> str:
    """The page: a line for each paper, then its numbers with every seed."""
    rows, parts = [], []
    for slug, found in sorted(known.items()):
        verdict = found["numbers"]["claim held"]
        held = (
            "held" if found["held"] else f"not held ({sum(map(bool, verdict))} of {len(verdict)})"
        )
        rows.append(f"| [{slug}](#{slug}) | {held} | {found['seconds']:.0f} |")
        parts.append(part(slug, found, verdict, checks[slug]))
    machines = sorted({found["machine"] for found in known.values()})
    told = f"Processor seconds, the training of the networks in them, on: {'; '.join(machines)}."
    table = "\n".join(["| paper | claim | seconds |", "|---|---|--:|", *rows])
    return "\n\n".join([TOP.strip(), table, told, *parts]) + "\n"


def part(slug: str, found: dict[str, Any], verdict: list[float], entry: Entry) -> str:
    """One paper: title, claim, numbers, remarks."""
    seeds = found["seeds"]
    lines = [
        f"| | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        f"|---|{'--:|' * len(seeds)}",
        *(f"| {name} | {' | '.join(map(number, values))} |" for name, values in found["numbers"].items()
          if name != "claim held"),
        f"| **claim held** | {' | '.join('yes' if value else 'no' for value in verdict)} |",
    ]  # fmt: skip
    remarks = (inspect.getdoc(inspect.getmodule(entry.factory)) or "").partition("\n")[2].strip()
    texts = [f"## {slug}", f"{record(slug).title}.", f"Claim: {found['claim']}", "\n".join(lines)]
    return "\n\n".join([*texts, remarks] if remarks else texts)


if __name__ == "__main__":
    main()
