"""Bars of the times of all implementations over pyfast's."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bench.report.labels import format_number, machine_title
from bench.report.plots.style import (
    COLORS,
    GRID,
    INK,
    SMALL,
    TINY,
    color_of,
    grid,
    set_title,
    sort_key,
    styled,
)
from bench.report.record import Record, Row

# What M counts. Where it is a length or a depth, memory is drawn over it.
SIZES = {"lsh_attention": "tokens", "reversible": "blocks"}
# Ticks of an axis of ratios that spans less than the key.
TICKS = {8: (0.5, 0.7, 1, 1.5, 2, 3, 5), 60: (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)}
COARSE_TICKS = 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000


def time_ratio(row: Row, base: Row) -> tuple[float, float, float]:
    """Return a row's time over pyfast's: p20, median and p80.

    It is the ratio measured in turns or, where there is none, the range that the times allow.
    """
    if row.times_pyfast and row.ratio_p20 and row.ratio_p80:
        return row.ratio_p20, row.times_pyfast, row.ratio_p80
    return row.ms_p20 / base.ms_p80, row.ms_p50 / base.ms_p50, row.ms_p80 / base.ms_p20


def group_by_case(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Group rows by case, pyfast's first."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return {
        case: sorted(group, key=lambda row: sort_key(row.impl)) for case, group in groups.items()
    }


def group_rows(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Group rows by the values of some fields."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return groups


def record_heading(record: Record) -> str:
    return f"{record.subject}, {machine_title(record.machine)}"


def case_label(row: Row, subject: str, common: Sequence[str] = ()) -> str:
    """Return a row's size and variant, without parts that all rows of a panel have in common."""
    unit = SIZES.get(subject, "row" if row.m == 1 else "rows")
    size = "" if row.m is None else f"{row.m} {unit}"
    parts = (size, *row.variant.split(", "))
    return ", ".join(part for part in parts if part and part not in common)


def _compared_cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the cases of pyfast and at least one peer, all timed."""
    timed = group_by_case(row for row in rows if row.ms_p50)
    return [group for group in timed.values() if group[0].impl == "pyfast" and len(group) > 1]


@styled
def draw_bars(record: Record) -> Any:
    """Draw every peer's time over pyfast's, with its spread.

    A bar to the right of the line is slower, one to the left is faster.
    """
    panels = {}
    for key, rows in group_rows(record.rows, "op", "shape", "dtype").items():
        if cases := _compared_cases(rows):
            panels[key] = cases
    if not panels:
        return None
    heights = [0.7 + 0.15 * sum(map(len, cases)) for cases in panels.values()]
    words = "time over pyfast's, p20 to p80; left of the line they are faster"
    figure, axes = grid(heights, f"{record_heading(record)}: {words}")
    for axis, ((op, *rest), cases) in zip(axes, panels.items()):
        variants = [case[0].variant.split(", ") for case in cases]
        common = [part for part in variants[0] if all(part in other for other in variants)]
        set_title(axis, op, ", ".join(filter(None, [*rest, *common])))
        labels = [case_label(case[0], record.subject, common) for case in cases]
        _draw_panel(axis, list(zip(labels, cases)))
    return figure


def _draw_panel(axis: Any, groups: list[tuple[str, list[Row]]]) -> None:
    """Draw a group of bars for each (label, rows), the first of which is pyfast's."""
    place, ticks, names, ends = 0.0, [], [], [1.0]
    red = COLORS["pyfast"]
    for label, (base, *peers) in groups:
        axis.text(0.01, place, label, **_side_text(axis, weight="bold"))
        time = f"pyfast {format_number(base.ms_p50)} ms"
        axis.text(1, place, time, **_side_text(axis, ha="right", color=red))
        place += 0.95
        line_ends = [place - 0.5, place - 0.35 + 0.85 * len(peers)]
        axis.plot([1, 1], line_ends, color=red, lw=1.6, zorder=3)
        for row in peers:
            low, middle, high = time_ratio(row, base)
            _draw_bar(axis, place, row.impl, low, middle, high)
            ticks.append(place)
            names.append(row.impl)
            ends += [low, high]
            place += 0.85
        place += 0.35
    axis.set_yticks(ticks, names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(place - 0.4, -0.8)
    _set_ratio_axis(axis, min(ends), max(ends))


def _side_text(axis: Any, ha: str = "left", **style: Any) -> dict[str, Any]:
    """Return the options of a text at the side of a panel, at the height of a value."""
    transform = axis.get_yaxis_transform()
    return {"transform": transform, "ha": ha, "va": "center", "fontsize": SMALL} | style


def _draw_bar(axis: Any, place: float, impl: str, low: float, middle: float, high: float) -> None:
    axis.barh(place, middle - 1, left=1, height=0.62, color=color_of(impl))
    axis.plot([low, high], [place, place], color=INK, lw=0.8, alpha=0.7, solid_capstyle="butt")
    is_slower = middle >= 1
    edge = max(high, 1) if is_slower else min(low, 1)
    offset = (3, 0) if is_slower else (-3, 0)
    axis.annotate(
        f"{middle:.2f}x" if middle < 9.95 else f"{middle:.0f}x",
        (edge, place),
        xytext=offset,
        textcoords="offset points",
        ha="left" if is_slower else "right",
        va="center",
        fontsize=TINY,
        fontweight="normal" if is_slower else "bold",
    )


def _set_ratio_axis(axis: Any, low: float, high: float) -> None:
    """Make the axis logarithmic about 1, with room for the words at the ends of the bars."""
    room = 0.22 * math.log(max(high, 1.3) / min(low, 0.9))
    left, right = min(low, 0.9) * math.exp(-room), max(high, 1.3) * math.exp(room)
    axis.set(xscale="log", xlim=(left, right))
    fitting = next((ticks for span, ticks in TICKS.items() if right / left < span), COARSE_TICKS)
    shown = [tick for tick in fitting if left < tick < right]
    axis.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axis.minorticks_off()
    axis.grid(True, axis="x", lw=0.6)
    if left < 1:
        axis.axvspan(left, 1, color=GRID, alpha=0.25, lw=0, zorder=0)
