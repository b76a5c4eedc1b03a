"""The pictures of docs/test-time-compute.md, drawn from the simulated questions and the cost model.

python benchmarks/test_time_compute.py
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from testtime._core.seeds import generator
from testtime.decode.compute_optimal import cross_validate
from testtime.decode.kinetics import QWEN3, dense_cost, top_k_cost
from testtime.decode.strategies import beam_search, best_of_n
from testtime.papers.checks.compute_optimal_scaling import LEVELS, PROBES, Question, answer

OUT = Path(__file__).parents[1] / "docs" / "images"
SAMPLES = 1, 4, 16, 64
QUESTIONS = 500
COLOURS = "#4c78a8", "#f58518", "#2ca02c", "#b279a2", "#e45756", "#72b7b2", "#8c8c8c"
Lines = Mapping[str, Sequence[tuple[float, float]]]


def main() -> None:
    OUT.mkdir(exist_ok=True)
    accuracy = compute_optimal()
    picture = draw(
        accuracy, across="samples", up="right answers, %",
        ticks=([(n, str(n)) for n in SAMPLES], [(v, str(v)) for v in range(20, 81, 10)]),
    )  # fmt: skip
    (OUT / "compute-optimal.svg").write_text(picture, "utf-8")
    for name, points in accuracy.items():
        print(name, " ".join(f"{n}: {value:.1f}" for n, value in points))
    picture = draw(
        kinetics(), across="tokens of the answer", up="equivalent FLOPs", log_up=True,
        ticks=([(2**k, f"{2**k:,}") for k in range(9, 16, 2)],
               [(10.0**k, f"1e{k}") for k in range(13, 18)]),
    )  # fmt: skip
    (OUT / "kinetics.svg").write_text(picture, "utf-8")


def compute_optimal() -> dict[str, list[tuple[float, float]]]:
    """Accuracy in percent of each strategy alone and of the choice, for each number of samples."""
    chance = generator(0, "test-time compute", "picture")
    questions = [Question(LEVELS[i % len(LEVELS)], chance) for i in range(QUESTIONS)]
    easiness = torch.tensor([q.probe(PROBES)[0] for q in questions])
    lines: dict[str, list[tuple[float, float]]] = {}
    for n in SAMPLES:
        ways = {"best-of-N": best_of_n, "beam search": partial(beam_search, width=min(n, 4))}
        right = torch.tensor(
            [
                [answer(way(q.extend, q.verify, samples=n, answer=answer).best) == 0
                 for q in questions]
                for way in ways.values()
            ]
        )  # fmt: skip
        found = cross_validate(easiness, right.double(), list(ways))
        for name, value in {**found.single, "chosen by difficulty": found.accuracy}.items():
            lines.setdefault(name, []).append((n, 100 * value))
    return lines


def kinetics() -> dict[str, list[tuple[float, float]]]:
    """Cost of one answer to a prompt of 200 tokens, for each length."""
    lengths = [2**k for k in range(9, 16)]
    lines = {
        name: [(n, dense_cost(shape, prompt=200, length=n).total) for n in lengths]
        for name, shape in QWEN3.items()
    }
    sparse = [
        (n, top_k_cost(QWEN3["32B"], budget=1024, prompt=200, length=n).total) for n in lengths
    ]
    return {**lines, "32B, 1024 keys": sparse}


def draw(
    lines: Lines,
    *,
    across: str,
    up: str,
    ticks: tuple[list[tuple[float, str]], list[tuple[float, str]]],
    log_up: bool = False,
) -> str:
    """A line chart as SVG whose text takes a grey that reads on white and on black."""
    width, height, left, right, top, bottom = 640, 360, 70, 160, 20, 50
    xs = [math.log(x) for x, _ in ticks[0]]
    ys = [math.log(y) if log_up else y for y, _ in ticks[1]]

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(x) - min(xs)) / (max(xs) - min(xs))
        rise = ((math.log(y) if log_up else y) - min(ys)) / (max(ys) - min(ys))
        return left + share * (width - left - right), height - bottom - rise * (
            height - top - bottom
        )

    x0, x1 = ticks[0][0][0], ticks[0][-1][0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="13" fill="#808080">'
    ]
    for y, label in ticks[1]:
        (a, b), (c, _) = at(x0, y), at(x1, y)
        parts.append(f'<path d="M{a:.1f} {b:.1f}H{c:.1f}" stroke="#808080" stroke-opacity=".25"/>')
        parts.append(f'<text x="{a - 8:.1f}" y="{b + 4:.1f}" text-anchor="end">{label}</text>')
    for x, label in ticks[0]:
        a, b = at(x, ticks[1][0][0])
        parts.append(f'<text x="{a:.1f}" y="{b + 20:.1f}" text-anchor="middle">{label}</text>')
    middle = left + (width - left - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{across}</text>')
    parts.append(
        f'<text transform="translate(16 {(height - bottom + top) / 2}) rotate(-90)" '
        f'text-anchor="middle">{up}</text>'
    )
    ends = sorted(((at(*points[-1])[1], name) for name, points in lines.items()))
    label_at = -math.inf
    colours = dict(zip(lines, COLOURS, strict=False))
    for y, name in ends:
        label_at = max(y + 4, label_at + 15)
        parts.append(
            f'<text x="{width - right + 8}" y="{label_at:.1f}" fill="{colours[name]}">{name}</text>'
        )
    for name, points in lines.items():
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*point) for point in points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    main()
