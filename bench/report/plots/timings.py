"""Curves of time and memory over M, and bars of memory."""

from typing import Any

from bench.report.labels import format_number
from bench.report.plots.bars import SIZES, case_label, group_by_case, group_rows, record_heading
from bench.report.plots.style import (
    TINY,
    color_of,
    grid,
    set_log_axes,
    set_title,
    set_value_scale,
    sort_key,
    styled,
)
from bench.report.record import Record


@styled
def draw_times(record: Record) -> Any:
    """Draw time over M for each operation with several sizes, a line for each implementation."""
    return _draw_curves(record, "ms_p50", "ms", f"{record_heading(record)}: time, ms")


@styled
def draw_memory(record: Record) -> Any:
    """Draw what a call adds over a length or a depth; elsewhere bars at the largest M."""
    if record.subject not in SIZES:
        return _draw_held_and_added(record)
    words = "memory of a call, beside what is held, MB"
    return _draw_curves(record, "added_mb", "MB", f"{record_heading(record)}: {words}")


def _draw_curves(record: Record, field: str, unit: str, heading: str) -> Any:
    known = [row for row in record.rows if row.m and getattr(row, field)]
    min_sizes = 2 if record.subject in SIZES else 3  # of a curve
    panels = {}
    for key, rows in group_rows(known, "op", "shape", "dtype", "variant").items():
        if len({row.m for row in rows}) >= min_sizes:
            panels[key] = rows
    if not panels:
        return None
    figure, axes = grid([2.4] * len(panels), heading, extra=0.7)
    lines: dict[str, Any] = {}
    for axis, (key, rows) in zip(axes, panels.items()):
        for (impl,), points in sorted(
            group_rows(rows, "impl").items(), key=lambda item: sort_key(item[0][0])
        ):
            lines[impl] = _draw_curve(axis, impl, [(row.m, getattr(row, field)) for row in points])
        set_title(axis, key[0], ", ".join(filter(None, key[1:])))
        set_log_axes(axis, [row.m for row in rows], SIZES.get(record.subject, "rows (M)"))
        set_value_scale(axis, unit)
    names = sorted(lines, key=sort_key)
    options = {"loc": "outside lower center", "ncols": min(len(names), 9)}
    figure.legend([lines[impl] for impl in names], names, **options)
    return figure


def _draw_curve(axis: Any, impl: str, points: list[tuple[int, float]]) -> Any:
    style = {"lw": 2.4, "zorder": 4} if impl == "pyfast" else {"lw": 1.4, "zorder": 3}
    (line,) = axis.plot(
        *zip(*sorted(points)), "o-", ms=3.5, color=color_of(impl), label=impl, **style
    )
    return line


def _draw_held_and_added(record: Record) -> Any:
    known = [row for row in record.rows if row.peak_mb]
    largest: dict[tuple, tuple] = {}
    for row in sorted(known, key=lambda row: row.m or 0):
        largest[row.op, row.shape, row.dtype] = row.case
    groups = group_by_case(
        row for row in known if row.case == largest[row.op, row.shape, row.dtype]
    )
    if not groups:
        return None
    heights = [0.7 + 0.17 * len(rows) for rows in groups.values()]
    words = "memory, MB: held (full), added by a call (light)"
    figure, axes = grid(heights, f"{record_heading(record)}: {words}")
    for axis, rows in zip(axes, groups.values()):
        for row in rows:
            style = {"color": color_of(row.impl), "height": 0.7}
            axis.barh(row.impl, row.held_mb or 0, **style)
            axis.barh(row.impl, row.added_mb, left=row.held_mb or 0, alpha=0.4, **style)
            axis.annotate(
                format_number(row.peak_mb),
                (row.peak_mb, row.impl),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=TINY,
            )
        words = rows[0].shape, rows[0].dtype, case_label(rows[0], record.subject)
        set_title(axis, rows[0].op, ", ".join(filter(None, words)))
        axis.set_xlim(0, 1.2 * max(row.peak_mb for row in rows))
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(True, axis="x", lw=0.6)
    return figure
