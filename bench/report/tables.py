"""Tables and files of a run."""

import csv
import io
import json
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.measure.case import Row
from bench.report.goals import Goal, figure, red
from bench.report.plots.style import write


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Plain aligned text: numbers to the right, everything else to the left."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    numeric = [_is_numeric(row.get(column) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        parts = zip(values, widths, numeric, strict=True)
        return "  ".join(v.rjust(w) if right else v.ljust(w) for v, w, right in parts).rstrip()

    return "\n".join([line(columns), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_numeric(values: Any) -> bool:
    known = [v for v in values if v is not None and v != "-"]
    return bool(known) and all(str(v)[:1].isdigit() for v in known)


def _ms(row: Row) -> str:
    if row.ms_p50 is None:
        return "-"
    return " / ".join(map(figure, (row.ms_p20, row.ms_p50, row.ms_p80)))


def _rate(row: Row) -> str:
    if row.bound is None:
        return "-"
    if row.bound == "copy":
        return f"{row.gb_s:.3g} GB/s"
    return _flops(1e12 * row.tflop_s)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


# From left to right, until a terminal is wide enough.
DROPPED = "launch ms", "max err", "saved MB", "peak MB", "rate", "variant"


def _line(row: Row) -> dict[str, str]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    ratio = show(row.times_pyfast, ".2f")
    if row.ratio_p20 is not None and row.impl != "pyfast":
        ratio += f" ({row.ratio_p20:.2f} to {row.ratio_p80:.2f})"
    return {
        "M": "-" if row.m is None else str(row.m),
        "variant": row.variant or "-",
        "impl": row.impl,
        "ms p20 / p50 / p80": _ms(row),
        "launch ms": show(row.launch_ms, ".3f"),
        "rate": _rate(row),
        "of ceiling": "-" if row.bound is None else f"{row.percent:.0f} % {row.bound}",
        "peak MB": show(row.peak_mb, ".1f"),
        "saved MB": show(row.saved_mb, ".3g"),
        "max err": show(row.max_error, ".1e"),
        "x pyfast (p20 to p80)": ratio,
        "note": row.note,
    }


def tables(rows: list[Row], width: int | None = None) -> str:
    """One table for each operation, shape and dtype. A column that says nothing, or finds no room, is left out."""
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    groups: dict[str, list[dict]] = {}
    for row in rows:
        name = (
            "not here"
            if row.op == "all"
            else f"{row.op} {row.shape} {row.model}".rstrip() + f", {row.dtype}"
        )
        groups.setdefault(name, []).append(_line(row))
    return "\n\n".join(f"{name}\n{_fitted(lines, width)}" for name, lines in groups.items())


def _fitted(lines: list[dict[str, str]], width: int) -> str:
    columns = [c for c in lines[0] if c == "note" or any(line[c] != "-" for line in lines)]
    for dropped in (None, *DROPPED):
        columns = [column for column in columns if column != dropped]
        found = table(lines, columns)
        if max(map(len, found.splitlines())) <= width:
            break
    return found


def machine_lines(machine: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    facts = " | ".join(f"{key} {value}" for key, value in machine.items())
    parts = [f"copy {ceilings['copy'] / 1e9:.4g} GB/s (read + written)"]
    for name, rate in ceilings.items():
        if name.startswith("gemm"):
            parts.append(f"{name} {_flops(rate)}")
    return facts + "\nceilings measured here: " + " | ".join(parts)


def goals_block(goals: Sequence[Goal]) -> str:
    """A table; what was missed is red."""
    if not goals:
        return "goals: none at these sizes"
    lines = [goal.line() for goal in goals]
    head, rule, *rest = table(lines, list(lines[0])).splitlines()
    shown = [
        red(line) if goal.met is False else line for goal, line in zip(goals, rest, strict=True)
    ]
    missed, unknown = (sum(goal.met is met for goal in goals) for met in (False, None))
    verdict = f"{len(goals)} goals: {len(goals) - missed - unknown} met, {missed} missed, {unknown} not measured"
    return "\n".join([head, rule, *shown, "", verdict])


def write_json(path: pathlib.Path, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=1) + "\n"
    write(path, lambda draft: draft.write_text(text))


def write_csv(path: pathlib.Path, rows: list[Row], machine: Mapping[str, Any]) -> None:
    """One line a row; the conditions are repeated on each, so that files can be joined."""
    sheet = io.StringIO()
    lines = [asdict(row) | dict(machine) for row in rows]
    writer = csv.DictWriter(sheet, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write(path, lambda draft: draft.write_text(sheet.getvalue()))
