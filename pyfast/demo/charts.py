"""Charts as SVG, sharp at any size and in the colors of the page that they stand in.

They are drawn by hand, so that the demo does not depend on matplotlib.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 680, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 150, 14, 46  # margins; the names of lines stand on the right
_ROW_HEIGHT, _NAME_WIDTH, _DOTS_TOP = 30, 150, 34  # of `draw_dots`
# The page's CSS variables replace these colors where it sets them.
COLORS = {"a": "#0f766e", "b": "#c2410c", "c": "#6d7a8c", "d": "#4f46e5"}
_INK, _QUIET, _RULE = "var(--ink, #1c2733)", "var(--quiet, #6d7a8c)", "var(--rule, #e3e8ee)"
_FONT = (
    'font-family="ui-sans-serif, system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
    'font-size="13"'
)


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: text at the end of the line.
        points: pairs of x and y.
        color: a key of COLORS.
        is_marked: whether each point has a dot.
        is_faint: whether the line is thin and has no name.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str = "a"
    is_marked: bool = False
    is_faint: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Args:
        label: text beside the axis.
        ticks: values, each with its text; the axis ends at the first and the last.
        is_log: whether the axis is logarithmic.
    """

    label: str
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the first tick, 1 at the last."""
        low, high = self._scale(self.ticks[0][0]), self._scale(self.ticks[-1][0])
        return min(1.0, max(0.0, (self._scale(value) - low) / (high - low)))

    def _scale(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self.is_log else value


def linear_axis(label: str, values: Sequence[float], low: float | None = None) -> Axis:
    """Return an axis with round ticks, from `low` or the least value past the greatest."""
    low, high = min(values) if low is None else low, max(values)
    step = _round_step((high - low or 1) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [(i * step, f"{i * step:,.6g}") for i in range(first, max(last, first + 1) + 1)]
    return Axis(label, ticks)


def _round_step(least: float) -> float:
    """Return the least of 1, 2 and 5 times a power of 10 that is not below `least`."""
    power = 10 ** math.floor(math.log10(least))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least)


def log_axis(label: str, values: Sequence[float], base: int) -> Axis:
    """Return a logarithmic axis with a tick at each power of the base."""
    first = math.floor(math.log(min(values), base) + 1e-9)
    last = max(math.ceil(math.log(max(values), base) - 1e-9), first + 1)
    ticks = [(base**i, _abbreviate(base**i)) for i in range(first, last + 1)]
    return Axis(label, ticks, is_log=True)


def _abbreviate(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value // 1024:,}K"
    return f"{value:,.6g}"


# --- lines ---


def draw_lines(lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Return a chart of lines, each with its name at its end."""
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    shapes, ends = [_draw_grid(x, y, width, height)], []
    for line in lines:
        points = [
            (LEFT + width * x.place(a), TOP + height * (1 - y.place(b))) for a, b in line.points
        ]
        color = _color(line.color)
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        weight, opacity = (1, 0.3) if line.is_faint else (2.2, 1)
        shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-linejoin="round" '
            f'stroke-width="{weight}" opacity="{opacity}"/>'
        )
        if line.is_marked:
            shapes += [_circle(a, f"{b:.1f}", 3.2, color) for a, b in points]
        if not line.is_faint:
            ends.append((*points[-1], line.name, color))
    return _svg(WIDTH, HEIGHT, shapes + _write_names(ends))


def _draw_grid(x: Axis, y: Axis, width: float, height: float) -> str:
    shapes = []
    for value, text in y.ticks:
        at = TOP + height * (1 - y.place(value))
        shapes.append(_rule(LEFT, LEFT + width, f"{at:.1f}", f"{at:.1f}"))
        shapes.append(_text(LEFT - 8, at + 4, text, anchor="end"))
    for value, text in x.ticks:
        at = LEFT + width * x.place(value)
        shapes.append(_text(at, TOP + height + 18, text, anchor="middle"))
    shapes.append(_text(LEFT + width / 2, HEIGHT - 8, x.label, anchor="middle"))
    label = _text(0, 0, y.label, anchor="middle")
    turned = f"translate(14 {TOP + height / 2:.0f}) rotate(-90)"
    shapes.append(f'<g transform="{turned}">{label}</g>')
    return "".join(shapes)


def _write_names(ends: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """Return the names beside the ends of lines, moved down where they would touch."""
    texts, free = [], -math.inf
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        free = max(y, free)
        texts.append(_text(x + 9, free + 4, name, fill=color, weight=600))
        free += 16
    return texts


# --- dots ---


def draw_dots(
    rows: Sequence[tuple[str, Sequence[float]]],
    names: Sequence[str],
    x: Axis,
    mark: tuple[float, str],
) -> str:
    """Return a chart with a row for each name, and in it a dot for each value.

    Args:
        rows: the name of each row and its two values.
        names: what the first and the second values are.
        x: axis of the values.
        mark: a value at which a line stands, and the line's text.
    """
    width, height = WIDTH - _NAME_WIDTH - 30, _ROW_HEIGHT * len(rows)
    bottom = _DOTS_TOP + height
    shapes = []
    for value, text in x.ticks:
        at = _NAME_WIDTH + width * x.place(value)
        shapes.append(_rule(f"{at:.1f}", f"{at:.1f}", _DOTS_TOP, bottom))
        shapes.append(_text(at, bottom + 18, text, anchor="middle"))
    at = f"{_NAME_WIDTH + width * x.place(mark[0]):.1f}"
    shapes.append(_rule(at, at, _DOTS_TOP, bottom, f'stroke="{_QUIET}" stroke-dasharray="3 4"'))
    shapes.append(_text(float(at) + 6, bottom - 5, mark[1]))
    for i, (name, values) in enumerate(rows):
        y = _DOTS_TOP + _ROW_HEIGHT * (i + 0.5)
        places = [_NAME_WIDTH + width * x.place(value) for value in values]
        shapes.append(_text(_NAME_WIDTH - 12, y + 4, name, anchor="end", fill=_INK))
        band = f'stroke="{_RULE}" stroke-width="5" stroke-linecap="round"'
        shapes.append(_rule(f"{min(places):.1f}", f"{max(places):.1f}", y, y, band))
        for place, key in reversed(list(zip(places, "ac"))):
            shapes.append(_circle(place, y, 6, _color(key)))
    shapes += _draw_legend(names)
    shapes.append(_text(_NAME_WIDTH + width / 2, bottom + 40, x.label, anchor="middle"))
    return _svg(WIDTH, bottom + 50, shapes)


def _draw_legend(names: Sequence[str]) -> list[str]:
    shapes, at = [], _NAME_WIDTH
    for name, key in zip(names, "ac"):
        shapes.append(_circle(at + 6, 14, 6, _color(key)))
        shapes.append(_text(at + 18, 18, name, fill=_color(key), weight=600))
        at += 40 + 7 * len(name)
    return shapes


# --- shapes ---


def _color(key: str) -> str:
    return f"var(--{key}, {COLORS[key]})"


def _rule(x1, x2, y1, y2, style: str = f'stroke="{_RULE}"') -> str:
    return f'<line x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}" {style}/>'


def _circle(x: float, y: float | str, radius: float, color: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="{radius}" fill="{color}"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = _QUIET, weight: int = 400
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    halo = (
        'paint-order="stroke" stroke="var(--page, #fff)" stroke-width="4" stroke-linejoin="round"'
    )
    return f'<text {place} fill="{fill}" font-weight="{weight}" {halo}>{escape(text)}</text>'


def _svg(width: float, height: float, shapes: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f"{_FONT}>{''.join(shapes)}</svg>\n"
    )
