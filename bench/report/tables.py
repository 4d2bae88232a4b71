"""Text tables of a run, for the terminal."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure.row import Row
from bench.report.goals import Goal, format_figure

RED, PLAIN = "\033[31m", "\033[0m"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return plain aligned text: numbers to the right, everything else to the left."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    numeric = [_is_numeric([row.get(column) for row in rows]) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        parts = zip(values, widths, numeric, strict=True)
        return "  ".join(v.rjust(w) if right else v.ljust(w) for v, w, right in parts).rstrip()

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_numeric(values: Sequence[Any]) -> bool:
    known = [value for value in values if value is not None and value != "-"]
    return bool(known) and all(str(value)[:1].isdigit() for value in known)


def _format_times(row: Row) -> str:
    if row.ms_p50 is None:
        return "-"
    return " / ".join(map(format_figure, (row.ms_p20, row.ms_p50, row.ms_p80)))


def _format_row_rate(row: Row) -> str:
    if row.bound is None:
        return "-"
    if row.bound == "copy":
        return f"{row.gb_s:.3g} GB/s"
    return _format_flops(1e12 * row.tflop_s)


def _format_flops(rate: float) -> str:
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


# Columns that are dropped, from left to right, until a terminal is large enough.
DROPPED = "launch ms", "max err", "saved MB", "peak MB", "rate", "variant"


def _line(row: Row) -> dict[str, str]:
    """Return the cells of a row, by column."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    ratio = show(row.times_pyfast, ".2f")
    if row.ratio_p20 is not None and row.impl != "pyfast":
        ratio += f" ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
    return {
        "M": "-" if row.m is None else str(row.m),
        "variant": row.variant or "-",
        "impl": row.impl,
        "ms p20 / p50 / p80": _format_times(row),
        "launch ms": show(row.launch_ms, ".3f"),
        "rate": _format_row_rate(row),
        "of ceiling": "-" if row.bound is None else f"{row.percent:.0f} % {row.bound}",
        "peak MB": show(row.peak_mb, ".1f"),
        "saved MB": show(row.saved_mb, ".3g"),
        "max err": show(row.max_error, ".1e"),
        "x pyfast (p20 to p80)": ratio,
        "note": row.note,
    }


def tables(rows: list[Row], columns: int | None = None) -> str:
    """Return a table for each operation, shape and dtype, within so many characters.

    A column is left out where it says nothing or finds no room.
    """
    if columns is None:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = f"{row.op} {row.shape} {row.model}".rstrip() + f", {row.dtype}"
        groups.setdefault("not here" if row.op == "all" else name, []).append(_line(row))
    return "\n\n".join(f"{name}\n{_fit(lines, columns)}" for name, lines in groups.items())


def _fit(lines: list[dict[str, str]], limit: int) -> str:
    columns = [c for c in lines[0] if c == "note" or any(line[c] != "-" for line in lines)]
    for dropped in (None, *DROPPED):
        columns = [column for column in columns if column != dropped]
        text = table(lines, columns)
        if max(map(len, text.splitlines())) <= limit:
            break
    return text


def machine_lines(machine: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    """Return the conditions of a run, and the ceilings measured in it."""
    facts = " | ".join(f"{key} {value}" for key, value in machine.items())
    parts = [f"copy {ceilings['copy'] / 1e9:.4g} GB/s (read + written)"]
    for name, rate in ceilings.items():
        if name.startswith("gemm"):
            parts.append(f"{name} {_format_flops(rate)}")
    return facts + "\nceilings measured here: " + " | ".join(parts)


def goals_table(goals: Sequence[Goal]) -> str:
    """Return the goals as a table, missed ones in red, and a line that counts them."""
    if not goals:
        return "goals: none at these sizes"
    lines = [goal.table_cells() for goal in goals]
    head, rule, *rest = table(lines, list(lines[0])).splitlines()
    shown = [_red(line) if goal.met is False else line for goal, line in zip(goals, rest)]
    missed, unknown = (sum(goal.met is met for goal in goals) for met in (False, None))
    met = len(goals) - missed - unknown
    verdict = f"{len(goals)} goals: {met} met, {missed} missed, {unknown} not measured"
    return "\n".join([head, rule, *shown, "", verdict])


def _red(text: str) -> str:
    """Color text red on a terminal, unless NO_COLOR is set."""
    has_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"{RED}{text}{PLAIN}" if has_color else text
