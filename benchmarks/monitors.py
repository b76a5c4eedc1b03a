"""False alarms, delays and memory of the monitors, beside ADWIN, Page-Hinkley and an MMD test.

    python benchmarks/monitors.py                some minutes on one core; needs river
    python benchmarks/monitors.py --again PARTS  measures these anew: false alarms, delays, memory
    python benchmarks/monitors.py --seconds N    stops after the measurement that passes N seconds

Measures what `benchmarks/monitors.json` lacks, and writes the figure `docs/monitors.svg` and the
tables of `docs/monitors.md` between its marks once all is there. Streams run side by side, as
signals or streams of one detector; what is counted is each stream's own wealth. Memory is that of
a stream in batches of 100, of the state and of the whole process with torch in it.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from between import write_json
from testtime._core.seeds import generator
from testtime.bench.machine import describe_machine
from testtime.guard.betting import Starting
from testtime.guard.collapse import Collapse
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.independence import Independence
from testtime.guard.monitor import Detector, Monitor
from testtime.guard.risk import Risk, upper_bound
from testtime.guard.two_sample import TwoSample

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/monitors.json"
FIGURE, PAGE = ROOT / "docs/monitors.svg", ROOT / "docs/monitors.md"

ALPHA = 0.05
STREAMS = 1000
"""Null streams of each monitor."""
CALM, AFTER = 1000, 2000
"""Samples before and after a change."""
SHIFTS = (0.25, 0.5, 1.0, 1.5, 2.0)
"""Size of the change of the mean, in standard deviations."""
CHANGED = 60
"""Streams for each size of shift."""
REFERENCE = 1000
WINDOW, PERMUTATIONS = 100, 200
"""Of the MMD test: samples on each side, looked at whenever a window is full."""

First = Callable[[Tensor, int], Tensor]
"""Streams (n, streams), seed -> sample at which each first raises its alarm; n + 1 if never."""


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=generator(seed, "monitors"), dtype=torch.float64)


def exchangeability(x: Tensor, seed: int) -> Tensor:
    """Each stream against a reference set of its own."""
    test = Exchangeability.fit(draw(seed + 1, REFERENCE, x.shape[1]), alpha=ALPHA)
    return _first_of(test, x.split(4), 4, len(x))


def risk(x: Tensor, seed: int) -> Tensor:
    """The normal distribution function of each value, against the mean of a reference set."""
    scores = torch.special.ndtr(draw(seed + 1, REFERENCE, x.shape[1]))
    bounds = torch.tensor([upper_bound(row, alpha=ALPHA / 2) for row in scores.T])
    bets = Starting()
    _, path = bets.run(bets.init(x.shape[1:]), torch.special.ndtr(x) / bounds - 1)
    return _first(path >= math.log(2 / ALPHA))


def two_sample(x: Tensor, seed: int) -> Tensor:
    """Each value paired with a fresh reference value."""
    test = TwoSample.fit(draw(seed + 2, 500, 1), alpha=ALPHA, bets=Starting(), memory=200)
    pairs = zip(draw(seed + 1, *x.shape, 1).split(10), x[..., None].split(10), strict=True)
    return _first_of(test, pairs, 10, len(x))


def independence(x: Tensor, seed: int) -> Tensor:
    """Each value beside an independent one."""
    test = Independence(gamma_x=0.25, gamma_y=0.25, alpha=ALPHA, memory=200)
    pairs = zip(draw(seed + 1, *x.shape, 1).split(2), x[..., None].split(2), strict=True)
    return _first_of(test, pairs, 2, len(x))


def collapse(x: Tensor, seed: int) -> Tensor:
    """Even answers of ten classes, which differ from the source's as often as the limit allows.

    In every other stream one class crowds, and is as much more frequent as its limit allows.
    """
    test, chance = Collapse(classes=10, alpha=ALPHA), generator(seed, "answers")
    source = torch.randint(10, x.shape, generator=chance)
    apart = torch.randint(1, 10, x.shape, generator=chance)
    differs = torch.special.ndtr(x) < test.disagreement
    adapted = (source + apart * differs) % 10
    crowds = torch.special.ndtr(x[:, 1::2]) < test.share / 0.9  # a tenth of them answers it anyway
    adapted[:, 1::2] = source[:, 1::2].masked_fill(crowds, 3)
    sure, found = 5 * torch.eye(10), list[int]()
    for ours, theirs in zip(adapted.T, source.T, strict=True):
        _, alarm = test.step(test.init(), sure[ours], sure[theirs])
        found.append(len(x) + (not alarm))
    return torch.tensor(found)


def adwin(x: Tensor, _: int) -> Tensor:
    """river's, with its defaults (delta 0.002)."""
    from river import drift  # noqa: PLC0415

    return _by_river(x, drift.ADWIN)


