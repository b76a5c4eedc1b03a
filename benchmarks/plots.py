"""Line plots as SVG, with axes of powers, readable on light and dark ground."""

import math
from xml.sax.saxutils import escape

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 560, 320, 66, 120, 16, 48
COLOURS = ("#3d85c6", "#d9822b", "#5a9e54", "#a764a8")
Series = dict[str, list[tuple[float, float]]]


def lines(series: Series, *, x: str, y: str) -> str:
    """A picture of points joined by lines; both axes are logarithmic.

    Args:
        series: name -> points, all of them positive.
        x: what the horizontal axis counts.
        y: what the vertical axis counts.
    """
    points = [point for own in series.values() for point in own]
    spans = [_span([point[axis] for point in points]) for axis in (0, 1)]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across, up = (
            (math.log10(value) - low) / (high - low)
            for value, (low, high) in zip(point, spans, strict=True)
        )
        return LEFT + across * (WIDE - LEFT - RIGHT), HIGH - BOTTOM - up * (HIGH - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" role="img" '
        f'aria-label="{escape(y)} by {escape(x)}" font-family="sans-serif" font-size="12">',
        "<style>text{fill:#808080}path{fill:none}.grid{stroke:#808080;stroke-opacity:.35}</style>",
    ]
    for value in sorted({point[0] for point in points}):
        at, _ = place((value, 10 ** spans[1][0]))
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HIGH - BOTTOM}"/>')
        turn = f' transform="rotate(-30 {at:.1f} {HIGH - BOTTOM + 16})"' if value > 1e5 else ""
        parts.append(text(at, HIGH - BOTTOM + 16, short(value), "middle", turn))
    low, high = spans[1]
    for power in range(math.floor(low), math.floor(high) + 1):
        for value in (v * 10.0**power for v in ((1, 3) if high - low > 1.5 else (1, 2, 5))):
            if low <= math.log10(value) <= high:
                _, at = place((10 ** spans[0][0], value))
                parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDE - RIGHT}"/>')
                parts.append(text(LEFT - 6, at + 4, short(value), "end"))
    for colour, (name, own) in zip(COLOURS, series.items(), strict=False):
        placed = [place(point) for point in own]
        path = "L".join(f"{across:.1f} {up:.1f}" for across, up in placed)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{u:.1f}" r="3.5" fill="{colour}"/>' for a, u in placed]
        parts.append(text(placed[-1][0] + 9, placed[-1][1] + 4, name, "start"))
    middle = HIGH - BOTTOM - (HIGH - BOTTOM - TOP) / 2
    parts.append(text((LEFT + WIDE - RIGHT) / 2, HIGH - 8, x, "middle"))
    parts.append(text(14, middle, y, "middle", f' transform="rotate(-90 14 {middle:.0f})"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def short(value: float) -> str:
    """A number as an axis shows it."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def _span(values: list[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    edge = max(0.05 * (high - low), 0.02)
    return low - edge, high + edge


def text(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    """A piece of writing at a place of the picture."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>'
