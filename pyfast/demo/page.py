"""The demo's report: one page of HTML that needs no other file.

`facts` is the object in the output's metrics.json; every number comes from there.
"""

from collections.abc import Sequence
from html import escape

from pyfast.demo.report import (
    COLUMNS,
    describe_conditions,
    describe_gain,
    describe_machine,
    draw_charts,
    make_table,
    megabytes,
    percent,
)

_STYLE = """
:root { --ink: #1c2733; --quiet: #64717f; --rule: #e4e9ee; --page: #fff; --tint: #f1f7f6;
  --a: #0f766e; --b: #c2410c; --c: #8794a3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --quiet: #93a1b0; --rule: #28323d; --page: #10161d; --tint: #13232a;
    --a: #2dd4bf; --b: #fb923c; --c: #7d8b9a; }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
main { max-width: 760px; margin: 0 auto; padding: 72px 24px 96px }
h1 { font-size: 2.3rem; line-height: 1.15; letter-spacing: -.025em; margin: 0 0 12px }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 72px 0 4px }
p { margin: 0 0 16px }
.lead { font-size: 1.1rem; color: var(--quiet); max-width: 38em }
small { color: var(--quiet) }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 40px 0 0 }
.figures div { background: var(--tint); border-radius: 12px; padding: 16px 18px }
.figures b { display: block; font-size: 1.65rem; line-height: 1.2; letter-spacing: -.02em;
  color: var(--a) }
.figures span { font-size: .85rem; line-height: 1.35; display: block; color: var(--quiet) }
svg { width: 100%; height: auto; display: block; margin: 12px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin: 12px 0 20px; font-size: .93rem;
  font-variant-numeric: tabular-nums }
th, td { padding: 8px 0 8px 14px; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
td:first-child { font-weight: 600 }
th { font-weight: 500; font-size: .82rem; color: var(--quiet) }
table.words td, table.words th { text-align: left; white-space: normal }
table.words td:first-child { font-weight: 400 }
.tag { color: var(--a); font-weight: 600; white-space: nowrap }
.tag.negative { color: var(--b) }
pre, blockquote { background: var(--tint); border-radius: 10px; padding: 14px 18px; margin: 16px 0;
  overflow-x: auto; font: .86rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
blockquote { border-left: 3px solid var(--b); border-radius: 0 10px 10px 0; white-space: pre-wrap }
footer { margin-top: 80px; padding-top: 18px; border-top: 1px solid var(--rule);
  font-size: .85rem; color: var(--quiet) }
@media (max-width: 620px) {
  .figures { grid-template-columns: 1fr 1fr }
  main { padding-top: 40px }
}
"""


def write_html(facts: dict, out: str) -> str:
    """Return the page.

    Args:
        facts: the measurements.
        out: the output directory, for the command on the page.
    """
    charts = draw_charts(facts)
    sections = [
        _write_head(facts),
        *_write_training(facts, charts),
        *_write_adapters(facts, out),
        *_write_rate(facts, charts),
        *_write_memory(facts, charts),
    ]
    machine = escape(describe_machine(facts))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pyfast demo</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(sections)
        + f"\n<footer>{machine}. All numbers were measured in this run.</footer>"
        "</main></body></html>\n"
    )


def _find_best(facts: dict) -> dict:
    """Return the most accurate of the methods that leave the model's own weights frozen."""
    frozen = [row for row in facts["methods"] if row["method"] not in ("full", "selective")]
    return max(frozen, key=lambda row: (row["accuracy"], -row["trainable"]))


def _write_head(facts: dict) -> str:
    best, full = _find_best(facts), facts["methods"][0]
    deepest, four_bits = facts["depth"][-1], facts["four_bits"]
    memory_ratio = deepest["stored_bytes"] / deepest["reversible_bytes"]
    figures = {
        f"accuracy with {best['method']}; full fine-tuning {percent(full['accuracy'])}": percent(
            best["accuracy"]
        ),
        f"of all parameters are trained by {best['method']}": percent(
            best["trainable"] / best["total"]
        ),
        f"less memory beside the parameters of {deepest['layers']} reversible layers": (
            f"{memory_ratio:.1f}&times;"
        ),
        "smaller weights in 4 bits than in 32": (
            f"{four_bits['dense_bytes'] / four_bits['bytes']:.1f}&times;"
        ),
    }
    tiles = "".join(
        f"<div><b>{value}</b><span>{escape(text)}</span></div>" for text, value in figures.items()
    )
    return (
        "<header><h1>From plain text to a fine-tuned model, on this machine</h1>"
        '<p class="lead">A small transformer learns English from Python\'s own documentation. Then '
        f"it learns to tell praise from complaint, by {len(facts['methods'])} methods of "
        f"fine-tuning. All of it took {facts['seconds']:.0f} seconds.</p></header>"
        f'<section class="figures">{tiles}</section>'
    )


