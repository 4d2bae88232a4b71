"""The demo's charts, as SVG: sharp at any size, in the colors of the page they stand in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 680, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 150, 14, 46  # margins; names of lines stand on the right
_ROW, _NAMES = 30, 150  # of `dots`: height of a row, room for its name
COLORS = {
    "a": "#0f766e",
    "b": "#c2410c",
    "c": "#6d7a8c",
    "d": "#4f46e5",
}  # unless the page has others
_INK, _QUIET, _RULE = "var(--ink, #1c2733)", "var(--quiet, #6d7a8c)", "var(--rule, #e3e8ee)"


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    color: str = "a"
    marked: bool = False  # a dot at each point
    faint: bool = False  # thin, and not named


@dataclass(frozen=True)
class Axis:
    """Of the numbers that its ticks and the lines have."""

    label: str
    ticks: Sequence[tuple[float, str]]  # where, and what stands there
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the first tick, 1 at the last."""
        low, high, value = (self._scaled(v) for v in (self.ticks[0][0], self.ticks[-1][0], value))
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self.log else value


def linear(label: str, values: Sequence[float], low: float | None = None) -> Axis:
    """From the least, or from `low`, past the greatest, by round steps."""
    low, high = min(values) if low is None else low, max(values)
    step = _round_step((high - low or 1) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return Axis(
        label, [(i * step, f"{i * step:,.6g}") for i in range(first, max(last, first + 1) + 1)]
    )


def _round_step(least: float) -> float:
    power = 10 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least)


def powers(label: str, values: Sequence[float], base: int, unit: str = "") -> Axis:
    """By powers of the base."""
    first = math.floor(math.log(min(values), base) + 1e-9)
    last = max(math.ceil(math.log(max(values), base) - 1e-9), first + 1)
    return Axis(
        label, [(base**i, _short(base**i) + unit) for i in range(first, last + 1)], log=True
    )


def _short(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value // 1024:,}K"
    return f"{value:,.6g}"


def lines(given: Sequence[Line], x: Axis, y: Axis) -> str:
    """Lines, each with its name at its end."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [_grid(x, y, wide, high)]
    ends = []
    for line in given:
        places = [(LEFT + wide * x.place(a), TOP + high * (1 - y.place(b))) for a, b in line.points]
        color = _color(line.color)
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        stroke = f'stroke-width="{1 if line.faint else 2.2}" opacity="{0.3 if line.faint else 1}"'
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-linejoin="round" {stroke}/>'
        )
        if line.marked:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{color}"/>' for a, b in places
            ]
        if not line.faint:
            ends.append((*places[-1], line.name, color))
    return _svg(WIDTH, HEIGHT, parts + _names(ends))


def _grid(x: Axis, y: Axis, wide: float, high: float) -> str:
    parts = []
    for value, text in y.ticks:
        at = TOP + high * (1 - y.place(value))
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_RULE}"/>'
        )
        parts.append(_text(LEFT - 8, at + 4, text, anchor="end"))
    for value, text in x.ticks:
        parts.append(_text(LEFT + wide * x.place(value), TOP + high + 18, text, anchor="middle"))
    parts.append(_text(LEFT + wide / 2, HEIGHT - 8, x.label, anchor="middle"))
    parts.append(
        f'<g transform="translate(14 {TOP + high / 2:.0f}) rotate(-90)">{_text(0, 0, y.label, anchor="middle")}</g>'
    )
    return "".join(parts)


def _names(ends: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """Beside the ends of lines, moved down where they would touch."""
    parts, free = [], -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        free = max(y, free)
        parts.append(_text(x + 9, free + 4, name, fill=color, weight=600))
        free += 16
    return parts


def dots(
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    x: Axis,
    mark: tuple[float, str],
) -> str:
    """A row for each thing with a dot for each of its values, `names` saying which is which; `mark` is a line."""
    wide, high = WIDTH - _NAMES - 30, _ROW * len(rows)
    top, parts = 34, []
    for value, text in x.ticks:
        at = _NAMES + wide * x.place(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + high}" stroke="{_RULE}"/>'
        )
        parts.append(_text(at, top + high + 18, text, anchor="middle"))
    at = _NAMES + wide * x.place(mark[0])
    parts.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + high}" stroke="{_QUIET}" stroke-dasharray="3 4"/>'
    )
    parts.append(_text(at + 6, top + high - 5, mark[1]))
    for i, (name, values) in enumerate(rows):
        y = top + _ROW * (i + 0.5)
        places = [_NAMES + wide * x.place(value) for value in values]
        parts.append(_text(_NAMES - 12, y + 4, name, anchor="end", fill=_INK))
        ends = f'x1="{min(places):.1f}" x2="{max(places):.1f}"'
        parts.append(
            f'<line {ends} y1="{y}" y2="{y}" stroke="{_RULE}" stroke-width="5" stroke-linecap="round"/>'
        )
        for place, key in reversed(list(zip(places, "ac"))):
            parts.append(f'<circle cx="{place:.1f}" cy="{y}" r="6" fill="{_color(key)}"/>')
    at = _NAMES
    for name, key in zip(names, "ac"):
        parts.append(f'<circle cx="{at + 6}" cy="14" r="6" fill="{_color(key)}"/>')
        parts.append(_text(at + 18, 18, name, fill=_color(key), weight=600))
        at += 40 + 7 * len(name)
    parts.append(_text(_NAMES + wide / 2, top + high + 40, x.label, anchor="middle"))
    return _svg(WIDTH, top + high + 50, parts)


def _color(key: str) -> str:
    return f"var(--{key}, {COLORS[key]})"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = _QUIET, weight: int = 400
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    halo = (
        'paint-order="stroke" stroke="var(--page, #fff)" stroke-width="4" stroke-linejoin="round"'
    )
    return f'<text {place} fill="{fill}" font-weight="{weight}" {halo}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    font = 'font-family="ui-sans-serif, system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="13"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {font}>'
        f"{''.join(parts)}</svg>\n"
    )
