"""Tables, files and plots of a run."""

import csv
import io
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.harness import Row


@dataclass
class Goal:
    """A figure to reach; `text` has a place for the value."""

    text: str
    sense: str  # ">=" or "<="
    target: float
    value: float | None = None
    why: str = ""  # it was not measured

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target if self.sense == ">=" else self.value <= self.target

    def line(self) -> str:
        goal = f"(goal {self.sense} {self.target:g})"
        if self.value is None:
            head = re.sub(r"\{.*?\}x?", "-", self.text)
            return f"{head} {goal} not measured: {self.why}"
        return f"{self.text.format(self.value)} {goal} {'met' if self.met else 'MISSED'}"


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
    return " / ".join(f"{ms:.3g}" for ms in (row.ms_p20, row.ms_p50, row.ms_p80))


def _rate(row: Row) -> str:
    if row.bound is None:
        return "-"
    if row.bound == "copy":
        return f"{row.gb_s:.4g} GB/s"
    return _flops(1e12 * row.tflop_s)


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.4g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.4g} GFLOP/s"


OPTIONAL = {"variant", "saved MB"}  # columns that are left out where no row has one


def _line(row: Row) -> dict[str, str]:
    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    ceiling = "-" if row.bound is None else f"{row.percent:.0f} % {row.bound}"
    return {
        "shape": row.shape,
        "M": "-" if row.m is None else str(row.m),
        "variant": row.variant or "-",
        "impl": row.impl,
        "ms p20 / p50 / p80": _ms(row),
        "rate": _rate(row),
        "of ceiling": ceiling,
        "peak MB": show(row.peak_mb, ".1f"),
        "saved MB": show(row.saved_mb, ".3g"),
        "max err": show(row.max_error, ".1e"),
        "x pyfast": show(row.times_pyfast, ".2f"),
        "note": row.note,
    }


def tables(rows: list[Row]) -> str:
    """One table for each operation and dtype."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.dtype), []).append(row)
    parts = []
    for (op, dtype), group in groups.items():
        lines = [_line(row) for row in group]
        columns = [c for c in lines[0] if c not in OPTIONAL or any(line[c] != "-" for line in lines)]
        parts.append(f"{op}, {dtype}\n" + table(lines, columns))
    return "\n\n".join(parts)


def machine_lines(machine: Mapping[str, Any], ceilings: Mapping[str, float]) -> str:
    facts = " | ".join(f"{key} {value}" for key, value in machine.items())
    parts = [f"copy {ceilings['copy'] / 1e9:.4g} GB/s (read + written)"]
    for name, rate in ceilings.items():
        if name.startswith("gemm"):
            parts.append(f"{name} {_flops(rate)}")
    return facts + "\nceilings measured here: " + " | ".join(parts)


def goals_block(goals: Sequence[Goal]) -> str:
    if not goals:
        return "goals: none at these sizes"
    return "\n".join(["goals", *(f"  {goal.line()}" for goal in goals)])


def write(path: pathlib.Path, save: Callable[[pathlib.Path], None]) -> None:
    """All of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


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


PANELS = 3  # a row of a figure


def plot_times(path: pathlib.Path, rows: list[Row], title: str) -> bool:
    """Time over M for each operation that has several, a line for each implementation."""
    timed = [row for row in rows if row.m and row.ms_p50]
    groups: dict[tuple, list[Row]] = {}
    for row in timed:
        groups.setdefault((row.op, row.shape, row.dtype, row.variant), []).append(row)
    panels = {key: own for key, own in groups.items() if len({row.m for row in own}) > 1} or groups
    if not panels:
        return False
    from matplotlib.figure import Figure

    height = math.ceil(len(panels) / PANELS)
    size = (4.6 * PANELS, 3.8 * height + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(height, PANELS, squeeze=False).flat
    impls = list(dict.fromkeys(row.impl for row in timed))
    for axis, (key, own) in itertools.zip_longest(axes, panels.items(), fillvalue=(None, None)):
        if not key:
            axis.set_axis_off()
            continue
        _time_panel(axis, own, impls)
        axis.set_title(" ".join(key).rstrip(), fontsize=9)
        axis.set(xlabel="M", ylabel="ms")
    write(path, figure.savefig)
    return True


def _time_panel(axis: Any, rows: list[Row], impls: list[str]) -> None:
    for number, impl in enumerate(impls):
        own = [row for row in rows if row.impl == impl]
        if not own:
            continue  # but keep its colour
        times = [row.ms_p50 for row in own]
        width = 2.5 if impl == "pyfast" else 1.2
        sizes = [row.m for row in own]
        axis.plot(sizes, times, "o-", ms=3, lw=width, color=f"C{number}", label=impl)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=7)


def plot_memory(path: pathlib.Path, rows: list[Row], title: str) -> bool:
    """What each implementation holds, and what a call adds, at each operation's largest M."""
    measured = [row for row in rows if row.peak_mb]
    if not measured:
        return False
    from matplotlib.figure import Figure

    groups: dict[tuple, list[Row]] = {}
    for row in measured:
        groups.setdefault((row.op, row.shape, row.dtype, row.m or 0, row.variant), []).append(row)
    largest = {key[:3]: key for key in sorted(groups, key=lambda key: key[3])}
    figure = Figure(figsize=(7, 1.9 * len(largest) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(largest), 1, squeeze=False)[:, 0]
    for axis, key in zip(axes, largest.values(), strict=True):
        own = groups[key][::-1]
        names, held, added = ([getattr(row, key) for row in own] for key in ("impl", "held_mb", "added_mb"))
        axis.barh(names, held, label="weight")
        axis.barh(names, added, left=held, label="peak of a call")
        op, shape, dtype, m, variant = key
        axis.set_title(f"{op} {shape} {dtype}" + (f" M={m}" if m else "") + f" {variant}", fontsize=9)
        axis.set_xlabel("MB")
        axis.legend(fontsize=7)
    write(path, figure.savefig)
    return True
