"""What the demo measured, as lines of text, as Markdown and as charts. Every number is one of `facts`."""

from collections.abc import Sequence

from pyfast.demo.charts import Line, dots, linear, lines, powers

COLUMNS = ("method", "trainable", "share", "peak MB", "seconds", "accuracy", "from scratch")
_SMOOTH = 0.8  # of a curve's running mean


def table(facts: dict) -> list[tuple[str, ...]]:
    """The comparison of methods, a row for each, as text."""
    return [cells(row) for row in facts["methods"]]


def cells(row: dict) -> tuple[str, ...]:
    """A row of it, in the order of COLUMNS."""
    return (
        row["method"],
        f"{row['trainable']:,}",
        percent(row["trainable"] / row["total"]),
        megabytes(row["peak_bytes"]),
        f"{row['seconds']:.1f}",
        percent(row["accuracy"]),
        percent(row["accuracy_from_scratch"]),
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def markdown(facts: dict) -> str:
    """The table, and how it was made."""
    rows = [COLUMNS, tuple("---" if i == 0 else "---:" for i in range(len(COLUMNS))), *table(facts)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{text}\n\n{conditions(facts)}\n"


def conditions(facts: dict) -> str:
    task, pre = facts["task"], facts["pretraining"]
    return (
        f"Sentiment of {task['test']} sentences after {task['train']} labeled ones, {task['epochs']:g} epochs, "
        f"by a ModernBERT of {pre['parameters']:,} parameters, pretrained for {pre['seconds']:.0f} s; a guess gets "
        f"{percent(task['chance'])}. One seed; the learning rates had been chosen on these very sentences. "
        f"Memory: weights, gradients, optimizer and activations of a step. {machine(facts)}."
    )


def gain(facts: dict) -> str:
    """What pretraining was good for."""
    gains = [row["accuracy"] - row["accuracy_from_scratch"] for row in facts["methods"]]
    better = sum(gain > 0 for gain in gains)
    mean = 100 * sum(gains) / len(gains)
    return f"Pretrained is better than from scratch in {better} of {len(gains)} ways, by {mean:+.1f} points on average."


def machine(facts: dict) -> str:
    m = facts["machine"]
    return (
        f"{m['device']}, torch {m['torch']}, pyfast {m['pyfast']}, {facts['seconds']:.0f} s in all"
    )


def attention_lines(rows: Sequence[dict]) -> list[str]:
    """For the terminal, a line for each length."""
    ways = dict.fromkeys(row["way"] for row in rows)
    found = {
        (r["way"], r["length"]): f"{1e3 * r['seconds']:,.1f} ms {megabytes(r['bytes'])} MB"
        for r in rows
    }
    head = f"{'tokens':8}" + "".join(f"{way:>24}" for way in ways)
    lengths = dict.fromkeys(row["length"] for row in rows)
    return [
        head,
        *(f"{n:<8}" + "".join(f"{found.get((way, n), '-'):>24}" for way in ways) for n in lengths),
    ]


def depth_line(row: dict) -> str:
    """For the terminal."""
    stored, again = (
        f"{megabytes(row[f'{kind}_bytes'])} MB, {1e3 * row[f'{kind}_seconds']:,.0f} ms"
        for kind in ("stored", "reversible")
    )
    same = "same gradients" if row["same_gradients"] else "other gradients"
    return f"{row['layers']:2} layers: stored {stored}; reversible {again}; {same}"


def four_bits_line(four: dict) -> str:
    """For the terminal."""
    times = ", ".join(
        f"{r['rows']} rows {1e3 * r['seconds']:.2f} ms ({1e3 * r['dense_seconds']:.2f})"
        for r in four["rows"]
    )
    sizes = f"{megabytes(four['bytes'])} MB ({megabytes(four['dense_bytes'])} in 32 bits)"
    return f"{four['width']} x {four['width']}: {sizes}, error {percent(four['error'])}, {times}"


# --- charts ---


def charts(facts: dict) -> dict[str, str]:
    """By name, SVG."""
    return {
        "pretraining": _pretraining(facts["pretraining"]),
        "accuracy": _accuracy(facts),
        "learning_rate": _rates(facts["learning_rate"]),
        "attention_time": _attention(
            facts["attention"], "seconds", 1e3, "ms, forward and backward"
        ),
        "attention_memory": _attention(facts["attention"], "bytes", 1e-6, "MB"),
        "depth": _depth(facts["depth"]),
    }


def _smoothed(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    points, mean, weight = [], 0.0, 0.0
    for step, loss in curve:
        mean, weight = _SMOOTH * mean + (1 - _SMOOTH) * loss, _SMOOTH * weight + (1 - _SMOOTH)
        points.append((step, mean / weight))
    return points


def _pretraining(pre: dict) -> str:
    curve = [tuple(point) for point in pre["curve"]]
    x, y = (
        linear("step", [s for s, _ in curve], 0),
        linear("loss, nats a token", [loss for _, loss in curve]),
    )
    return lines([Line("", curve, faint=True), Line("training", _smoothed(curve))], x, y)


def _accuracy(facts: dict) -> str:
    rows = [(r["method"], (r["accuracy"], r["accuracy_from_scratch"])) for r in facts["methods"]]
    least = min(facts["task"]["chance"], *(value for _, values in rows for value in values))
    shares = linear("accuracy on held-out sentences, %", [100], 100 * least)
    scaled = [(name, [100 * value for value in values]) for name, values in rows]
    return dots(
        scaled, ("pretrained", "from scratch"), shares, (100 * facts["task"]["chance"], "guessing")
    )


def _rates(rate: dict) -> str:
    found = [("too high" if rate["message"] else "tried", "b", rate["curve"], rate["rate"])]
    found.append(("good", "a", rate["good_curve"], rate["good_rate"]))
    given = []
    for name, color, curve, value in found:
        given += [
            Line("", curve, color, faint=True),
            Line(f"{name}, {value:g}", _smoothed(curve), color),
        ]
    points = [point for line in given for point in line.points]
    return lines(
        given, linear("step", [s for s, _ in points], 0), linear("loss", [v for _, v in points], 0)
    )


def _attention(rows: Sequence[dict], key: str, scale: float, label: str) -> str:
    colors = {"LSH": "a", "exact, fused": "c", "exact, whole matrix": "b"}
    given = []
    for way, color in colors.items():
        points = [(r["length"], r[key] * scale) for r in rows if r["way"] == way]
        given += [Line(way, points, color, marked=True)] * bool(points)
    x = powers("tokens", [r["length"] for r in rows], 2)
    return lines(given, x, powers(label, [r[key] * scale for r in rows], 10))


def _depth(rows: Sequence[dict]) -> str:
    given = [
        Line(name, [(r["layers"], r[f"{name}_bytes"] / 1e6) for r in rows], color, marked=True)
        for name, color in (("stored", "b"), ("reversible", "a"))
    ]
    points = [point for line in given for point in line.points]
    return lines(
        given,
        linear("layers", [x for x, _ in points], 0),
        linear("MB beside parameters", [y for _, y in points], 0),
    )
