"""The demo's measurements as lines of text, as Markdown and as charts.

`facts` is the object in the output's metrics.json; every number comes from there.
"""

from collections.abc import Sequence

from pyfast.demo.charts import Line, draw_dots, draw_lines, linear_axis, log_axis

COLUMNS = ("method", "trainable", "share", "peak MB", "seconds", "accuracy", "from scratch")
_SMOOTHING = 0.8  # weight of the past in a curve's running mean


# --- numbers ---


def percent(share: float, digits: int = 1) -> str:
    """Return a share in percent; only 0 and 1 themselves are shown as 0 % and 100 %."""
    text, unit = f"{100 * share:.{digits}f}", 10.0**-digits
    if float(text) == 0 and share > 0:
        return f"<{unit:.{digits}f} %"
    if float(text) == 100 and share < 1:
        return f">{100 - unit:.{digits}f} %"
    return f"{text} %"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


# --- text ---


def make_table(facts: dict) -> list[tuple[str, ...]]:
    """Return the comparison of methods as text, with a row for each."""
    return [make_cells(row) for row in facts["methods"]]


def make_cells(row: dict) -> tuple[str, ...]:
    """Return a row of the comparison, in the order of COLUMNS."""
    return (
        row["method"],
        f"{row['trainable']:,}",
        percent(row["trainable"] / row["total"]),
        megabytes(row["peak_bytes"]),
        f"{row['seconds']:.1f}",
        percent(row["accuracy"]),
        percent(row["accuracy_from_scratch"]),
    )


