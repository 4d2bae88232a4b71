"""Colors, panels, axes and files that all plots share."""

import functools
import pathlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.report.files import write_atomically

INK, MUTED, GRID = "#1f2328", "#6e7781", "#d0d7de"
FIGURE_INCHES, PANELS_PER_LINE = 10.0, 3
SMALL, TINY = 7.5, 6.5

# In every plot pyfast is red; its variants, and peers patched by it, have warm colors. Torch is
# gray, and all others have cool colors.
COLORS = {
    "pyfast": "#e5484d",
    "pyfast-plain": "#f5a524",
    "pyfast-exact": "#f5a524",
    "pyfast-int32": "#d6a77a",
    "pyfast-inexact": "#e796b3",
    "pyfast-nf4": "#f5a524",
    "torch": "#7d8590",
    "torch-fp32": "#b3bac2",
    "full": "#7d8590",
    "frozen": "#7d8590",
    "frozen-fp32": "#b3bac2",
    "sdpa": "#7d8590",
    "checkpoint": "#b3bac2",
    "dequantize+torch": "#a8763e",
    "bnb-train": "#3b82f6",
    "bnb-eval": "#93bdfb",
    "peft": "#14a38b",
    "peft-16bit": "#7fcdbf",
    "peft-fp32": "#0d6b5c",
    "peft-bnb": "#3b82f6",
    "peft-bnb-16bit": "#93bdfb",
    "peft-bnb+patch": "#a8763e",
    "hf": "#8b5cf6",
    "lucidrains": "#14a38b",
    "flex": "#3b82f6",
    "revtorch": "#3b82f6",
    "revlib": "#8b5cf6",
    "memcnn": "#0891b2",
    "unsloth": "#65a30d",
    "torchao": "#0891b2",
    "gemlite": "#a855f7",
    "hqq": "#14a38b",
}
WARM = ("#f5a524", "#d6a77a", "#e796b3")
SPARE = ("#0e7490", "#4d7c0f", "#6d28d9", "#1d4ed8", "#0f766e", "#be185d")


def color_of(impl: str) -> str:
    """Return the color of an implementation, the same in every plot, even if not listed."""
    spare = WARM if impl.startswith("pyfast") else SPARE
    return COLORS.get(impl) or spare[zlib.crc32(impl.encode()) % len(spare)]


def sort_key(impl: str) -> tuple[int, str]:
    """Return the key that sorts implementations: pyfast first, then as listed."""
    known = list(COLORS)
    return (known.index(impl) if impl in COLORS else len(known), impl)


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a drawing function so that the style holds while it draws."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        import matplotlib  # optional: without it there are no plots

        edges = {
            key: GRID for key in ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
        }
        words = {
            key: INK
            for key in ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
        }
        sizes = {
            key: SMALL
            for key in ("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
        }
        spines = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
        legend = {"legend.frameon": False, "legend.fontsize": SMALL, "axes.titlelocation": "left"}
        titles = {"text.parse_math": False, "axes.titlesize": SMALL + 0.5}
        with matplotlib.rc_context(edges | words | sizes | spines | legend | titles):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(height: float, heading: str = "", inches: float = FIGURE_INCHES) -> Any:
    """Return an empty figure of that height and width in inches."""
    from matplotlib.figure import Figure  # optional: without it there are no plots

    figure = Figure(figsize=(inches, height), layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
    return figure


def grid(heights: Sequence[float], heading: str = "", extra: float = 0.4) -> tuple[Any, list[Any]]:
    """Return a figure of panels of these heights, and their axes.

    Each panel stands in the column that is the shortest so far.
    """
    count = 2 if len(heights) == 4 else min(PANELS_PER_LINE, len(heights))
    columns: list[list[int]] = [[] for _ in range(count)]
    tall = [0.0] * count
    for number, height in enumerate(heights):
        shortest = tall.index(min(tall))
        columns[shortest].append(number)
        tall[shortest] += height
    inches = FIGURE_INCHES if count > 1 else FIGURE_INCHES / 2
    figure = new_figure(max(tall) + extra, heading, inches)
    axes: dict[int, Any] = {}
    for column, numbers, height in zip(figure.add_gridspec(1, count), columns, tall):
        parts = [heights[number] for number in numbers]
        if (gap := max(tall) - height) > 0.05:
            parts.append(gap)
        places = list(column.subgridspec(len(parts), 1, height_ratios=parts))
        axes |= {number: figure.add_subplot(place) for number, place in zip(numbers, places)}
        for place in places[len(numbers) :]:
            figure.add_subplot(place).set_axis_off()
    return figure, [axes[number] for number in range(len(heights))]


def set_title(axis: Any, title: str, subtitle: str) -> None:
    """Write a title above a panel and, below it, a smaller subtitle."""
    axis.set_title(title, fontweight="bold", pad=13)
    small = {
        "color": MUTED,
        "fontsize": TINY,
        "textcoords": "offset points",
        "xycoords": "axes fraction",
    }
    axis.annotate(subtitle, (0, 1), xytext=(0, 4), **small)


def write_png(path: pathlib.Path, figure: Any) -> None:
    """Write a figure; the file does not name the version of matplotlib."""
    options = {"dpi": 120, "facecolor": "white", "metadata": {"Software": None}}
    write_atomically(path, lambda draft: figure.savefig(draft, **options))


def set_log_axes(axis: Any, sizes: Iterable[int], label: str) -> None:
    """Make both axes logarithmic, with the measured sizes as ticks."""
    axis.set(xscale="log", yscale="log", xlabel=label)
    shown = sorted(set(sizes))
    while len(shown) > 7:
        shown = shown[::-2][::-1]
    names = [f"{n // 1024}K" if n >= 4096 and n % 1024 == 0 else str(n) for n in shown]
    axis.set_xticks(shown, names)
    axis.minorticks_off()
    axis.grid(True, lw=0.6)


def set_value_scale(axis: Any, unit: str) -> None:
    """Make the y axis logarithmic, or linear from 0 where the values differ by less than 2x.

    A logarithmic axis would make small differences look large.
    """
    from matplotlib.ticker import LogLocator  # optional: without it there are no plots

    low, high = axis.get_ylim()
    if high / low < 2:
        axis.set(yscale="linear", ylim=(0, 1.1 * high))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,)))
        axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}")
