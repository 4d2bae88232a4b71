"""Plots of results that are no timings: drift, accuracy, learning, duplication, long contexts."""

from collections.abc import Callable
from typing import Any

from bench.report.labels import format_number
from bench.report.plots.style import (
    COLORS,
    FIGURE_INCHES,
    INK,
    MUTED,
    SMALL,
    TINY,
    color_of,
    new_figure,
    set_log_axes,
    set_value_scale,
    styled,
)
from bench.report.record import Record

LINE_COLORS = ("#e5484d", "#7d8590", "#3b82f6", "#14a38b", "#f5a524")  # pyfast's, torch's, others


@styled
def draw_curves(record: Record) -> Any:
    """Draw the figure of a result by its subject; None where there is no figure."""
    draw_by_subject: dict[str, Callable[[Record], Any]] = {
        "accuracy": _draw_accuracy,
        "drift": _draw_drift,
        "learning": _draw_learning,
        "duplication": _draw_duplication,
        "long_context": _draw_long_context,
    }
    if record.lines and "tokens_per_s" in record.lines[0]:
        return _draw_training_steps(record)
    draw = draw_by_subject.get(record.subject)
    return draw(record) if draw else None


def _new_panels(heading: str, panels: int = 2, height: float = 3.0) -> tuple[Any, Any]:
    inches = FIGURE_INCHES if panels > 1 else 0.66 * FIGURE_INCHES
    figure = new_figure(height, heading, inches)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _draw_training_steps(record: Record) -> Any:
    """Draw bars of training a whole model, one for each method: tokens a second, and memory."""
    done = [line for line in record.lines if line.get("tokens_per_s")]
    if not done:
        return None
    height = 0.25 * len(done) + 0.9
    heading = f"{record.subject}: training steps of a whole model"
    figure, axes = _new_panels(heading, height=height)
    methods = [line["way"] for line in done]
    views = (("tokens_per_s", 1, "tokens a second"), ("peak_bytes", 1e-9, "GB"))
    for axis, (key, factor, label) in zip(axes, views):
        values = [factor * line[key] for line in done]
        bars = axis.barh(methods, values, color=list(map(color_of, methods)), height=0.65)
        axis.bar_label(bars, list(map(format_number, values)), fontsize=TINY, padding=3)
        axis.set_title(label, fontweight="bold")
        axis.set(xlim=(0, 1.15 * max(values)), ylim=(len(done) - 0.4, -0.6))
        axis.tick_params(axis="y", length=0)
        axis.grid(True, axis="x", lw=0.6)
    return figure


def _draw_accuracy(record: Record) -> Any:
    """Draw the share of the softmax and the error over rounds of hashing, and over their time."""
    inputs = record.data.get("inputs", "")
    figure, axes = _new_panels(f"LSH attention beside exact attention, {inputs}")
    hashes, seen, error, ms = ([line[key] for line in record.lines] for key in record.lines[0])
    views = ((hashes, "rounds of hashing"), (ms, "ms, forward and backward"))
    for axis, (x, label) in zip(axes, views):
        axis.plot(x, seen, "o-", color=LINE_COLORS[0], label="% of the softmax seen")
        percent = [100 * e for e in error]
        axis.plot(x, percent, "o-", color=LINE_COLORS[1], label="error of the output, %")
        axis.set(xscale="log", xlabel=label, ylim=(0, None))
        axis.set_xticks(x, [f"{number:.3g}" for number in x])
        axis.minorticks_off()
        axis.grid(True, lw=0.6)
    axes[0].legend()
    return figure


def _draw_learning(record: Record) -> Any:
    """Draw the training losses of both models, and a dot for the held-out loss."""
    length = record.data.get("setup", {}).get("length", "")
    figure, (axis,) = _new_panels(f"Python's documentation, byte by byte, {length} at a time", 1)
    for color, curve in zip(LINE_COLORS, record.lines):
        size, held_out = curve["parameters"] / 1e6, curve["held_out"]
        label = f"{curve['model']}, {size:.2f} M parameters, held out: {held_out:.3f}"
        axis.plot(*zip(*curve["points"]), color=color, lw=1.6, label=label)
        axis.plot([curve["points"][-1][0]], [held_out], "o", color=color)
    axis.set(xlabel="step", ylabel="loss, nats a byte", yscale="log")
    axis.set_yticks([1.5, 2, 3, 4, 5], ["1.5", "2", "3", "4", "5"])
    axis.minorticks_off()
    axis.grid(True, lw=0.6)
    axis.legend()
    return figure


def _draw_duplication(record: Record) -> Any:
    """Draw accuracy by the attention of reading, a line for each attention of training."""
    length = record.data.get("setup", {}).get("length", "")
    heading = f"repeating the first half of {length} tokens; dotted: the paper, 1024 tokens"
    figure, (axis,) = _new_panels(heading, 1)
    reads = list(dict.fromkeys(line["read"] for line in record.lines))[::-1]
    trained = dict.fromkeys(line["train"] for line in record.lines)
    colors = LINE_COLORS[1:2] + LINE_COLORS[:1] + LINE_COLORS[2:]
    for color, train in zip(colors, trained):
        by_read = {line["read"]: line for line in record.lines if line["train"] == train}
        known = [name for name in reads if name in by_read]
        places = [reads.index(name) for name in known]
        accuracy = [by_read[name]["accuracy"] for name in known]
        axis.plot(places, accuracy, "o-", color=color, label=f"trained with {train}")
        axis.plot(places, [by_read[name]["paper"] for name in known], ":", color=color)
    axis.set(xlabel="read with", ylabel="accuracy, %", ylim=(0, 103))
    axis.set_xticks(range(len(reads)), reads)
    axis.grid(True, lw=0.6)
    axis.legend()
    return figure