def page_hinkley(x: Tensor, _: int) -> Tensor:
    """river's, with its defaults (threshold 50)."""
    from river import drift  # noqa: PLC0415

    return _by_river(x, drift.PageHinkley)


def mmd(x: Tensor, seed: int) -> Tensor:
    """A permutation test of each full window against as many reference values, at level alpha."""
    reference = draw(seed + 1, WINDOW, x.shape[1])
    chance, first = generator(seed, "permutations"), torch.full(x.shape[1:], len(x) + 1)
    for end in range(WINDOW, len(x) + 1, WINDOW):
        for s in torch.nonzero(first > len(x)).flatten().tolist():
            both = torch.cat([reference[:, s], x[end - WINDOW : end, s]])
            kernel = (-(both[:, None] - both).square() / 2).exp()
            sign = torch.ones(PERMUTATIONS + 1, 2 * WINDOW, dtype=torch.float64)
            sign[:, WINDOW:] = -1
            order = torch.rand(PERMUTATIONS, 2 * WINDOW, generator=chance).argsort(1)
            sign[1:] = sign[1:].gather(1, order)
            value = ((sign @ kernel) * sign).sum(1)
            if (value[1:] >= value[0]).sum() + 1 <= ALPHA * (PERMUTATIONS + 1):
                first[s] = end
    return first


def _by_river(x: Tensor, make: Callable[[], Any]) -> Tensor:
    found = []
    for stream in x.T.tolist():
        detector, first = make(), len(stream) + 1
        for i, value in enumerate(stream, 1):
            detector.update(value)
            if detector.drift_detected:
                first = i
                break
        found.append(first)
    return torch.tensor(found)


def _first_of(test: Detector[Any], batches: Any, size: int, count: int) -> Tensor:
    """The sample after which each stream's wealth, read after each batch, reaches 1 / alpha."""
    state, crossed = test.init(), []
    for batch in batches:
        state, alarm = test.step(state, *(batch if isinstance(batch, tuple) else (batch,)))
        crossed.append(alarm.parts >= -math.log(ALPHA))
    at = _first(torch.stack(crossed)) * size
    return torch.where(at > count, count + 1, at)


def _first(crossed: Tensor) -> Tensor:
    never = torch.ones_like(crossed[:1])
    return torch.cat([crossed, never]).int().argmax(0) + 1


NULLS: dict[str, tuple[First, int, int]] = {
    "Exchangeability": (exchangeability, 3000, STREAMS),
    "Risk": (risk, 3000, STREAMS),
    "TwoSample": (two_sample, 600, STREAMS),
    "Independence": (independence, 600, STREAMS),
    "Collapse": (collapse, 3000, STREAMS),
    "ADWIN": (adwin, 3000, 200),
    "Page-Hinkley": (page_hinkley, 3000, 200),
    "MMD at each window": (mmd, 3000, 50),
}
"""Monitor -> how it is run, samples of a stream, streams."""

DELAYS: dict[str, First] = {
    "Exchangeability": exchangeability, "Risk": risk, "ADWIN": adwin, "Page-Hinkley": page_hinkley, "MMD at each window": mmd,
}  # fmt: skip


