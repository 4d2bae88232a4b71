"""How every plot looks, and how it becomes a PNG, or SVG that takes the colors of the page it is in."""

import functools
import html
import io
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

INK, MUTED, GRID = "#1f2328", "#6e7781", "#d0d7de"  # in SVG the page's own
WIDTH, PANELS = 10.0, 3  # inches, and panels a line
SMALL, TINY = 7.5, 6.5

# pyfast is red, its variants and what is half its own warm, torch gray, everybody else cool: in
# every plot.
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
    """An implementation that is not listed has one of its own, the same in every plot."""
    spare = WARM if impl.startswith("pyfast") else SPARE
    return COLORS.get(impl) or spare[zlib.crc32(impl.encode()) % len(spare)]


def order(impl: str) -> tuple[int, str]:
    """pyfast first, then as listed."""
    known = list(COLORS)
    return (known.index(impl) if impl in COLORS else len(known), impl)


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """The style, for as long as a figure is drawn."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        import matplotlib

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
        svg = {
            "svg.fonttype": "none",
            "svg.hashsalt": "pyfast",
            "text.parse_math": False,
            "axes.titlesize": SMALL + 0.5,
        }
        with matplotlib.rc_context(edges | words | sizes | spines | legend | svg):
            return draw(*args, **kwargs)

    return wrapped


def new_figure(height: float, heading: str = "", width: float = WIDTH) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
    return figure


def grid(heights: Sequence[float], heading: str = "", extra: float = 0.4) -> tuple[Any, list[Any]]:
    """A figure of panels as high as they need to be: each stands where its column is the shortest."""
    count = 2 if len(heights) == 4 else min(PANELS, len(heights))
    columns: list[list[int]] = [[] for _ in range(count)]
    tall = [0.0] * count
    for number, height in enumerate(heights):
        shortest = tall.index(min(tall))
        columns[shortest].append(number)
        tall[shortest] += height
    figure = new_figure(max(tall) + extra, heading, WIDTH if count > 1 else WIDTH / 2)
    axes: dict[int, Any] = {}
    for column, own, height in zip(figure.add_gridspec(1, count), columns, tall):
        parts = [heights[number] for number in own]
        if (gap := max(tall) - height) > 0.05:
            parts.append(gap)
        places = list(column.subgridspec(len(parts), 1, height_ratios=parts))
        axes |= {number: figure.add_subplot(place) for number, place in zip(own, places)}
        for place in places[len(own) :]:
            figure.add_subplot(place).set_axis_off()
    return figure, [axes[number] for number in range(len(heights))]


def name(axis: Any, what: str, rest: str) -> None:
    """Above a panel: what it shows, and below that the rest, smaller."""
    axis.set_title(what, fontweight="bold", pad=13)
    small = {
        "color": MUTED,
        "fontsize": TINY,
        "textcoords": "offset points",
        "xycoords": "axes fraction",
    }
    axis.annotate(rest, (0, 1), xytext=(0, 4), **small)


def write(path: pathlib.Path, save: Callable[[pathlib.Path], object]) -> None:
    """All of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        save(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def png(path: pathlib.Path, figure: Any, about: str = "") -> None:
    metadata = {"Software": None, "Comment": about} if about else {"Software": None}
    write(path, lambda draft: figure.savefig(draft, dpi=120, facecolor="white", metadata=metadata))


@styled
def svg(figure: Any, label: str) -> str:
    """For a page: its font, its colors, no size of its own."""
    sheet = io.StringIO()
    figure.savefig(sheet, format="svg", transparent=True, metadata={"Date": None})
    text = sheet.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(
        r' id="[a-zA-Z]+(?:\d*_|\.)[\w.]*\d+"', "", text
    )  # of groups: the same in every figure
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", text)
    size = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(
        r'width="[\d.]+pt"',
        f'style="width:100%;max-width:{1.6 * float(size[1]):.0f}px"',
        text,
        count=1,
    )
    text = re.sub(
        r'height="[\d.]+pt"',
        lambda _: f'role="img" aria-label="{html.escape(label)}"',
        text,
        count=1,
    )
    for drawn, shown in ((INK, "currentColor"), (MUTED, "var(--muted)"), (GRID, "var(--grid)")):
        text = text.replace(drawn, shown)
    text = re.sub(r' (d|x|y|width|height|transform)="[^"]*"', _hundredths, text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _hundredths(attribute: re.Match) -> str:
    """Of a point, and no finer."""
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", attribute[0])
