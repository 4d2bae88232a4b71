"""Plots of what is measured beside times: drift, accuracy, learning, duplication, long contexts."""

from collections.abc import Callable
from typing import Any

from bench.report.plots.style import (
    COLORS,
    INK,
    MUTED,
    SMALL,
    TINY,
    WIDTH,
    color_of,
    new_figure,
    styled,
)
from bench.report.plots.timings import over, scale
from bench.report.record import Record, short

PAIR = ("#e5484d", "#7d8590", "#3b82f6", "#14a38b", "#f5a524")  # pyfast's color, torch's, and more


@styled
def draw(record: Record) -> Any:
    """The figure of a result of this kind, None where there is none."""
    kinds: dict[str, Callable[[Record], Any]] = {
        "accuracy": accuracy,
        "drift": drift,
        "learning": learning,
        "duplication": duplication,
        "long_context": long_context,
    }
    if record.lines and "tokens_per_s" in record.lines[0]:
        return training_steps(record)
    return kinds[record.kind](record) if record.kind in kinds else None


def _pair(heading: str, panels: int = 2, height: float = 3.0) -> tuple[Any, Any]:
    figure = new_figure(height, heading, WIDTH if panels > 1 else 0.66 * WIDTH)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def training_steps(record: Record) -> Any:
    """Bars of whole models, a way of training each: tokens a second, and memory."""
    done = [line for line in record.lines if line.get("tokens_per_s")]
    if not done:
        return None
    figure, axes = _pair(
        f"{record.kind}: training steps of a whole model", height=0.25 * len(done) + 0.9
    )
    for axis, (key, factor, label) in zip(
        axes, (("tokens_per_s", 1, "tokens a second"), ("peak_bytes", 1e-9, "GB"))
    ):
        values = [factor * line[key] for line in done]
        ways = [line["way"] for line in done]
        bars = axis.barh(ways, values, color=[color_of(way) for way in ways], height=0.65)
        axis.bar_label(bars, [short(value) for value in values], fontsize=TINY, padding=3)
        axis.set_title(label, fontweight="bold")
        axis.set(xlim=(0, 1.15 * max(values)), ylim=(len(done) - 0.4, -0.6))
        axis.tick_params(axis="y", length=0)
        axis.grid(True, axis="x", lw=0.6)
    return figure


def accuracy(record: Record) -> Any:
    """What hashes buy, and what they cost."""
    figure, axes = _pair(f"LSH attention beside exact attention, {record.data.get('inputs', '')}")
    hashes, seen, error, ms = ([line[key] for line in record.lines] for key in record.lines[0])
    for axis, x, label in zip(
        axes, (hashes, ms), ("rounds of hashing", "ms, forward and backward")
    ):
        axis.plot(x, seen, "o-", color=PAIR[0], label="% of the softmax seen")
        axis.plot(x, [100 * e for e in error], "o-", color=PAIR[1], label="error of the output, %")
        axis.set(xscale="log", xlabel=label, ylim=(0, None))
        axis.set_xticks(x, [f"{number:.3g}" for number in x])
        axis.minorticks_off()
        axis.grid(True, lw=0.6)
    axes[0].legend()
    return figure


def learning(record: Record) -> Any:
    length = record.data.get("setup", {}).get("length", "")
    figure, (axis,) = _pair(f"Python's documentation, byte by byte, {length} at a time", 1)
    for color, curve in zip(PAIR, record.lines):
        label = f"{curve['model']}, {curve['parameters'] / 1e6:.2f} M parameters, held out: {curve['held_out']:.3f}"
        axis.plot(*zip(*curve["points"]), color=color, lw=1.6, label=label)
        axis.plot([curve["points"][-1][0]], [curve["held_out"]], "o", color=color)
    axis.set(xlabel="step", ylabel="loss, nats a byte", yscale="log")
    axis.set_yticks([1.5, 2, 3, 4, 5], ["1.5", "2", "3", "4", "5"])
    axis.minorticks_off()
    axis.grid(True, lw=0.6)
    axis.legend()
    return figure


def duplication(record: Record) -> Any:
    """Accuracy by what it is read with, a line for each attention that it was trained with."""
    length = record.data.get("setup", {}).get("length", "")
    figure, (axis,) = _pair(
        f"repeating the first half of {length} tokens; dotted: the paper, 1024 tokens", 1
    )
    read = list(dict.fromkeys(line["read"] for line in record.lines))[::-1]
    for color, train in zip(
        PAIR[1:2] + PAIR[:1] + PAIR[2:], dict.fromkeys(line["train"] for line in record.lines)
    ):
        own = {line["read"]: line for line in record.lines if line["train"] == train}
        known = [name for name in read if name in own]
        places = [read.index(name) for name in known]
        axis.plot(
            places,
            [own[name]["accuracy"] for name in known],
            "o-",
            color=color,
            label=f"trained with {train}",
        )
        axis.plot(places, [own[name]["paper"] for name in known], ":", color=color)
    axis.set(xlabel="read with", ylabel="accuracy, %", ylim=(0, 103))
    axis.set_xticks(range(len(read)), read)
    axis.grid(True, lw=0.6)
    axis.legend()
    return figure