def false_alarms(name: str) -> dict[str, Any]:
    """Streams without a change that raise an alarm at any time."""
    run, samples, streams = NULLS[name]
    alarms = int((run(draw(0, samples, streams), 10) <= samples).sum())
    return {"samples": samples, "streams": streams, "alarms": alarms}


def delays(name: str) -> dict[str, Any]:
    """Median delay after a change; None where fewer than half of the streams find it in time."""
    streams = CHANGED if name != "MMD at each window" else CHANGED // 3
    x = draw(20, CALM + AFTER, len(SHIFTS) * streams)
    x[CALM:] += torch.tensor(SHIFTS).repeat_interleave(streams)
    found: dict[str, Any] = {}
    for shift, at in zip(SHIFTS, DELAYS[name](x, 40).split(streams), strict=True):
        early = at <= CALM
        late = (at[~early] - CALM).double()
        median = float(late.quantile(0.5)) if len(late) else math.inf
        found[str(shift)] = {
            "median": median if median <= AFTER else None,
            "found": float((late <= AFTER).double().mean()), "early": int(early.sum()),
            "streams": streams,
        }  # fmt: skip
    return found


def memory(name: str) -> dict[str, Any]:
    """A long stream: bytes of the state, size of the process, processor time a sample."""
    x, y = draw(2, 100, 4), draw(3, 100, 1)
    scores = torch.rand(100, generator=generator(4, "monitors"), dtype=torch.float64) * 0.2
    detector, batch, samples = {
        "Exchangeability": (Exchangeability.fit(draw(0, REFERENCE, 4)), (x,), 1_000_000),
        "Risk": (Risk(bound=0.2), (scores,), 1_000_000),
        "Collapse": (Collapse(classes=4), (x, x), 1_000_000),
        "Independence": (
            Independence(gamma_x=0.3, gamma_y=0.3, memory=100), (x, y), 1_000_000,
        ),
        "TwoSample": (TwoSample.fit(draw(5, 500, 4), memory=100), (x, x.flip(0)), 1_000_000),
    }[name]  # fmt: skip
    monitor, shuffle = Monitor(detector), generator(0, name)
    start, sizes = time.process_time(), []
    for i in range(1, samples // 100 + 1):
        order = torch.randperm(100, generator=shuffle)
        monitor.update(*(each[order] for each in batch))
        if i in (100, samples // 100):
            state = sum(v.nbytes for v in monitor.state_dict().values())
            sizes.append((state, resident()))
    (state_early, early), (state_late, late) = sizes
    return {
        "samples": samples, "state_early": state_early, "state_late": state_late,
        "resident_early_mib": early, "resident_late_mib": late,
        "microseconds": 1e6 * (time.process_time() - start) / samples,
    }  # fmt: skip


def resident() -> float:
    """MiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


PARTS: dict[str, tuple[Callable[[str], dict[str, Any]], list[str]]] = {
    "false alarms": (false_alarms, list(NULLS)),
    "delays": (delays, list(DELAYS)),
    "memory": (memory, ["Exchangeability", "Risk", "Collapse", "Independence", "TwoSample"]),
}


COLOURS = ("#1f9e89", "#3b7dd8", "#a05ad0", "#d8742c", "#c23b5a", "#8a8a3a")


def figure(found: dict[str, Any]) -> str:
    """Median delay against size of shift, both on logarithmic axes, readable on light and dark."""
    wide, high, left, top, right, bottom = 760, 420, 70, 20, 190, 60
    lines, labels = [], []

    def place(shift: float, delay: float) -> tuple[float, float]:
        across = (math.log(shift) - math.log(SHIFTS[0])) / math.log(SHIFTS[-1] / SHIFTS[0])
        down = math.log(AFTER / delay) / math.log(AFTER / 4)
        return left + across * (wide - left - right), top + down * (high - top - bottom)

    for delay in (4, 10, 30, 100, 300, 1000, 2000):
        y = place(SHIFTS[0], delay)[1]
        lines.append(
            f'<path d="M{left} {y:.1f}H{wide - right}" stroke="#888" stroke-opacity=".25"/>'
        )
        labels.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{delay}</text>')
    for shift in SHIFTS:
        x = place(shift, 4)[0]
        labels.append(
            f'<text x="{x:.1f}" y="{high - bottom + 20}" text-anchor="middle">{shift:g}</text>'
        )
    ends: list[tuple[float, str, str]] = []
    for colour, (name, at) in zip(COLOURS, found["delays"].items(), strict=False):
        points = [place(s, max(at[str(s)]["median"], 4)) for s in SHIFTS if at[str(s)]["median"]]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = "" if name in ("Exchangeability", "Risk") else ' stroke-dasharray="6 4"'
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        ends.append((points[-1][1], name, colour))
    y = 0.0
    for wanted, name, colour in sorted(ends):
        y = max(wanted, y + 18)
        labels.append(
            f'<text x="{wide - right + 12}" y="{y + 4:.1f}" fill="{colour}">{name}</text>'
        )
    middle = left + (wide - left - right) / 2
    labels.append(
        f'<text x="{middle}" y="{high - 14}" text-anchor="middle">shift of the mean, in standard deviations</text>'
    )
    labels.append(
        f'<text transform="translate(18 {top + (high - top - bottom) / 2}) rotate(-90)" text-anchor="middle">median delay, samples</text>'
    )
    body = "\n".join([*lines, *labels])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" fill="#808080" '
        f'font-family="sans-serif" font-size="13">\n{body}\n</svg>\n'
    )


def tables(found: dict[str, Any]) -> str:
    """Markdown of false alarms and memory."""
    rows = ["| monitor | streams | samples | alarms | rate |", "|---|---|---|---|---|"]
    for name, each in ((name, found["false alarms"][name]) for name in NULLS):
        rate = each["alarms"] / each["streams"]
        rows.append(
            f"| {name} | {each['streams']} | {each['samples']} | {each['alarms']} | {rate:.1%} |"
        )
    rows += [
        "",
        "| monitor | samples | state after 10,000 | at the end | process after 10,000 | at the end | time a sample |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, each in found["memory"].items():
        rows.append(
            f"| {name} | {each['samples']:,} | {each['state_early']:,} bytes | "
            f"{each['state_late']:,} bytes | {each['resident_early_mib']:.1f} MiB | "
            f"{each['resident_late_mib']:.1f} MiB | {each['microseconds']:.0f} µs |"
        )
    return "\n".join(rows)


def write(found: dict[str, Any]) -> None:
    """The figure, and the tables between the marks of the page."""
    FIGURE.write_text(figure(found), "utf-8")
    mark, end = "<!-- numbers -->", "<!-- end of numbers -->"
    before, _, rest = PAGE.read_text("utf-8").partition(mark)
    after = rest.partition(end)[2]
    PAGE.write_text(
        f"{before}{mark}\n\n{tables(found)}\n\nOn {found['machine']}.\n\n{end}{after}", "utf-8"
    )


def main() -> None:
    """Measures what the file of numbers lacks, and writes figure and tables when all is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", nargs="*", default=[], choices=PARTS, help="measure anew")
    parser.add_argument("--seconds", type=float, default=math.inf, help="when to stop")
    args = parser.parse_args()
    found = json.loads(NUMBERS.read_text("utf-8")) if NUMBERS.exists() else {}
    found = {part: each for part, each in found.items() if part not in args.again}
    found["machine"] = describe_machine(torch.device("cpu"))
    until = time.monotonic() + args.seconds
    for part, (measure, names) in PARTS.items():
        for name in names:
            if name not in found.setdefault(part, {}):
                if time.monotonic() > until:
                    return
                found[part][name] = measure(name)
                write_json(NUMBERS, found)
                print(part, name, found[part][name], file=sys.stderr)
    write(found)


if __name__ == "__main__":
    main()
