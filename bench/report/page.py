"""All results of a folder as one page to look at, and as Markdown: `python -m bench.report.page DIR [--out FILE.html]`."""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from bench.report import record
from bench.report.markdown import (
    BAD,
    GOOD,
    OPEN,
    Block,
    Contents,
    Counts,
    Fold,
    Heading,
    Picture,
    Table,
    Text,
    html_page,
    markdown,
)
from bench.report.plots import style, timings
from bench.report.record import Damaged, Goal, Record, Row, short

ABOUT = (
    "Every implementation is checked against float64 before it is timed, in turns with the others, with cold caches; "
    "times are medians. Ceilings are what this machine was measured to do: copying memory, multiplying matrices."
)
SHOWN = {
    "bench",
    "machine",
    "ceilings",
    "rows",
    "goals",
    "checked",
    "curves",
}  # elsewhere than among the facts
MANY = 8  # rows: more are folded
OF_A_RUN = "commit", "date", "load"


def blocks(records: Sequence[Record]) -> list[Block]:
    """The whole document."""
    parts = list(itertools.chain(*map(_machine, record.by_machine(list(records)))))
    return [
        Heading(1, "pyfast, measured"),
        Text(ABOUT, "lead"),
        *_summary(records),
        Contents([part for part in parts if isinstance(part, Heading)]),
        *parts,
    ]


def _summary(records: Sequence[Record]) -> list[Block]:
    """How many goals are met, and which are not."""
    goals = [(one, goal) for one in records for goal in one.goals]
    counts = {mark: sum(goal.verdict == mark for _, goal in goals) for mark in (GOOD, BAD, OPEN)}
    tiles = [(counts[GOOD], "goals met", GOOD), (counts[BAD], "missed", BAD if counts[BAD] else "")]
    found: list[Block] = [Counts([*tiles, (counts[OPEN], OPEN, "")])]
    missed = [(one, goal) for one, goal in goals if goal.met is False]
    missed.sort(key=lambda pair: pair[1].margin)
    if missed:
        found.append(
            _goals(
                [goal for _, goal in missed],
                [(one.kind, record.title(one.machine)) for one, _ in missed],
            )
        )
    return found


def _goals(goals: Sequence[Goal], places: Sequence[tuple[str, str]] = ()) -> Table:
    """Goal, measured, ratio and verdict; where the goals are from different places, those too."""
    columns = {
        "bench": [bench for bench, _ in places],
        "machine": [machine for _, machine in places],
        "goal": [goal.sentence for goal in goals],
        "measured": [goal.measured for goal in goals],
        "ratio": [goal.figure for goal in goals],
        "verdict": [f"{goal.verdict}: {goal.why}" if goal.why else goal.verdict for goal in goals],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return Table(
        list(columns), list(zip(*columns.values())), {"ratio": [goal.margin for goal in goals]}
    )


# --- a machine ---


def _machine(records: list[Record]) -> list[Block]:
    found: list[Block] = [
        Heading(2, record.title(records[0].machine)),
        Text(_facts_of(records), "note"),
    ]
    found += _picture(
        lambda: timings.roofline(records), "roofline", _beside(records[0], "roofline")
    )
    whole = [one for one in records if not one.parent]
    for one in sorted(whole, key=lambda one: (not one.rows, one.kind, one.path)):
        found += _bench(one)
        for other in records:
            if other.parent == one.path:
                found += [*_figures(other), *_generic(other)]
    return found


def _facts_of(records: Iterable[Record]) -> str:
    """What is the same in all runs, or all that it was."""
    facts: dict[str, list[str]] = {}
    for one in records:
        for key, value in one.machine.items():
            if key not in OF_A_RUN and str(value) not in ("none", *facts.setdefault(key, [])):
                facts[key].append(str(value))
    return " · ".join(f"{key} {' / '.join(values)}" for key, values in facts.items() if values)


def _beside(one: Record, name: str) -> pathlib.Path:
    return one.path.with_name(f"{name}.png")


def _picture(draw: Any, label: str, beside: pathlib.Path) -> list[Block]:
    """Drawn for the page; for Markdown the PNG, where a run has left one."""
    png = beside if beside.exists() else None
    try:
        figure = draw()
        svg = style.svg(figure, label) if figure is not None else ""
    except ImportError:
        svg = ""
    return [Picture(label, svg, png)] if svg or png else []


# --- a bench ---


def _bench(one: Record) -> list[Block]:
    found: list[Block] = [
        Heading(3, _name(one), record.title(one.machine)),
        Text(_conditions(one), "note"),
    ]
    if one.goals:
        found.append(_goals(one.goals))
    found += _facts(one)
    if one.absent:
        found.append(
            Text(
                "Not run: "
                + "; ".join(f"{impl} ({why})" for impl, why in one.absent.items())
                + ".",
                "note",
            )
        )
    found += _figures(one)
    if one.rows:
        return [*found, Fold(f"all rows ({len(one.rows)})", [_rows(one.rows)])]
    return [*found, *_generic(one)]


def _name(one: Record) -> str:
    tokens = one.data.get("tokens")
    return f"{one.kind}, {tokens} tokens" if tokens else one.kind


def _conditions(one: Record) -> str:
    """Of this run; and what else its file says."""
    parts = [f"{key} {one.machine[key]}" for key in OF_A_RUN if key in one.machine]
    if one.ceilings:
        parts.append(f"copy {one.ceilings['copy'] / 1e9:.3g} GB/s")
        parts += [
            f"{key} {record.rate(value)}"
            for key, value in one.ceilings.items()
            if key.startswith("gemm")
        ]
    return " · ".join([*parts, one.path.name])


def _facts(one: Record) -> list[Block]:
    """What else a file says, beside its rows."""
    said = {key: value for key, value in one.data.items() if key not in SHOWN}
    facts = dict(
        itertools.chain(*(v.items() if isinstance(v, dict) else [(k, v)] for k, v in said.items()))
    )
    return [Table(list(facts), [[_show(value) for value in facts.values()]])] if facts else []


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return short(value) if isinstance(value, float) else str(value)


def _figures(one: Record) -> list[Block]:
    try:
        figures = timings.draw(one)
    except ImportError:
        beside = [one.path.with_suffix(".png")]
        return [Picture(_name(one), "", path) for path in beside if path.exists()]
    found: list[Block] = []
    for ending, figure in figures.items():
        words = f"{_name(one)}{ending.replace('-', ', ')}"
        found += _picture(lambda figure=figure: figure, words, _beside(one, one.path.stem + ending))
    return found


def _generic(one: Record) -> list[Block]:
    """The rows of what is no timing, without their curves; many of them are folded."""
    keys = list(dict.fromkeys(itertools.chain(*one.lines)))
    keys = [
        key for key in keys if not any(isinstance(line.get(key), list | dict) for line in one.lines)
    ]
    table = Table(keys, [[_number(line.get(key), key) for key in keys] for line in one.lines])
    return (
        [Fold(f"all rows ({len(one.lines)})", [table])]
        if len(one.lines) > MANY
        else [table]
        if one.lines
        else []
    )


def _number(value: Any, key: str) -> str:
    if value is None:
        return ""
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, float):
        return f"{value:.3g}" if value and abs(value) < 1e-3 else f"{value:.4g}"
    return str(value)