def _write_training(facts: dict, charts: dict[str, str]) -> list[str]:
    pretraining, task = facts["pretraining"], facts["task"]
    return [
        "<h2>Pretraining</h2>",
        f"<p>The model has {pretraining['parameters']:,} parameters and reads "
        f"{pretraining['tokens']:,} tokens of prose, at {pretraining['tokens_per_second']:,.0f} "
        f"tokens per second. In {pretraining['seconds']:.0f} s its loss on held-out text falls "
        f"from {pretraining['untrained_loss']:.2f} to {pretraining['held_out_loss']:.2f}.</p>",
        charts["pretraining"],
        "<h2>Fine-tuning</h2>",
        f"<p>Each method learns from {task['train']} labeled sentences and is judged on "
        f"{task['test']} others. {describe_gain(facts['methods'])}</p>",
        charts["accuracy"],
        f'<div class="scroll">{_write_table(COLUMNS, make_table(facts))}</div>',
        f"<p><small>{escape(describe_conditions(facts))}</small></p>",
    ]


def _write_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    css_class: str = "",
    is_html: bool = False,
) -> str:
    """Return a table; its cells are text, or HTML if `is_html`."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{cell if is_html else escape(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return (
        f'<table class="{css_class}"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'
    )


def _write_adapters(facts: dict, out: str) -> list[str]:
    switching = facts["switching"]
    names = list(switching["tasks"])
    rows, sizes = [], []
    for sentence in switching["sentences"]:
        rows.append([escape(sentence["text"]), *(_write_label(*sentence[name]) for name in names)])
    for name, task in switching["tasks"].items():
        accuracy = percent(task["accuracy"])
        sizes.append(f"{name}: {megabytes(task['bytes'])} MB, accuracy {accuracy}")
    return [
        "<h2>One model, two tasks</h2>",
        f"<p>Two LoRA adapters share the same weights ({escape(', '.join(sizes))}). "
        f"A switch takes {1e3 * switching['switch_seconds']:.2f} ms and copies nothing.</p>",
        _write_table(["", *names], rows, "words", is_html=True),
        f"<pre>python -m pyfast predict --model {escape(out)}/model \\\n"
        f'  --adapter {escape(out)}/sentiment "The soup was cold."</pre>',
    ]


def _write_label(label: str, probability: float) -> str:
    css_class = "tag negative" if label == "negative" else "tag"
    shown = escape(percent(probability, digits=0))
    return f'<span class="{css_class}">{escape(label)}</span> <small>{shown}</small>'


def _write_rate(facts: dict, charts: dict[str, str]) -> list[str]:
    rate = facts["learning_rate"]
    title = "<h2>A learning rate that is too high</h2>"
    if rate["message"] is None:
        text = f"<p>The rate {rate['rate']:g} was tried, and training coped with it.</p>"
        return [title, text, charts["learning_rate"]]
    return [
        title,
        f"<p>The guard stops the training at step {rate['step']}. With the rate "
        f"{rate['good_rate']:g}, the accuracy is {percent(rate['good_accuracy'])}.</p>",
        f"<blockquote>{escape(rate['message'])}</blockquote>",
        charts["learning_rate"],
    ]


def _write_memory(facts: dict, charts: dict[str, str]) -> list[str]:
    deepest, four_bits = facts["depth"][-1], facts["four_bits"]
    is_same = all(row["same_gradients"] for row in facts["depth"])
    gradients = "are the same to the last bit" if is_same else "are not the same"
    time_ratio = deepest["reversible_seconds"] / deepest["stored_seconds"]
    dense_size, size = megabytes(four_bits["dense_bytes"]), megabytes(four_bits["bytes"])
    rows = [("weight", f"{dense_size} MB", f"{size} MB")]
    for row in four_bits["rows"]:
        times = (f"{1e3 * row['dense_seconds']:.2f} ms", f"{1e3 * row['seconds']:.2f} ms")
        rows.append((f"{row['rows']} rows", *times))
    return [
        "<h2>Long texts: LSH attention</h2>",
        f"<p>Forward and backward pass of {facts['heads']} heads. The cost of exact attention "
        "grows with the square of the length.</p>",
        charts["attention_time"],
        charts["attention_memory"],
        "<h2>Deep models: reversible layers</h2>",
        f"<p>Forward and backward pass of a Reformer of {deepest['layers']} layers on "
        f"{deepest['tokens']:,} tokens. Beside the parameters it takes "
        f"{megabytes(deepest['reversible_bytes'])} MB instead of "
        f"{megabytes(deepest['stored_bytes'])} MB, and {time_ratio:.2f} times the time. The "
        f"gradients {gradients}.</p>",
        charts["depth"],
        "<h2>Large weights: 4 bits</h2>",
        f"<p>A linear layer of {four_bits['width']:,} &times; {four_bits['width']:,}, forward. Its "
        f"output differs by {percent(four_bits['error'])} from that in 32 bits.</p>",
        _write_table(("", "32 bits", "4 bits (NF4)"), rows),
    ]
