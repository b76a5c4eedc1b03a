"""Tries the estimators of mutual information on laws whose truth is known.

    python benchmarks/information.py             all, three seeds; goes on where it was stopped
    python benchmarks/information.py --seconds N stops after the run that passes N seconds
    python benchmarks/information.py --page      only figure and table, from the file of numbers
    python benchmarks/information.py --check     only the largest errors beside the tolerances

Writes `benchmarks/information.json`, one estimate for each law, truth, estimator and seed, none where the
training diverged; the figure `docs/images/information.svg` of their means; and the table of the largest
errors in `docs/measures.md`. Every estimator is given the normal scores of both variables, save those
that are tried "as it is".
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from testtime._core.errors import InputError
from testtime._core.files import atomic
from testtime._core.seeds import generator
from testtime.measures.information import bounds, laws
from testtime.measures.information.estimate import normal_scores
from testtime.measures.information.minde import minde
from testtime.measures.information.mine import mine
from testtime.measures.information.neighbours import ksg
from testtime.measures.information.variational import smile, variational

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/information.json"
FIGURE = ROOT / "docs/images/information.svg"
PAGE = ROOT / "docs/measures.md"
SEEDS = (0, 1, 2)
SAMPLES, DIMS = 40_000, 2
NEAR = 20_000
"""Samples that neighbours are given: their cost grows with the square."""

LAWS: dict[str, list[Callable[..., laws.Pairs]]] = {
    "Gaussian": [partial(laws.gaussian, information=i) for i in (0.0, 0.5, 1.5, 4.0)],
    "cubed": [partial(laws.cubed, information=i) for i in (0.0, 0.5, 1.5, 4.0)],
    "uniform": [partial(laws.uniform, noise=e) for e in (2.0, 0.75, 0.3, 0.05)],
    "Student, 3": [partial(laws.student, information=i, freedom=3) for i in (0.0, 0.5, 1.5, 4.0)],
    "multi-modal": [laws.multimodal],
}
LONG = {"lr": 5e-3, "batch_size": 512}
HALF = {"steps": 2000}
ESTIMATORS: dict[str, Callable[..., Any]] = {
    "KSG": lambda x, y, seed: ksg(x[:NEAR], y[:NEAR]),
    "MINE": partial(mine, steps=10_000, **LONG),
    "MINDE": partial(minde, steps=5000, **LONG),
    "SMILE": partial(smile, **HALF),
    "InfoNCE": partial(variational, bound=bounds.infonce, **HALF),
    "DV": partial(variational, bound=bounds.donsker_varadhan, **HALF),
    "NWJ": partial(variational, bound=bounds.nwj, **HALF),
    "JS": partial(variational, bound=bounds.jensen_shannon, **HALF),
    "MINDE, joint": partial(minde, kind="j", steps=5000, **LONG),
}
AS_IT_IS = ", as it is"
ONLY = {"KSG, as it is": "cubed", "MINE, as it is": "cubed", "MINDE, joint": "Gaussian"}
"""Estimators that are tried on one law, some of them without normal scores."""
TOLERANCES = {"MINE": (0.10, 0.03), "MINDE": (0.15, 0.05)}
"""Shares of the truth, and nats where that would be less: those of the small checks."""
OTHERS = (0.15, 0.05)
"""Beside estimators that have none of their own."""
RING = "m-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0"
STYLES = {
    "KSG": ("#888888", f"{RING}z", "none"),
    "MINE": ("#d55e00", "m-4.5 -4.5h9v9h-9z", "12 3"),
    "SMILE": ("#56b4e9", "m-5.5 4.5h11l-5.5 -10z", "none"),
    "DV": ("#e69f00", "m-6 0h12m-6 -6v12", "8 3"),
    "NWJ": ("#cc79a7", "m-4.5 -4.5l9 9m0 -9l-9 9", "3 3"),
    "InfoNCE": ("#009e73", "m-5.5 -4.5h11l-5.5 10z", "8 3 2 3"),
    "JS": ("#999933", RING, "none"),
    "MINDE": ("#0072b2", "m0 -6.5l5.5 6.5l-5.5 6.5l-5.5 -6.5z", "5 3"),
}
"""Colour of each estimator (most are Okabe's and Ito's, which the colour-blind tell apart), path of its mark,
and dashes of its line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="run nothing, draw and tell")
    parser.add_argument("--check", action="store_true", help="run nothing, print the errors")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    if args.check:
        print("\n".join(errors(rows)))
        return
    until = time.monotonic() + args.seconds
    for seed, law, name in _left(rows) if not args.page else []:
        for level, make in enumerate(LAWS[law]):
            random = generator(seed, "information", law, level)
            x, y, truth = make(SAMPLES, dims=DIMS, generator=random)
            if not name.endswith(AS_IT_IS):
                x, y = normal_scores(x), normal_scores(y)
            row = {"law": law, "truth": round(truth, 6), "estimator": name, "seed": seed}
            try:
                found = ESTIMATORS[name.removesuffix(AS_IT_IS)](x, y, seed=seed)
            except InputError:  # the training diverged
                rows.append(row | {"value": None, "standard_error": None})
                continue
            value, error = round(found.value, 5), round(found.standard_error, 5)
            rows.append(row | {"value": value, "standard_error": error})
        with atomic(NUMBERS) as part:
            part.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        if time.monotonic() > until:
            break
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure(rows))
    PAGE.write_text(page(PAGE.read_text(), rows))