def _rows(rows: Sequence[Row]) -> Table:
    columns = {
        "op": lambda row: row.op,
        "shape": lambda row: row.shape,
        "M": lambda row: "" if row.m is None else str(row.m),
        "dtype": lambda row: row.dtype,
        "variant": lambda row: row.variant,
        "impl": lambda row: row.impl,
        "ms": lambda row: _maybe(row.ms_p50),
        "p20 to p80": lambda row: (
            f"{short(row.ms_p20)} to {short(row.ms_p80)}" if row.ms_p50 else ""
        ),
        "x pyfast": lambda row: "" if row.times_pyfast is None else f"{row.times_pyfast:.2f}",
        "of ceiling": lambda row: "" if row.percent is None else f"{row.percent:.0f} % {row.bound}",
        "peak MB": lambda row: _maybe(row.peak_mb),
        "saved MB": lambda row: _maybe(row.saved_mb),
        "max err": lambda row: "" if row.max_error is None else f"{row.max_error:.1e}",
        "note": lambda row: row.note,
    }
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    cells = {name: own for name, own in cells.items() if any(own)}
    return Table(list(cells), list(zip(*cells.values())))


def _maybe(value: float | None) -> str:
    return "" if value is None else short(value)


def write(
    folder: pathlib.Path, out: pathlib.Path | None = None
) -> tuple[pathlib.Path, pathlib.Path]:
    """The page and the Markdown of all results below a folder; all of a file or none of it."""
    out = out or folder / "index.html"
    other = out.with_suffix(".md")
    parts = blocks(record.walk(folder))
    for path, text in (
        (out, html_page("pyfast, measured", parts)),
        (other, markdown(parts, other.parent)),
    ):
        style.write(path, lambda draft, text=text: draft.write_text(text))
    return out, other


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.report.page", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR")
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="FILE.html", help="default: DIR/index.html"
    )
    args = parser.parse_args(words)
    if args.out and args.out.suffix not in (".html", ".htm"):
        parser.error(f"--out {args.out}: must end in .html; the Markdown goes beside it")
    try:
        paths = write(args.folder, args.out)
    except Damaged as error:
        print(f"bench page: {error}", file=sys.stderr)
        return 2
    print("written: " + ", ".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
