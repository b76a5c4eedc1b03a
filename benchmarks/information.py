"""Tries the estimators of mutual information on laws whose truth is known.

    python benchmarks/information.py             all, three seeds; goes on where it was stopped
    python benchmarks/information.py --seconds N stops after the run that passes N seconds
    python benchmarks/information.py --page      only the figure, from the file of numbers

Writes `benchmarks/information.json`, one estimate for each law, truth, estimator and seed, none where the
training diverged, and the figure `docs/images/information.svg` of their means.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from testtime._core.errors import InputError
from testtime._core.seeds import generator
from testtime.measures.information import bounds, laws
from testtime.measures.information.minde import minde
from testtime.measures.information.mine import mine
from testtime.measures.information.neighbours import ksg
from testtime.measures.information.variational import smile, variational

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/information.json"
FIGURE = ROOT / "docs/images/information.svg"
SEEDS = (0, 1, 2)
SAMPLES, DIMS = 10_000, 2

LAWS: dict[str, list[Callable[..., laws.Pairs]]] = {
    "Gaussian": [partial(laws.gaussian, information=i) for i in (0.0, 0.5, 1.5, 4.0)],
    "cubed": [partial(laws.cubed, information=i) for i in (0.0, 0.5, 1.5, 4.0)],
    "uniform": [partial(laws.uniform, noise=e) for e in (2.0, 0.75, 0.3, 0.05)],
    "Student, 3": [partial(laws.student, information=i, freedom=3) for i in (0.0, 0.5, 1.5, 4.0)],
    "multi-modal": [laws.multimodal],
}
TRAINED = {"steps": 500, "lr": 2e-3}
ESTIMATORS: dict[str, Callable[..., Any]] = {
    "KSG": lambda x, y, seed: ksg(x, y),
    "MINE": partial(mine, **TRAINED),
    "SMILE": partial(smile, **TRAINED),
    "DV": partial(variational, bound=bounds.donsker_varadhan, **TRAINED),
    "NWJ": partial(variational, bound=bounds.nwj, **TRAINED),
    "InfoNCE": partial(variational, bound=bounds.infonce, **TRAINED),
    "JS": partial(variational, bound=bounds.jensen_shannon, **TRAINED),
    "MINDE": partial(minde, steps=500),
}
COLOURS = {
    "KSG": "#888888", "MINE": "#d1495b", "SMILE": "#2a7fde", "DV": "#c97b12",
    "NWJ": "#8e5bd0", "InfoNCE": "#1d9a6c", "JS": "#c255a6", "MINDE": "#4b4fd6",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="run nothing, draw the figure")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    until = time.monotonic() + args.seconds
    for seed, (law, levels), name in _all(rows) if not args.page else []:
        for level, make in enumerate(levels):
            random = generator(seed, "information", law, level)
            x, y, truth = make(SAMPLES, dims=DIMS, generator=random)
            row = {"law": law, "truth": round(truth, 6), "estimator": name, "seed": seed}
            try:
                found = ESTIMATORS[name](x, y, seed=seed)
            except InputError:  # the training diverged, as that of NWJ does on heavy tails
                rows.append(row | {"value": None, "standard_error": None})
                continue
            value, error = round(found.value, 5), round(found.standard_error, 5)
            rows.append(row | {"value": value, "standard_error": error})
        NUMBERS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        if time.monotonic() > until:
            break
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(figure(rows))


def _all(rows: list[dict[str, Any]]) -> list[Any]:
    done = {(row["seed"], row["law"], row["estimator"]) for row in rows}
    every = [(s, law, name) for s in SEEDS for law in LAWS.items() for name in ESTIMATORS]
    return [each for each in every if (each[0], each[1][0], each[2]) not in done]


WIDTH, SIDE, LEFT, TOP, GAP = 940, 230, 46, 52, 76


def figure(rows: list[dict[str, Any]]) -> str:
    """A panel for each law: truth to the right, estimate upwards, the diagonal is right."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * (SIDE + GAP) + 10}" '
        'font-family="sans-serif" font-size="13" fill="#808080">',
        "<title>Truth against estimate for each law and estimator</title>",
    ]
    for i, law in enumerate(LAWS):
        left, top = LEFT + (i % 3) * (SIDE + GAP), TOP + (i // 3) * (SIDE + GAP)
        parts += panel(law, [row for row in rows if row["law"] == law], left, top)
    x, y = LEFT + 2 * (SIDE + GAP) + 20, TOP + SIDE + GAP + 20
    for i, (name, colour) in enumerate(COLOURS.items()):
        parts += [
            f'<circle cx="{x}" cy="{y + 24 * i - 4}" r="5" fill="{colour}"/>',
            f'<text x="{x + 14}" y="{y + 24 * i}">{name}</text>',
        ]
    for i, line in enumerate(("dashed: the truth", "at the lower edge: below it")):
        parts.append(f'<text x="{x - 5}" y="{y + 24 * (len(COLOURS) + i)}">{line}</text>')
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
        f'<polyline points="{at(low, low)} {at(high, high)}" fill="none" stroke="#808080" stroke-dasharray="5 4"/>',
        f'<text x="{left + SIDE / 2}" y="{top + SIDE + 32}" text-anchor="middle">truth, nats</text>',
        f'<text x="{left + SIDE}" y="{top - 10}" text-anchor="end">estimate, nats</text>',
    ]
    for tick in [t for t in (0, 0.5, 1, 2, 3, 4, 5) if t <= high and (high < 2.5 or t != 0.5)]:
        x, y = at(tick, tick).split(",")
        parts += [
            f'<text x="{x}" y="{top + SIDE + 16}" text-anchor="middle">{tick:g}</text>',
            f'<text x="{left - 6}" y="{float(y) + 4}" text-anchor="end">{tick:g}</text>',
        ]
    for name, colour in COLOURS.items():
        mine_ = [r for r in rows if r["estimator"] == name and r["value"] is not None]
        truths = sorted({row["truth"] for row in mine_})
        points = [at(t, fmean(r["value"] for r in mine_ if r["truth"] == t)) for t in truths]
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        for point in points:
            x, y = point.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}" fill-opacity=".85"/>')
    return parts


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
