"""Plots of a result as PNG files beside it."""

import pathlib
from collections.abc import Sequence
from typing import Any

from bench.report.plots.bars import draw_bars
from bench.report.plots.curves import draw_curves
from bench.report.plots.roofline import draw_roofline
from bench.report.plots.style import write_png
from bench.report.plots.timings import draw_memory, draw_times
from bench.report.record import Record, group_by_machine

ENDINGS = "", "-times", "-memory"


def draw(record: Record) -> dict[str, Any]:
    """Draw every figure of a result; return the figures keyed by the ending of their files."""
    if record.rows and record.data.get("rows"):
        figures = (draw_bars(record), draw_times(record), draw_memory(record))
    else:
        figures = (draw_curves(record),)
    return {ending: figure for ending, figure in zip(ENDINGS, figures) if figure is not None}


def existing_plots(record: Record) -> list[pathlib.Path]:
    """Return the plots that lie beside a result."""
    stem = record.path.with_suffix("")
    paths = [stem.with_name(f"{stem.name}{ending}.png") for ending in ENDINGS]
    return [path for path in paths if path.exists()]


def write_record_plots(record: Record) -> list[str]:
    """Write the plots of a result beside it, and return their names."""
    stem, names = record.path.with_suffix(""), []
    for ending, figure in draw(record).items():
        path = stem.with_name(f"{stem.name}{ending}.png")
        write_png(path, figure)
        names.append(path.name)
    return names


def write_plots(records: Sequence[Record], redraw: bool = False) -> None:
    """Write the plots of all results, and each machine's roofline.

    Those that exist are kept unless `redraw` is set.
    """
    for record in records:
        if redraw or not existing_plots(record):
            write_record_plots(record)
    for group in group_by_machine(list(records)):
        path = group[0].path.with_name("roofline.png")
        if redraw or not path.exists():
            figure = draw_roofline(group)
            if figure is not None:
                write_png(path, figure)