# --- long contexts ---


def _draw_long_context(record: Record) -> Any:
    """Draw memory and time of a step over tokens and layers; None for a single size."""
    done = [line for line in record.lines if line.get("peak_bytes")]
    views = _long_context_views(done)
    if not views:
        return None
    heading = "a training step of a whole model, beside parameters and gradients"
    figure, axes = _new_panels(heading, len(views))
    models = list(dict.fromkeys(line["model"] for line in done))
    for axis, (key, lines, field, factor, unit, title) in zip(axes, views):
        for color, model in zip(LINE_COLORS, models):
            chosen = [line for line in lines if line["model"] == model]
            points = sorted((line[key], factor * line[field]) for line in chosen)
            axis.plot(*zip(*points) if points else ((), ()), "o-", color=color, label=model)
        label = {"tokens": "tokens", "depth": "layers"}[key]
        set_log_axes(axis, [line[key] for line in lines], label)
        axis.set_title(title, fontweight="bold")
        set_value_scale(axis, unit)
    axes[0].legend()
    return figure


def _long_context_views(done: list[dict]) -> list[tuple]:
    """Return each panel: tokens at the commonest depth, then depths at the commonest tokens."""
    views = []
    for key, other, unit in (("tokens", "depth", "layers"), ("depth", "tokens", "tokens")):
        values = [line[other] for line in done]
        fixed = max(values, key=values.count, default=None)
        lines = [line for line in done if line[other] == fixed]
        if len({line[key] for line in lines}) > 1:
            at = f"{fixed} {unit}"
            views += [
                (key, lines, "peak_bytes", 1e-9, "GB", f"memory, {at}"),
                (key, lines, "seconds", 1, "s", f"time, {at}"),
            ]
    return views


# --- drift ---

ALIKE_RATIO = 1.5  # curves nearer than this are drawn as one
ERRORS = "recovered input", "gradients"

Curve = tuple[tuple[int, float], ...]


def _draw_drift(record: Record) -> Any:
    """Draw errors over depth on a logarithmic axis, with a band of its own for exact zeros."""
    lines = [line for line in record.lines if "note" not in line]
    if not lines:
        return None
    heading = f"what reversible blocks recover, {record.data.get('inputs', '')}"
    figure, axes = _new_panels(heading, height=3.4)
    errors = [line[key] for line in lines for key in ERRORS if line[key]]
    zero = min(errors, default=1e-6) / 50  # where exact zeros are drawn
    for axis, key in zip(axes, ERRORS):
        for number, (curve, names) in enumerate(_distinct_curves(lines, key).items()):
            _draw_drift_curve(axis, curve, names, number, zero)
        set_log_axes(axis, [line["blocks"] for line in lines], "blocks")
        axis.axhspan(zero / 3, zero * 5, color=COLORS["pyfast"], alpha=0.08, lw=0)
        axis.set_ylim(zero / 3, 4 * axis.get_ylim()[1])
        ticks = [tick for tick in axis.get_yticks() if zero * 5 < tick < axis.get_ylim()[1]]
        axis.set_yticks([zero, *ticks], ["exactly 0", *(f"{tick:.0e}" for tick in ticks)])
        axis.set_title(f"error of the {key}", fontweight="bold")
    return figure


def _draw_drift_curve(
    axis: Any, curve: Curve, names: dict[str, list[str]], number: int, zero: float
) -> None:
    is_exact = not any(error for _, error in curve)
    colors = (*LINE_COLORS[2:], INK, MUTED)
    color = COLORS["pyfast"] if is_exact else colors[number % len(colors)]
    depths, errors = zip(*((depth, error or zero) for depth, error in curve))
    axis.plot(depths, errors, "o-", ms=4, lw=2, color=color)
    label = "; ".join(f"{dtype}: {', '.join(impls)}" for dtype, impls in names.items())
    place = {"xytext": (0, 6), "va": "bottom"} if is_exact else {"xytext": (0, -7), "va": "top"}
    style = {"textcoords": "offset points", "color": color, "fontsize": SMALL - 1}
    axis.annotate(label, (depths[0], errors[0]), **place, **style)


def _distinct_curves(lines: list[dict], key: str) -> dict[Curve, dict[str, list[str]]]:
    """Return the first of each set of alike curves, with their implementations by dtype."""
    curves: dict[Curve, dict[str, list[str]]] = {}
    for dtype, impl in dict.fromkeys((line["dtype"], line["impl"]) for line in lines):
        curve = tuple(
            (line["blocks"], line[key])
            for line in lines
            if (line["dtype"], line["impl"]) == (dtype, impl)
        )
        same = next((other for other in curves if _are_alike(curve, other)), curve)
        curves.setdefault(same, {}).setdefault(dtype, []).append(impl)
    return curves


def _are_alike(curve: Curve, other: Curve) -> bool:
    a, b = dict(curve), dict(other)
    pairs = [(a[depth], b[depth]) for depth in a.keys() & b.keys()]
    return all(x == y or max(x, y) < ALIKE_RATIO * min(x, y) for x, y in pairs)
