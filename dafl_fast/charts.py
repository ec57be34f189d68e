"""Curves and bars as SVG.

They are made here and not by matplotlib: they stay sharp on any screen, follow the reader's light
or dark colours, and every run gets them whatever is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

COLOURS = 8  # of curves, in the template's style sheet
PERCENT = "\N{NO-BREAK SPACE}%"
# Units of the SVGs, which are shown at about this size on a phone and up to half as large again
# elsewhere: text in them keeps its size.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 46, 10, 10, 26


@dataclass
class Line:
    """A curve: points (seconds, value), and how it is named and drawn."""

    label: str
    points: list[tuple[float, float]]
    colour: int = 0
    level: bool = False  # a level to compare with, of one value

    def thinned(self, most: int = 300) -> list[tuple[float, float]]:
        """At most `most` points, each the mean of as many neighbours."""
        size = -(-len(self.points) // most)
        groups = [self.points[i : i + size] for i in range(0, len(self.points), size)]
        return [(sum(x) / len(x), sum(y) / len(y)) for x, y in (zip(*group) for group in groups)]


def ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers within [low, high]."""
    least = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(least))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times a power of ten within [low, high]; of many, every third."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return found if len(found) < 6 else [x for x in found if f"{x:e}".startswith("1.0")] or found


def number(value: float, unit: str = "") -> str:
    """A number for people, in four digits."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{text}{unit}".replace("-", "−")


def chart(title: str, lines: Sequence[Line], percent: bool = False) -> Markup:
    """A figure of curves over the seconds of training, with its last values in the legend.

    The vertical axis is logarithmic where positive values span more than a factor of ten.
    """
    values = [y for line in lines for _, y in line.points]
    end = max(x for line in lines for x, _ in line.points)
    unit = PERCENT if percent else ""
    name, seconds = next(
        (name, seconds) for name, seconds, most in
        (("s", 1, 300), ("min", 60, 3 * 3600), ("h", 3600, math.inf)) if end <= most
    )  # fmt: skip
    low, high = min(values), max(values)
    logarithmic = not percent and low > 0 and high > 10 * low
    if high - low < 1e-6 * max(abs(high), 1e-6):
        margin = max(abs(high), 1e-6) * 0.05
        low, high = low - margin, high + margin
    end = max(end, 1e-9)

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / end

    def y_of(y: float) -> float:
        a, b, c = (math.log(v) for v in (low, y, high)) if logarithmic else (low, y, high)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (b - a) / (c - a)

    parts = []
    for value in log_ticks(low, high) if logarithmic else ticks(low, high):
        at = f"{y_of(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 5}" y="{at}">{number(value, unit)}</text>')
    for time in ticks(0, end / seconds):
        at = f"{x_of(time * seconds):.1f}"
        label = number(time) + (f" {name}" if time == 0 else "")
        parts.append(f'<text class="x" x="{at}" y="{HEIGHT - BOTTOM + 15}">{label}</text>')
    for line in lines:
        points = [(x_of(x), y_of(y)) for x, y in line.thinned()]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = "dashed" if line.level or line.colour >= COLOURS else ""
        colour = f"c{line.colour % COLOURS} {dash}"
        parts.append(f'<path class="line {colour}" d="M{path}"/>')
        if len(points) <= 16 and not line.level:
            parts += [
                f'<circle class="{colour}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5">'
                f"<title>{number(y, unit)} after {number(x)} s</title></circle>"
                for x, y in line.points
            ]
    legend = Markup("").join(
        Markup('<span><i class="key c{} {}"></i>{} <b>{}</b></span> ').format(
            line.colour % COLOURS, "level" if line.level else "", line.label or "at the end",
            number(line.points[-1][1], unit),
        )
        for line in lines
    )  # fmt: skip
    return _figure(title + (", logarithmic" if logarithmic else ""), legend, parts)


def bars(title: str, counts: Sequence[int]) -> Markup:
    """A figure of how many images belong to each class; of more than 100, sorted by number."""
    present, total = sum(count > 0 for count in counts), sum(counts)
    shown = list(counts) if len(counts) <= 100 else sorted(counts, reverse=True)[:present]
    top = max(*shown, 1)
    wide = (WIDTH - LEFT - RIGHT) / len(shown)
    base = HEIGHT - BOTTOM
    tall = (base - TOP - 10) / top
    path = "".join(
        f"M{LEFT + wide * (i + 0.1):.1f} {base}v{-count * tall:.1f}h{wide * 0.8:.2f}V{base}"
        for i, count in enumerate(shown)
    )
    even = base - total / len(counts) * tall
    parts = [
        f'<path class="bars" d="{path}"/>',
        f'<path class="line dashed" d="M{LEFT} {even:.1f}H{WIDTH - RIGHT}"/>',
        f'<text class="y" x="{LEFT - 5}" y="{even:.1f}">{number(total / len(counts))}</text>',
    ]
    if len(counts) > 20:  # no room for a number above each bar
        parts.append(f'<text class="y" x="{LEFT - 5}" y="{base - top * tall:.1f}">{top}</text>')
    if len(counts) > 100:
        label = f"classes, the most frequent first ({present:,} of {len(counts):,})"
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="x" x="{middle}" y="{base + 15}">{label}</text>')
    every = 1 if len(counts) <= 20 else 10
    for i in range(0, len(counts) if len(counts) <= 100 else 0, every):
        at = f"{LEFT + wide * (i + 0.5):.1f}"
        parts.append(f'<text class="x" x="{at}" y="{base + 15}">{i}</text>')
        if every == 1 and wide > 14:
            above = base - counts[i] * tall - 4
            parts.append(f'<text class="x" x="{at}" y="{above:.1f}">{counts[i]}</text>')
    legend = Markup("<span>of {:,} images, classes present <b>{:,} of {:,}</b></span>").format(
        total, present, len(counts)
    )
    return _figure(title, legend, parts)


def _figure(title: str, legend: Markup, parts: Sequence[str]) -> Markup:
    """`parts` are SVG made of numbers and of words of our own."""
    return Markup(
        '<figure><figcaption><strong>{}</strong><div class="legend">{}</div></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(title, legend, WIDTH, HEIGHT, title, Markup("".join(parts)))