def long_context(record: Record) -> Any:
    """Memory and time of a step over tokens and over layers; None where one size alone was measured."""
    done = [line for line in record.lines if line.get("peak_bytes")]
    names = {"tokens": "tokens", "depth": "layers"}
    views = []
    for key, other in (("tokens", "depth"), ("depth", "tokens")):
        fixed = max(
            (line[other] for line in done),
            key=lambda n: sum(one[other] == n for one in done),
            default=None,
        )
        own = [line for line in done if line[other] == fixed]
        if len({line[key] for line in own}) > 1:
            at = f"{fixed} {names[other]}"
            views += [
                (key, own, "peak_bytes", 1e-9, "GB", f"memory, {at}"),
                (key, own, "seconds", 1, "s", f"time, {at}"),
            ]
    if not views:
        return None
    figure, axes = _pair(
        "a training step of a whole model, beside parameters and gradients", len(views)
    )
    models = list(dict.fromkeys(line["model"] for line in done))
    for axis, (key, own, field, factor, unit, title) in zip(axes, views):
        for color, model in zip(PAIR, models):
            points = sorted(
                (line[key], factor * line[field]) for line in own if line["model"] == model
            )
            axis.plot(*zip(*points) if points else ((), ()), "o-", color=color, label=model)
        over(axis, [line[key] for line in own], names[key])
        axis.set_title(title, fontweight="bold")
        scale(axis, unit)
    axes[0].legend()
    return figure


# --- drift ---

ALIKE = 1.5  # times: curves nearer than this are drawn as one
ERRORS = "recovered input", "gradients"

Curve = tuple[tuple[int, float], ...]


def drift(record: Record) -> Any:
    """Error over depth, logarithmic, but for a band of its own for exact zeros."""
    found = [line for line in record.lines if "note" not in line]
    if not found:
        return None
    figure, axes = _pair(
        f"what reversible blocks recover, {record.data.get('inputs', '')}", height=3.4
    )
    nil = min((line[key] for line in found for key in ERRORS if line[key]), default=1e-6) / 50
    for axis, key in zip(axes, ERRORS):
        for number, (curve, names) in enumerate(_curves(found, key).items()):
            exact = not any(error for _, error in curve)
            color = COLORS["pyfast"] if exact else (*PAIR[2:], INK, MUTED)[number % 5]
            depths, errors = zip(*((depth, error or nil) for depth, error in curve))
            axis.plot(depths, errors, "o-", ms=4, lw=2, color=color)
            label = "; ".join(f"{dtype}: {', '.join(impls)}" for dtype, impls in names.items())
            place = (
                {"xytext": (0, 6), "va": "bottom"} if exact else {"xytext": (0, -7), "va": "top"}
            )
            style = {"textcoords": "offset points", "color": color, "fontsize": SMALL - 1}
            axis.annotate(label, (depths[0], errors[0]), **place, **style)
        over(axis, [line["blocks"] for line in found], "blocks")
        axis.axhspan(nil / 3, nil * 5, color=COLORS["pyfast"], alpha=0.08, lw=0)
        axis.set_ylim(nil / 3, 4 * axis.get_ylim()[1])
        ticks = [tick for tick in axis.get_yticks() if nil * 5 < tick < axis.get_ylim()[1]]
        axis.set_yticks([nil, *ticks], ["exactly 0", *(f"{tick:.0e}" for tick in ticks)])
        axis.set_title(f"error of the {key}", fontweight="bold")
    return figure


def _curves(found: list[dict], key: str) -> dict[Curve, dict[str, list[str]]]:
    """Over depth, of those that are alike the first; and whose they are, by dtype."""
    curves: dict[Curve, dict[str, list[str]]] = {}
    for dtype, impl in dict.fromkeys((one["dtype"], one["impl"]) for one in found):
        mine = tuple(
            (one["blocks"], one[key])
            for one in found
            if (one["dtype"], one["impl"]) == (dtype, impl)
        )
        same = next((other for other in curves if _alike(mine, other)), mine)
        curves.setdefault(same, {}).setdefault(dtype, []).append(impl)
    return curves


def _alike(mine: Curve, other: Curve) -> bool:
    pairs = [
        (dict(mine)[depth], dict(other)[depth]) for depth in dict(mine).keys() & dict(other).keys()
    ]
    return all(a == b or max(a, b) < ALIKE * min(a, b) for a, b in pairs)