def _left(rows: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    done = {(row["seed"], row["law"], row["estimator"]) for row in rows}
    plain = [name for name in ESTIMATORS if name not in ONLY]
    every = [(seed, law, name) for name in plain for seed in SEEDS for law in LAWS]
    every += [(seed, law, name) for name, law in ONLY.items() for seed in SEEDS]
    return [each for each in every if each not in done]


def errors(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table of the error that is largest for its tolerance, at any truth and seed; bold if outside."""
    yield "| | " + " | ".join(LAWS) + " |"
    yield "|---|" + "---|" * len(LAWS)
    for name in dict.fromkeys([*ESTIMATORS, *ONLY]):
        own = [row for row in rows if row["estimator"] == name]
        cells = [worst([row for row in own if row["law"] == law]) for law in LAWS]
        yield f"| {name} | " + " | ".join(cells) + " |"


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table of these numbers in place of the one that it has."""
    head, *table = errors(rows)
    before, after = text.split(head, 1)
    return before + "\n".join([head, *table]) + after[after.index("\n\n") :]


def worst(rows: list[dict[str, Any]]) -> str:
    """The largest error beside its tolerance and the truth that it is of."""
    if not rows:
        return ""
    row = max(rows, key=lambda each: error(each) / tolerance(each))
    off, allowed = error(row), tolerance(row)
    size = "diverged" if off == float("inf") else f"{off:.3f}" if off < 10 else f"{off:.0e}"
    said = f"{size} / {allowed:.3f} at {row['truth']:.2f}"
    return f"**{said}**" if off > allowed else said


def error(row: dict[str, Any]) -> float:
    """How far off, in nats; infinitely where the training diverged."""
    return float("inf") if row["value"] is None else abs(row["value"] - row["truth"])


def tolerance(row: dict[str, Any]) -> float:
    """How far off an estimate may be, in nats."""
    share, least = TOLERANCES.get(method(row["estimator"]), OTHERS)
    return max(share * row["truth"], least)


def method(name: str) -> str:
    """Whose tolerance an estimator of this name has."""
    return name.partition(",")[0]


WIDTH, SIDE, LEFT, TOP, GAP = 940, 230, 46, 52, 76


def figure(rows: list[dict[str, Any]]) -> str:
    """A panel for each law: truth to the right, estimate upwards, the diagonal is right."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * (SIDE + GAP) + 16}" '
        'font-family="sans-serif" font-size="13" fill="#808080">',
        "<title>Truth against estimate for each law and estimator</title>",
    ]
    for i, law in enumerate(LAWS):
        left, top = LEFT + (i % 3) * (SIDE + GAP), TOP + (i // 3) * (SIDE + GAP)
        parts += panel(law, [row for row in rows if row["law"] == law], left, top)
    x, y = LEFT + 2 * (SIDE + GAP) + 20, TOP + SIDE + GAP + 20
    for i, name in enumerate(STYLES):
        up = y + 24 * i
        parts += [
            drawn_line(name, [f"{x - 18},{up - 4}", f"{x + 18},{up - 4}"]),
            mark(name, f"{x},{up - 4}"),
            f'<text x="{x + 26}" y="{up}">{name}</text>',
        ]
    for i, line in enumerate(("thin: the truth", "at the lower edge: below it")):
        parts.append(f'<text x="{x - 18}" y="{y + 24 * (len(STYLES) + i)}">{line}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(law: str, rows: list[dict[str, Any]], left: float, top: float) -> list[str]:
    """Axes, diagonal, and a line through the means over seeds for each estimator."""
    high = 1.15 * max([1.0, *(row["truth"] for row in rows)])
    low = -0.08 * high

    def at(truth: float, value: float) -> str:
        share = (min(max(v, low), high) for v in (truth, value))
        u, v = (SIDE * (each - low) / (high - low) for each in share)
        return f"{left + u:.1f},{top + SIDE - v:.1f}"

    parts = [
        f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#808080" stroke-opacity=".5"/>',
        f'<text x="{left}" y="{top - 10}" font-weight="bold">{law}</text>',
        f'<polyline points="{at(low, low)} {at(high, high)}" fill="none" stroke="#808080"/>',
        f'<text x="{left + SIDE / 2}" y="{top + SIDE + 32}" text-anchor="middle">truth, nats</text>',
        f'<text x="{left + SIDE}" y="{top - 10}" text-anchor="end">estimate, nats</text>',
    ]
    for tick in [t for t in (0, 0.5, 1, 2, 3, 4, 5) if t <= high and (high < 2.5 or t != 0.5)]:
        x, y = at(tick, tick).split(",")
        parts += [
            f'<text x="{x}" y="{top + SIDE + 16}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{left - 6}" y="{float(y) + 4}" text-anchor="end">{tick:g}</text>',
        ]
    for name in STYLES:
        mine_ = [r for r in rows if r["estimator"] == name and r["value"] is not None]
        truths = sorted({row["truth"] for row in mine_})
        points = [at(t, fmean(r["value"] for r in mine_ if r["truth"] == t)) for t in truths]
        parts += [drawn_line(name, points), *(mark(name, point) for point in points)]
    return parts


def drawn_line(name: str, points: list[str]) -> str:
    """A line of an estimator."""
    colour, _, dashes = STYLES[name]
    return (
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dashes}"/>'
    )


def mark(name: str, point: str) -> str:
    """A mark of an estimator; one whose path stays open is drawn, not filled."""
    colour, path, _ = STYLES[name]
    fill = colour if path.endswith("z") else "none"
    return f'<path d="M{point}{path}" fill="{fill}" stroke="{colour}" stroke-width="1.6"/>'


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
