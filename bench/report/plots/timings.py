"""Every plot of a result: bars against peers, time and memory over M, the roofline: `python -m bench.report.plots.timings DIR`."""

import itertools
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.report.plots.style import (
    COLORS,
    GRID,
    INK,
    SMALL,
    TINY,
    color_of,
    grid,
    name,
    new_figure,
    order,
    png,
    styled,
)
from bench.report.record import Damaged, Record, Row, by_machine, rate, short, title, walk

# What M counts; where it is a length or a depth, memory is drawn over it.
SIZES = {"lsh_attention": "tokens", "reversible": "blocks"}


def draw(record: Record) -> dict[str, Any]:
    """Every figure there is of a result, by the ending of its file."""
    from bench.report.plots import curves

    if record.rows and record.data.get("rows"):
        found = {"": bars(record), "-times": times(record), "-memory": memory(record)}
    else:
        found = {"": curves.draw(record)}
    return {ending: figure for ending, figure in found.items() if figure is not None}


def write_all(record: Record, stem: pathlib.Path | None = None) -> list[str]:
    """PNGs beside a result; their names."""
    stem = stem or record.path.with_suffix("")
    names = []
    for ending, figure in draw(record).items():
        path = stem.with_name(f"{stem.name}{ending}.png")
        png(path, figure)
        names.append(path.name)
    return names


def main(folder: str) -> int:
    """PNGs beside every result below a folder, and the roofline of each machine."""
    try:
        records = walk(folder)
    except Damaged as error:
        print(f"bench plots: {error}", file=sys.stderr)
        return 2
    write_folder(records)
    return 0


def write_folder(records: Sequence[Record]) -> None:
    for record in records:
        write_all(record)
    for own in by_machine(list(records)):
        if (figure := roofline(own)) is not None:
            png(own[0].path.with_name("roofline.png"), figure)


# --- bars against peers ---


def ratio(row: Row, base: Row) -> tuple[float, float, float]:
    """A row's time over pyfast's: least, middle and most; as measured in turns or, without that, as the times allow."""
    if row.times_pyfast and row.ratio_p20 and row.ratio_p80:
        return row.ratio_p20, row.times_pyfast, row.ratio_p80
    return row.ms_p20 / base.ms_p80, row.ms_p50 / base.ms_p50, row.ms_p80 / base.ms_p20


def cases(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows by case, pyfast's first."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return {case: sorted(own, key=lambda row: order(row.impl)) for case, own in found.items()}


def panels(rows: Iterable[Row], *keys: str) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return found


def _compared(rows: Iterable[Row]) -> list[list[Row]]:
    """Cases of pyfast and at least one peer, all timed."""
    timed = cases(row for row in rows if row.ms_p50)
    return [own for own in timed.values() if own[0].impl == "pyfast" and len(own) > 1]


@styled
def bars(record: Record) -> Any:
    """Every peer's time over pyfast's, with its spread: right of the line it is slower, left of it faster."""
    groups = {
        key: _compared(own) for key, own in panels(record.rows, "op", "shape", "dtype").items()
    }
    groups = {key: own for key, own in groups.items() if own}
    if not groups:
        return None
    heights = [0.7 + 0.15 * sum(len(own) for own in found) for found in groups.values()]
    words = "time over pyfast's, p20 to p80; left of the line they are faster"
    figure, axes = grid(heights, f"{_heading(record)}: {words}")
    for axis, (key, found) in zip(axes, groups.items()):
        op, *rest = key
        variants = [own[0].variant.split(", ") for own in found]
        common = [part for part in variants[0] if all(part in other for other in variants)]
        name(axis, op, ", ".join(filter(None, [*rest, *common])))
        draw_bars(axis, [(_case_label(own[0], record.kind, common), own) for own in found])
    return figure


@styled
def summary(found: Mapping[str, list[tuple[str, list[Row]]]], machine: str) -> Any:
    """Bars of many benches: a panel for each heading, of (label, rows)."""
    height = 0.8 + 0.165 * max(sum(len(rows) for _, rows in own) for own in found.values())
    words = "the time of others over pyfast's; right of the line they are slower, left of it faster"
    figure = new_figure(height, f"{machine}: {words}")
    for axis, (heading, own) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items()
    ):
        axis.set_title(heading, fontweight="bold")
        draw_bars(axis, own)
    return figure


