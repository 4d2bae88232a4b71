"""Plots of the reversible bench: time, memory and drift."""

import pathlib
from typing import Any

from bench import report
from bench.harness import Row
from bench.reversible_drift import ERRORS

COLOURS = {  # pyfast's are warm, what it is held against grey, its kin cool
    "pyfast": "#d62728",
    "pyfast-exact": "#ff7f0e",
    "pyfast-int32": "#e8b010",
    "pyfast-inexact": "#e377c2",
    "torch": "#222222",
    "checkpoint": "#999999",
    "revtorch": "#1f77b4",
    "lucidrains": "#17becf",
    "revlib": "#2ca02c",
    "memcnn": "#9467bd",
}
TIMED, MOST = 12, 1.33  # the blocks of the bars, and the goal


def _figure(panels: int, width: float, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _panels(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.m:
            found.setdefault((row.shape, row.dtype), []).append(row)
    return found


def _sizes(shape: str, dtype: str) -> str:
    width, tokens = shape.split("x")
    return f"width {width}, {tokens} tokens, {dtype}"


def plot_times(path: pathlib.Path, rows: list[Row], title: str) -> bool:
    """Bars at one depth, with what is missing among them."""
    panels = _panels(rows)
    if not panels:
        return False
    absent = [row for row in rows if not row.m]
    figure, axes = _figure(len(panels), 5.6, 0.34 * len({row.impl for row in rows}) + 1.3, title)
    for axis, (key, own) in zip(axes, panels.items(), strict=True):
        depths = {row.m for row in own}
        depth = TIMED if TIMED in depths else max(depths)
        _bars(axis, [row for row in own if row.m == depth] + absent)
        axis.set_title(f"{_sizes(*key)}, {depth} blocks", fontsize=9)
        axis.set_xlabel("ms, forward and backward (median, p20 to p80)", fontsize=8)
    report.write(path, figure.savefig)
    return True


def _bars(axis: Any, rows: list[Row]) -> None:
    base = next((row.ms_p50 for row in rows if row.impl == "torch"), None)
    longest = max((row.ms_p80 for row in rows if row.ms_p50), default=1.0)
    for row in rows:
        if not row.ms_p50:
            axis.barh(row.impl, 0)
            axis.text(0, row.impl, f" {row.note}", va="center", fontsize=7, style="italic", color="#777777")
            continue
        spread = [[row.ms_p50 - row.ms_p20], [row.ms_p80 - row.ms_p50]]
        bar = axis.barh(row.impl, row.ms_p50, xerr=spread, color=COLOURS[row.impl], height=0.7)
        bar.errorbar[2][0].set(color="#555555", linewidth=1)
        times = f"  {row.ms_p50:.0f}" + (f"   {row.ms_p50 / base:.2f}x" if base else "")
        axis.text(row.ms_p80, row.impl, times, va="center", fontsize=8)
    if base:
        axis.axvline(MOST * base, color="#555555", lw=0.8, ls=":", zorder=0)
        axis.text(MOST * base, -0.55, f"{MOST} x torch", fontsize=7, color="#555555", ha="center", va="bottom")
    axis.set_xlim(0, 1.22 * longest)
    axis.set_ylim(len(rows) - 0.4, -1.0)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def plot_memory(path: pathlib.Path, rows: list[Row], title: str) -> bool:
    """What a step takes beside parameters and gradients, over depth."""
    panels = _panels([row for row in rows if row.peak_mb])
    if not panels:
        return False
    figure, axes = _figure(len(panels), 6.2, 4, f"{title}\nmemory of a step, beside parameters and gradients")
    for axis, (key, own) in zip(axes, panels.items(), strict=True):
        last = {row.impl: row.added_mb for row in own}
        for impl in sorted(last, key=last.__getitem__, reverse=True):
            points = [(row.m, row.added_mb) for row in own if row.impl == impl]
            style = {"color": COLOURS[impl]} | ({"lw": 2.5, "zorder": 3} if impl == "pyfast" else {"lw": 1.3})
            axis.plot(*zip(*points), "o-", ms=4, label=f"{last[impl]:.4g}  {impl}", **style)
        _over_depth(axis, [row.m for row in own])
        axis.yaxis.set_major_locator(_ticker().LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("MB", fontsize=8)
        axis.set_title(_sizes(*key), fontsize=9)
        legend = {"title": "MB at the last depth", "title_fontsize": 7, "fontsize": 7, "frameon": False}
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), **legend)
    report.write(path, figure.savefig)
    return True


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker


def _over_depth(axis: Any, depths: list[int]) -> None:
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("blocks", fontsize=8)
    depths = sorted(set(depths))
    axis.set_xticks(depths, list(map(str, depths)))
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.grid(True, alpha=0.3)


ALIKE = 1.5  # times: curves nearer than this are drawn as one

Curve = tuple[tuple[int, float], ...]


def _curves(found: list[dict], key: str) -> dict[Curve, dict[str, list[str]]]:
    """Over depth, of those that are alike the first; and whose they are, by dtype."""
    curves: dict[Curve, dict[str, list[str]]] = {}
    for dtype, impl in dict.fromkeys((one["dtype"], one["impl"]) for one in found):
        mine = tuple((one["blocks"], one[key]) for one in found if (one["dtype"], one["impl"]) == (dtype, impl))
        same = next((other for other in curves if _alike(mine, other)), mine)
        curves.setdefault(same, {}).setdefault(dtype, []).append(impl)
    return curves


def _alike(mine: Curve, other: Curve) -> bool:
    pairs = [(dict(mine)[depth], dict(other)[depth]) for depth in dict(mine).keys() & dict(other).keys()]
    return all(a == b or max(a, b) < ALIKE * min(a, b) for a, b in pairs)


def plot_drift(path: pathlib.Path, found: list[dict], title: str) -> bool:
    """Logarithmic, but for a band of its own for exact zeros."""
    found = [one for one in found if "note" not in one]
    if not found:
        return False
    figure, axes = _figure(len(ERRORS), 5.6, 4, title)
    nil = min((one[key] for one in found for key in ERRORS if one[key]), default=1e-6) / 50
    for axis, key in zip(axes, ERRORS, strict=True):
        for number, (curve, names) in enumerate(_curves(found, key).items()):
            exact = not any(error for _, error in curve)
            color = COLOURS["pyfast"] if exact else f"C{number}"
            depths, errors = zip(*((depth, error or nil) for depth, error in curve))
            axis.plot(depths, errors, "o-", ms=4, lw=2, color=color)
            label = "; ".join(f"{dtype}: {', '.join(impls)}" for dtype, impls in names.items())
            place = {"xytext": (0, 8), "va": "bottom"} if exact else {"xytext": (0, -8), "va": "top"}
            axis.annotate(label, (depths[0], errors[0]), textcoords="offset points", color=color, fontsize=7, **place)
        _over_depth(axis, [one["blocks"] for one in found])
        axis.axhspan(nil / 3, nil * 5, color=COLOURS["pyfast"], alpha=0.06)
        axis.set_ylim(nil / 3, 4 * axis.get_ylim()[1])
        ticks = [tick for tick in axis.get_yticks() if nil * 5 < tick < axis.get_ylim()[1]]
        axis.set_yticks([nil, *ticks], ["exactly 0", *(f"{tick:.0e}" for tick in ticks)])
        axis.set_title(f"error of the {key}", fontsize=9)
    report.write(path, figure.savefig)
    return True
