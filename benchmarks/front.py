"""The picture of the front page: error under one corruption after another, from the demo's run.

    testtime demo
    python benchmarks/front.py testtime-demo

Writes `docs/images/error-over-time.svg`, readable on light and dark ground.
"""

import argparse
from pathlib import Path
from typing import Any

from plots import COLOURS, text
from testtime.bench.store import read_run

PICTURE = Path(__file__).resolve().parents[1] / "docs/images/error-over-time.svg"
METHODS = ("source", "bn-adapt", "tent")
WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 720, 330, 88, 84, 14, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run on one stream with one seed")
    PICTURE.write_text(picture(read_run(parser.parse_args().run)))
    print(f"wrote {PICTURE.name}")


def picture(rows: list[dict[str, Any]]) -> str:
    """Mean error in each domain, in the order of the stream, one line a method."""
    names = [row["domain"] for row in sorted(rows, key=lambda row: row["position"])]
    domains = list(dict.fromkeys(names))
    error = {(row["method"], row["domain"]): row["error"] for row in rows}
    highest = max(error[method, domain] for method in METHODS for domain in domains)
    across, up = (WIDE - LEFT - RIGHT) / (len(domains) - 1), (HIGH - TOP - BOTTOM) / highest
    base = HIGH - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" role="img" '
        'aria-label="error by method under each corruption" font-family="sans-serif" font-size="12">',
        "<style>text{fill:#808080}path{fill:none}.grid{stroke:#808080;stroke-opacity:.3}</style>",
        text(48, (TOP + base) / 2, "error %", "middle", f' transform="rotate(-90 48 {(TOP + base) / 2:.0f})"'),
    ]  # fmt: skip
    for percent in range(0, int(highest) + 1, 20):
        at = base - percent * up
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDE - RIGHT}"/>')
        parts.append(text(LEFT - 8, at + 4, str(percent), "end"))
    for i, domain in enumerate(domains):
        at = LEFT + i * across
        turn = f' transform="rotate(-38 {at:.1f} {base + 16})"'
        parts.append(text(at, base + 16, domain.replace("_", " "), "end", turn))
    ends: list[float] = []
    for method, colour in sorted(
        zip(METHODS, ("#808080", *COLOURS[1:]), strict=False),
        key=lambda pair: error[pair[0], domains[-1]],
    ):
        points = [(LEFT + i * across, base - error[method, d] * up) for i, d in enumerate(domains)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
        ends.append(min(points[-1][1] + 4, *(end - 13 for end in ends), base))
        parts.append(text(WIDE - RIGHT + 8, ends[-1], method, "start", f' style="fill:{colour}"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