def _heading(record: Record) -> str:
    return f"{record.kind}, {title(record.machine)}"


def _case_label(row: Row, kind: str, known: Sequence[str] = ()) -> str:
    """Its size, and of its variant what is not known."""
    size = "" if row.m is None else f"{row.m} {SIZES.get(kind, 'row' if row.m == 1 else 'rows')}"
    return ", ".join(
        part for part in (size, *row.variant.split(", ")) if part and part not in known
    )


def draw_bars(axis: Any, found: list[tuple[str, list[Row]]]) -> None:
    """A group of bars for each (label, rows), the first of which is pyfast's."""
    place, ticks, names, ends = 0.0, [], [], [1.0]
    for label, (base, *peers) in found:
        axis.text(0.01, place, label, **_left(axis, weight="bold"))
        axis.text(
            1,
            place,
            f"pyfast {short(base.ms_p50)} ms",
            **_left(axis, ha="right", color=COLORS["pyfast"]),
        )
        place += 0.95
        axis.plot(
            [1, 1],
            [place - 0.5, place - 0.35 + 0.85 * len(peers)],
            color=COLORS["pyfast"],
            lw=1.6,
            zorder=3,
        )
        for row in peers:
            low, middle, high = ratio(row, base)
            _bar(axis, place, row.impl, low, middle, high)
            ticks.append(place)
            names.append(getattr(row, "name", row.impl))
            ends += [low, high]
            place += 0.85
        place += 0.35
    axis.set_yticks(ticks, names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(place - 0.4, -0.8)
    _ratios(axis, min(ends), max(ends))


def _left(axis: Any, ha: str = "left", **style: Any) -> dict[str, Any]:
    """Words at the side of a panel, at the height of a value."""
    where = axis.get_yaxis_transform()
    return {"transform": where, "ha": ha, "va": "center", "fontsize": SMALL} | style


def _bar(axis: Any, place: float, impl: str, low: float, middle: float, high: float) -> None:
    axis.barh(place, middle - 1, left=1, height=0.62, color=color_of(impl))
    axis.plot([low, high], [place, place], color=INK, lw=0.8, alpha=0.7, solid_capstyle="butt")
    right = middle >= 1
    edge = max(high, 1) if right else min(low, 1)
    style = {"va": "center", "fontsize": TINY, "fontweight": "normal" if right else "bold"}
    offset = {
        "xytext": (3 if right else -3, 0),
        "textcoords": "offset points",
        "ha": "left" if right else "right",
    }
    axis.annotate(
        f"{middle:.2f}x" if middle < 9.95 else f"{middle:.0f}x", (edge, place), **offset, **style
    )


def _ratios(axis: Any, low: float, high: float) -> None:
    """A logarithmic axis about 1, with room for the words at the ends of the bars."""
    room = 0.22 * math.log(max(high, 1.3) / min(low, 0.9))
    left, right = min(low, 0.9) * math.exp(-room), max(high, 1.3) * math.exp(room)
    axis.set(xscale="log", xlim=(left, right))
    steps = {8: (0.5, 0.7, 1, 1.5, 2, 3, 5), 60: (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)}
    widest = 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000
    fitting = next((own for width, own in steps.items() if right / left < width), widest)
    shown = [step for step in fitting if left < step < right]
    axis.set_xticks(shown, [f"{step:g}x" for step in shown])
    axis.minorticks_off()
    axis.grid(True, axis="x", lw=0.6)
    if left < 1:
        axis.axvspan(left, 1, color=GRID, alpha=0.25, lw=0, zorder=0)


# --- over M ---


@styled
def times(record: Record) -> Any:
    """Time over M for each operation that has several, a line for each implementation."""
    return _curves(record, "ms_p50", "ms", f"{_heading(record)}: time, ms")


@styled
def memory(record: Record) -> Any:
    """Over a length or a depth what a call adds; elsewhere bars of what is held and added at the largest M."""
    if record.kind in SIZES:
        return _curves(
            record,
            "added_mb",
            "MB",
            f"{_heading(record)}: memory of a call, beside what is held, MB",
        )
    return _held_and_added(record)


def _curves(record: Record, field: str, unit: str, heading: str) -> Any:
    known = [row for row in record.rows if row.m and getattr(row, field)]
    groups = panels(known, "op", "shape", "dtype", "variant")
    least = 2 if record.kind in SIZES else 3  # points of a curve
    groups = {key: own for key, own in groups.items() if len({row.m for row in own}) >= least}
    if not groups:
        return None
    figure, axes = grid([2.4] * len(groups), heading, extra=0.7)
    drawn: dict[str, Any] = {}
    for axis, (key, own) in zip(axes, groups.items()):
        for impl, points in sorted(panels(own, "impl").items(), key=lambda item: order(item[0][0])):
            drawn[impl[0]] = _curve(axis, impl[0], [(row.m, getattr(row, field)) for row in points])
        name(axis, key[0], ", ".join(filter(None, key[1:])))
        over(axis, [row.m for row in own], SIZES.get(record.kind, "rows (M)"))
        scale(axis, unit)
    names = sorted(drawn, key=order)
    figure.legend(
        [drawn[impl] for impl in names], names, loc="outside lower center", ncols=min(len(names), 9)
    )
    return figure


def _curve(axis: Any, impl: str, points: list[tuple[int, float]]) -> Any:
    own = impl == "pyfast"
    style = {"lw": 2.4, "zorder": 4} if own else {"lw": 1.4, "zorder": 3}
    (line,) = axis.plot(
        *zip(*sorted(points)), "o-", ms=3.5, color=color_of(impl), label=impl, **style
    )
    return line


def over(axis: Any, sizes: Iterable[int], label: str) -> None:
    """Logarithmic, with the sizes that were measured for its ticks."""
    axis.set(xscale="log", yscale="log", xlabel=label)
    shown = sorted(set(sizes))
    while len(shown) > 7:
        shown = shown[::-2][::-1]
    axis.set_xticks(
        shown, [f"{n // 1024}K" if n >= 4096 and n % 1024 == 0 else str(n) for n in shown]
    )
    axis.minorticks_off()
    axis.grid(True, lw=0.6)


def scale(axis: Any, unit: str) -> None:
    """Logarithmic, unless the values are so near each other that this would make much of little."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_ylim()
    if high / low < 2:
        axis.set(yscale="linear", ylim=(0, 1.1 * high))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
        axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}")


def _held_and_added(record: Record) -> Any:
    known = [row for row in record.rows if row.peak_mb]
    largest: dict[tuple, tuple] = {}
    for row in sorted(known, key=lambda row: row.m or 0):
        largest[row.op, row.shape, row.dtype] = row.case
    groups = cases(row for row in known if row.case == largest[row.op, row.shape, row.dtype])
    if not groups:
        return None
    heights = [0.7 + 0.17 * len(own) for own in groups.values()]
    figure, axes = grid(
        heights, f"{_heading(record)}: memory, MB: held (full), added by a call (light)"
    )
    for axis, own in zip(axes, groups.values()):
        for row in own:
            style = {"color": color_of(row.impl), "height": 0.7}
            axis.barh(row.impl, row.held_mb or 0, **style)
            axis.barh(row.impl, row.added_mb, left=row.held_mb or 0, alpha=0.4, **style)
            place = {
                "xytext": (3, 0),
                "textcoords": "offset points",
                "va": "center",
                "fontsize": TINY,
            }
            axis.annotate(short(row.peak_mb), (row.peak_mb, row.impl), **place)
        words = own[0].shape, own[0].dtype, _case_label(own[0], record.kind)
        name(axis, own[0].op, ", ".join(filter(None, words)))
        axis.set_xlim(0, 1.2 * max(row.peak_mb for row in own))
        axis.set_ylim(len(own) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(True, axis="x", lw=0.6)
    return figure


# --- roofline ---

BENCHES = ("#e5484d", "#3b82f6", "#14a38b", "#f5a524", "#8b5cf6", "#0891b2", "#65a30d", "#e796b3")


@styled
def roofline(records: Sequence[Record]) -> Any:
    """Every op of pyfast's on one machine: FLOPs a second over FLOPs a byte, below what the machine was seen to do."""
    own = [(record, row) for record in records for row in record.rows if row.impl == "pyfast"]
    placed = [(record, row) for record, row in own if row.ms_p50 and row.moved_bytes]
    copy = max(
        (record.ceilings["copy"] for record in records if "copy" in record.ceilings), default=None
    )
    if not placed or not copy:
        return None
    figure = new_figure(4.6, f"roofline, {title(records[0].machine)}: pyfast's ops")
    axis = figure.subplots()
    intensities = [row.flops / row.moved_bytes for _, row in placed if row.flops]
    left, right = min(intensities, default=1) / 6, max(intensities, default=100) * 6
    _roofs(axis, records, copy, left, right)
    benches = list(dict.fromkeys(record.kind for record, _ in placed))
    for number, bench in enumerate(benches):
        own = [row for record, row in placed if record.kind == bench]
        _placed(axis, own, BENCHES[number % len(BENCHES)], bench, left)
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


def _roofs(axis: Any, records: Sequence[Record], copy: float, left: float, right: float) -> None:
    """The memory's slope, and a level for each dtype: the best that any run saw."""
    levels: dict[str, float] = {}
    for what, value in itertools.chain(*(record.ceilings.items() for record in records)):
        kind, _, dtype = what.partition(" ")
        if kind == "ceiling":
            levels[dtype] = max(value, levels.get(dtype, 0))
    for dtype, level in levels.items():
        ridge = level / copy
        axis.plot([max(ridge, left), right], [level, level], color=INK, lw=1.3)
        axis.annotate(f"{dtype} {rate(level)}", (right, level), xytext=(-2, 4), **_word("right"))
    ridge = max(levels.values(), default=copy * right) / copy
    axis.plot([left, ridge], [copy * left, copy * ridge], color=INK, lw=1.3)
    middle = math.sqrt(left * ridge)
    axis.annotate(
        f"copy {copy / 1e9:.0f} GB/s", (middle, copy * middle), xytext=(-6, 3), **_word("right")
    )


def _word(ha: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "ha": ha, "fontsize": SMALL, "color": INK}


def _placed(axis: Any, rows: list[Row], color: str, bench: str, left: float) -> None:
    """An op's sizes are joined; 16-bit numbers are full, others hollow."""
    for number, own in enumerate(panels(rows, "op", "shape", "dtype", "variant").values()):
        points = sorted(_point(row, left) for row in own)
        wide = own[0].dtype == "fp32"
        axis.plot(*zip(*points), "-", color=color, lw=0.7, alpha=0.35, zorder=2)
        style = {
            "mfc": "none" if wide else color,
            "mec": color,
            "ms": 5,
            "zorder": 3,
            "clip_on": False,
        }
        axis.plot(*zip(*points), "o", label=None if number else bench, **style)


def _point(row: Row, left: float) -> tuple[float, float]:
    seconds = row.ms_p50 / 1e3
    if row.flops:
        return row.flops / row.moved_bytes, row.flops / seconds
    return left, left * row.moved_bytes / seconds


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.report.plots.timings DIR")
    raise SystemExit(main(sys.argv[1]))
