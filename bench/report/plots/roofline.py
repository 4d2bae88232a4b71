"""Roofline of a machine: pyfast's operations below what the machine was measured to do."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from bench.report.labels import format_rate, machine_title
from bench.report.plots.bars import group_rows
from bench.report.plots.style import INK, SMALL, new_figure, styled
from bench.report.record import Record, Row

COLORS = ("#e5484d", "#3b82f6", "#14a38b", "#f5a524", "#8b5cf6", "#0891b2", "#65a30d", "#e796b3")


@styled
def draw_roofline(records: Sequence[Record]) -> Any:
    """Draw FLOPs a second over FLOPs a byte, a point for each of pyfast's rows on one machine."""
    rows_by_bench: dict[str, list[Row]] = {}
    for record in records:
        for row in record.rows:
            if row.impl == "pyfast" and row.ms_p50 and row.moved_bytes:
                rows_by_bench.setdefault(record.subject, []).append(row)
    copy_rates = [record.ceilings["copy"] for record in records if "copy" in record.ceilings]
    if not rows_by_bench or not any(copy_rates):
        return None
    figure = new_figure(4.6, f"roofline, {machine_title(records[0].machine)}: pyfast's ops")
    axis = figure.subplots()
    rows = [*itertools.chain(*rows_by_bench.values())]
    intensities = [row.flops / row.moved_bytes for row in rows if row.flops]
    left, right = min(intensities, default=1) / 6, max(intensities, default=100) * 6
    _draw_roofs(axis, records, max(copy_rates), left, right)
    for number, (bench, bench_rows) in enumerate(rows_by_bench.items()):
        _draw_points(axis, bench_rows, COLORS[number % len(COLORS)], bench, left)
    axis.set(xscale="log", yscale="log", xlim=(left, right))
    axis.set_xlabel(
        "FLOPs a byte that must move; at the left edge: ops without FLOPs, by their bytes"
    )
    axis.set_ylabel("FLOP/s")
    axis.yaxis.set_major_formatter(
        lambda value, _: f"{value / 1e12:g} T" if value >= 1e12 else f"{value / 1e9:g} G"
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(True, lw=0.6)
    axis.minorticks_off()
    figure.legend(loc="outside lower center", ncols=8)
    return figure


def _draw_roofs(
    axis: Any, records: Sequence[Record], copy: float, left: float, right: float
) -> None:
    """Draw the line of the memory, and a level for each dtype: the best that any run measured."""
    levels: dict[str, float] = {}
    for name, value in itertools.chain(*(record.ceilings.items() for record in records)):
        prefix, _, dtype = name.partition(" ")
        if prefix == "ceiling":
            levels[dtype] = max(value, levels.get(dtype, 0))
    for dtype, level in levels.items():
        ridge = level / copy
        axis.plot([max(ridge, left), right], [level, level], color=INK, lw=1.3)
        label = f"{dtype} {format_rate(level)}"
        axis.annotate(label, (right, level), xytext=(-2, 4), **_label_style("right"))
    ridge = max(levels.values(), default=copy * right) / copy
    axis.plot([left, ridge], [copy * left, copy * ridge], color=INK, lw=1.3)
    middle = math.sqrt(left * ridge)
    label = f"copy {copy / 1e9:.0f} GB/s"
    axis.annotate(label, (middle, copy * middle), xytext=(-6, 3), **_label_style("right"))


def _label_style(ha: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "ha": ha, "fontsize": SMALL, "color": INK}


def _draw_points(axis: Any, rows: list[Row], color: str, bench: str, left: float) -> None:
    """Draw a bench's rows; an op's sizes are joined, and 16-bit points are filled."""
    groups = group_rows(rows, "op", "shape", "dtype", "variant").values()
    for number, group in enumerate(groups):
        points = sorted(_point(row, left) for row in group)
        axis.plot(*zip(*points), "-", color=color, lw=0.7, alpha=0.35, zorder=2)
        face = "none" if group[0].dtype == "fp32" else color
        style = {"mfc": face, "mec": color, "ms": 5, "zorder": 3, "clip_on": False}
        axis.plot(*zip(*points), "o", label=None if number else bench, **style)


def _point(row: Row, left: float) -> tuple[float, float]:
    seconds = row.ms_p50 / 1e3
    if row.flops:
        return row.flops / row.moved_bytes, row.flops / seconds
    return left, left * row.moved_bytes / seconds
