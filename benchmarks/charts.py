"""Small charts as SVG, lines or bars on axes of any kind, readable on light and dark ground."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from plots import COLOURS, short, text

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 560, 270, 62, 178, 14, 46
PALETTE = (*COLOURS, "#c94f5f", "#888888")
DASHED = "the "
"""A line whose name begins like this is a truth or a bound, grey and dashed."""

Points = Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """From low to high, in powers of ten if log."""

    low: float
    high: float
    log: bool

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        value = math.log10(value) if self.log else value
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """At most seven round values."""
        if self.log:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            few = [10.0**power for power in powers][:: max(1, len(powers) // 5)]
            digits = (1, 2, 5) if self.high - self.low > 0.6 else range(1, 10)
            between = range(math.floor(self.low), math.ceil(self.high) + 1)
            each = [digit * 10.0**power for power in between for digit in digits]
            return few if len(powers) > 2 else [v for v in each if 0 <= self.share(v) <= 1]
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Sequence[float], *, log: bool, zero: bool = False) -> Axis:
    """An axis with room at the ends; `zero` keeps 0 on it."""
    values = [math.log10(value) for value in values] if log else [*values, *([0.0] * zero)]
    low, high = min(values), max(values)
    room = 0.05 * (high - low or 1)
    return Axis(low if zero and low == 0 else low - room, high + room, log)


def chart(
    series: Mapping[str, Points],
    *,
    x: str,
    y: str,
    log: tuple[bool, bool] = (False, False),
    across: Sequence[float] | None = None,
) -> str:
    """Lines through points.

    Args:
        series: name -> points.
        x: what the horizontal axis counts.
        y: what the vertical axis counts.
        log: whether the two axes are of powers.
        across: ticks of the horizontal axis; None: round values.
    """
    points = [point for own in series.values() for point in own]
    right = axis([p[0] for p in points], log=log[0])
    up = axis([p[1] for p in points], log=log[1], zero=not log[1])

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return _across(right.share(point[0])), _up(up.share(point[1]))

    parts = _frame(x, y, up)
    for value in across or right.ticks():
        parts.append(
            f'<path class="grid" d="M{place((value, points[0][1]))[0]:.1f} {TOP}V{HIGH - BOTTOM}"/>'
        )
        parts.append(text(_across(right.share(value)), HIGH - BOTTOM + 16, _said(value), "middle"))
    ends = []
    for number, (name, own) in enumerate(series.items()):
        told = name.startswith(DASHED)
        colour = "#888888" if told else PALETTE[number % len(PALETTE)]
        placed = [place(point) for point in own]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in placed)
        dash = ' stroke-dasharray="5 4"' if told else ""
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2"{dash}/>')
        if len(placed) <= 12 and not told:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in placed
            ]
        ends.append((placed[-1][1], name, colour))
    last = -math.inf
    for at, name, colour in sorted(ends):
        last = max(at + 4, last + 14)
        parts.append(text(WIDE - RIGHT + 8, last, name, "start", f' style="fill:{colour}"'))
    return "\n".join([*parts, "</svg>"]) + "\n"


def bars(groups: Mapping[str, Mapping[str, float]], *, y: str, x: str = "") -> str:
    """A group of bars for each name, with their values.

    Args:
        groups: name below -> name of a bar -> its value, from 0 on.
        y: what the bars measure.
        x: what the groups are.
    """
    names = list(dict.fromkeys(name for own in groups.values() for name in own))
    up = axis([value for own in groups.values() for value in own.values()], log=False, zero=True)
    parts = _frame(x, y, up)
    room = 1 / len(groups)
    for at, (group, own) in enumerate(groups.items()):
        parts.append(text(_across((at + 0.5) * room), HIGH - BOTTOM + 16, group, "middle"))
        width = 0.84 * room / len(own)
        for number, (name, value) in enumerate(own.items()):
            left, top = _across((at + 0.08) * room + number * width), _up(up.share(value))
            wide, base = _across(width) - LEFT, _up(up.share(0.0))
            colour = PALETTE[names.index(name) % len(PALETTE)]
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{0.9 * wide:.1f}" '
                f'height="{base - top:.1f}" fill="{colour}" fill-opacity=".85"/>'
            )
            if wide > 24:
                parts.append(text(left + 0.45 * wide, top - 4, short(value), "middle"))
    for number, name in enumerate(names if len(names) > 1 else []):
        colour = PALETTE[number % len(PALETTE)]
        style = f' style="fill:{colour}"'
        parts.append(text(WIDE - RIGHT + 8, TOP + 16 + 16 * number, name, "start", style))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _across(share: float) -> float:
    return LEFT + share * (WIDE - LEFT - RIGHT)


def _up(share: float) -> float:
    return HIGH - BOTTOM - share * (HIGH - BOTTOM - TOP)


def _said(value: float) -> str:
    return short(value) if abs(value) > 1e-12 else "0"


def _frame(x: str, y: str, up: Axis) -> list[str]:
    middle = (TOP + HIGH - BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" role="img" '
        f'aria-label="{escape(y)} by {escape(x)}" font-family="sans-serif" font-size="12">',
        "<style>text{fill:#808080}path{fill:none}.grid{stroke:#808080;stroke-opacity:.3}</style>",
        text(_across(0.5), HIGH - 8, x, "middle"),
        text(14, middle, y, "middle", f' transform="rotate(-90 14 {middle:.0f})"'),
    ]
    for value in up.ticks():
        at = _up(up.share(value))
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDE - RIGHT}"/>')
        parts.append(text(LEFT - 6, at + 4, _said(value), "end"))
    return parts