def write_markdown(facts: dict) -> str:
    """Return the comparison as Markdown, with its conditions."""
    alignment = ("---", *["---:"] * (len(COLUMNS) - 1))
    rows = [COLUMNS, alignment, *make_table(facts)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{text}\n\n{describe_conditions(facts)}\n"


def describe_conditions(facts: dict) -> str:
    """Return the sentences that say how the comparison was made."""
    task, pretraining = facts["task"], facts["pretraining"]
    return (
        f"The task is the sentiment of {task['test']} sentences after {task['epochs']:g} epochs "
        f"over {task['train']} labeled ones; guessing gets {percent(task['chance'])}. The model is "
        f"a ModernBERT of {pretraining['parameters']:,} parameters, pretrained for "
        f"{pretraining['seconds']:.0f} s. There is one run of each method, with one seed, and the "
        "learning rates were chosen on the test sentences themselves. Memory is the peak of a "
        "training step: weights, gradients, optimizer and activations. "
        f"{describe_machine(facts)}."
    )


def describe_gain(methods: Sequence[dict]) -> str:
    """Return a sentence on how much pretraining helped."""
    gains = [row["accuracy"] - row["accuracy_from_scratch"] for row in methods]
    better, mean = sum(gain > 0 for gain in gains), 100 * sum(gains) / len(gains)
    return (
        f"Pretraining helps {better} of {len(gains)} methods; "
        f"the accuracy changes by {mean:+.1f} points on average."
    )


def describe_machine(facts: dict) -> str:
    machine = facts["machine"]
    return (
        f"{machine['device']}, torch {machine['torch']}, pyfast {machine['pyfast']}, "
        f"{facts['seconds']:.0f} s in all"
    )


def describe_attention(rows: Sequence[dict]) -> list[str]:
    """Return a table for the terminal: a line for each length, a column for each attention."""
    names = list(dict.fromkeys(row["way"] for row in rows))
    cells = {}
    for row in rows:
        text = f"{1e3 * row['seconds']:,.1f} ms {megabytes(row['bytes'])} MB"
        cells[row["way"], row["length"]] = text
    lines = ["tokens  " + "".join(f"{name:>24}" for name in names)]
    for length in dict.fromkeys(row["length"] for row in rows):
        line = "".join(f"{cells.get((name, length), '-'):>24}" for name in names)
        lines.append(f"{length:<8}{line}")
    return lines


def describe_depth(row: dict) -> str:
    """Return a line for the terminal on a number of layers."""
    costs = {}
    for name in ("stored", "reversible"):
        milliseconds = 1e3 * row[f"{name}_seconds"]
        costs[name] = f"{megabytes(row[f'{name}_bytes'])} MB, {milliseconds:,.0f} ms"
    same = "same gradients" if row["same_gradients"] else "different gradients"
    stored, reversible = costs["stored"], costs["reversible"]
    return f"{row['layers']:2} layers: stored {stored}; reversible {reversible}; {same}"


def describe_four_bits(four_bits: dict) -> str:
    """Return a line for the terminal on a layer in 4 bits."""
    times = []
    for row in four_bits["rows"]:
        milliseconds, dense = 1e3 * row["seconds"], 1e3 * row["dense_seconds"]
        times.append(f"{row['rows']} rows {milliseconds:.2f} ms ({dense:.2f})")
    size, dense = megabytes(four_bits["bytes"]), megabytes(four_bits["dense_bytes"])
    return (
        f"{four_bits['width']} x {four_bits['width']}: {size} MB ({dense} in 32 bits), "
        f"error {percent(four_bits['error'])}, {', '.join(times)}"
    )


# --- charts ---


def draw_charts(facts: dict) -> dict[str, str]:
    """Return each chart as SVG, by name."""
    attention = facts["attention"]
    return {
        "pretraining": _draw_pretraining(facts["pretraining"]),
        "accuracy": _draw_accuracy(facts),
        "learning_rate": _draw_rates(facts["learning_rate"]),
        "attention_time": _draw_attention(attention, "seconds", 1e3, "ms, forward and backward"),
        "attention_memory": _draw_attention(attention, "bytes", 1e-6, "MB"),
        "depth": _draw_depth(facts["depth"]),
    }


def _smooth(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return the running mean of a curve."""
    points, mean, weight = [], 0.0, 0.0
    for step, loss in curve:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        points.append((step, mean / weight))
    return points


def _draw_pretraining(pretraining: dict) -> str:
    curve = [tuple(point) for point in pretraining["curve"]]
    x = linear_axis("step", [step for step, _ in curve], 0)
    y = linear_axis("loss in nats per token", [loss for _, loss in curve])
    lines = [Line("", curve, is_faint=True), Line("training", _smooth(curve))]
    return draw_lines(lines, x, y)


def _draw_accuracy(facts: dict) -> str:
    chance = 100 * facts["task"]["chance"]
    rows, least = [], chance
    for row in facts["methods"]:
        values = [100 * row["accuracy"], 100 * row["accuracy_from_scratch"]]
        rows.append((row["method"], values))
        least = min(least, *values)
    x = linear_axis("accuracy on held-out sentences, %", [100], least)
    return draw_dots(rows, ("pretrained", "from scratch"), x, (chance, "guessing"))


def _draw_rates(rate: dict) -> str:
    title = "too high" if rate["message"] else "tried"
    lines = []
    for name, color, curve, value in (
        (title, "b", rate["curve"], rate["rate"]),
        ("good", "a", rate["good_curve"], rate["good_rate"]),
    ):
        lines.append(Line("", curve, color, is_faint=True))
        lines.append(Line(f"{name}, {value:g}", _smooth(curve), color))
    x = linear_axis("step", [step for line in lines for step, _ in line.points], 0)
    y = linear_axis("loss", [loss for line in lines for _, loss in line.points], 0)
    return draw_lines(lines, x, y)


def _draw_attention(rows: Sequence[dict], key: str, scale: float, label: str) -> str:
    colors = {"LSH": "a", "exact, fused": "c", "exact, whole matrix": "b"}
    lines = []
    for name, color in colors.items():
        points = [(row["length"], row[key] * scale) for row in rows if row["way"] == name]
        if points:
            lines.append(Line(name, points, color, is_marked=True))
    x = log_axis("tokens", [row["length"] for row in rows], 2)
    y = log_axis(label, [row[key] * scale for row in rows], 10)
    return draw_lines(lines, x, y)


def _draw_depth(rows: Sequence[dict]) -> str:
    lines = []
    for name, color in (("stored", "b"), ("reversible", "a")):
        points = [(row["layers"], row[f"{name}_bytes"] / 1e6) for row in rows]
        lines.append(Line(name, points, color, is_marked=True))
    x = linear_axis("layers", [layers for line in lines for layers, _ in line.points], 0)
    sizes = [size for line in lines for _, size in line.points]
    return draw_lines(lines, x, linear_axis("MB beside the parameters", sizes, 0))
