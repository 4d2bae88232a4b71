"""The demo's report: one page of HTML that needs nothing else. Every number is one of `facts`."""

from collections.abc import Sequence
from html import escape

from pyfast.demo.report import COLUMNS, charts, conditions, gain, machine, megabytes, percent, table

_STYLE = """
:root { --ink: #1c2733; --quiet: #64717f; --rule: #e4e9ee; --page: #fff; --a: #0f766e; --b: #c2410c; --c: #8794a3;
  --tint: #f1f7f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #93a1b0; --rule: #28323d; --page: #10161d;
  --a: #2dd4bf; --b: #fb923c; --c: #7d8b9a; --tint: #13232a; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 ui-sans-serif, system-ui, -apple-system,
  "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 760px; margin: 0 auto; padding: 72px 24px 96px }
h1 { font-size: 2.3rem; line-height: 1.15; letter-spacing: -.025em; margin: 0 0 12px }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 72px 0 4px }
p { margin: 0 0 16px } .lead { font-size: 1.1rem; color: var(--quiet); max-width: 38em }
small { color: var(--quiet) }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 40px 0 0 }
.figures div { background: var(--tint); border-radius: 12px; padding: 16px 18px }
.figures b { display: block; font-size: 1.65rem; line-height: 1.2; letter-spacing: -.02em; color: var(--a) }
.figures span { font-size: .85rem; line-height: 1.35; display: block; color: var(--quiet) }
svg { width: 100%; height: auto; display: block; margin: 12px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; margin: 12px 0 20px; font-size: .93rem;
  font-variant-numeric: tabular-nums }
th, td { padding: 8px 0 8px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 } td:first-child { font-weight: 600 }
th { font-weight: 500; font-size: .82rem; color: var(--quiet) }
table.words td, table.words th { text-align: left; white-space: normal } table.words td:first-child { font-weight: 400 }
.tag { color: var(--a); font-weight: 600; white-space: nowrap } .tag.negative { color: var(--b) }
pre, blockquote { background: var(--tint); border-radius: 10px; padding: 14px 18px; margin: 16px 0; overflow-x: auto;
  font: .86rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
blockquote { border-left: 3px solid var(--b); border-radius: 0 10px 10px 0; white-space: pre-wrap }
footer { margin-top: 80px; padding-top: 18px; border-top: 1px solid var(--rule);
  font-size: .85rem; color: var(--quiet) }
@media (max-width: 620px) { .figures { grid-template-columns: 1fr 1fr } main { padding-top: 40px } }
"""


def html(facts: dict, out: str) -> str:
    """The page; `out` is the directory's name, for commands to copy."""
    drawn = charts(facts)
    parts = [
        _head(facts),
        *_training(facts, drawn),
        *_adapters(facts, out),
        *_rate(facts, drawn),
        *_long(facts, drawn),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>pyfast demo</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(parts)
        + f"\n<footer>{escape(machine(facts))}. All numbers were measured in this run.</footer></main></body></html>\n"
    )


def _best(facts: dict) -> dict:
    """Of the methods that leave the model's own weights alone."""
    frozen = [row for row in facts["methods"] if row["method"] not in ("full", "selective")]
    return max(frozen, key=lambda row: (row["accuracy"], -row["trainable"]))


def _head(facts: dict) -> str:
    best, full = _best(facts), facts["methods"][0]
    deepest, four = facts["depth"][-1], facts["four_bits"]
    figures = [
        (
            percent(best["accuracy"]),
            f"right with {best['method']}; full fine-tuning {percent(full['accuracy'])}",
        ),
        (
            percent(best["trainable"] / best["total"]),
            f"of the parameters trained by {best['method']}",
        ),
        (
            f"{deepest['stored_bytes'] / deepest['reversible_bytes']:.1f}&times;",
            f"less memory for {deepest['layers']} reversible layers",
        ),
        (
            f"{four['dense_bytes'] / four['bytes']:.1f}&times;",
            "smaller weights in 4 bits than in 32",
        ),
    ]
    tiles = "".join(
        f"<div><b>{value}</b><span>{escape(what)}</span></div>" for value, what in figures
    )
    return (
        "<header><h1>From plain text to a fine-tuned model, on this machine</h1>"
        f'<p class="lead">A small transformer learns English from Python\'s own documentation, then to tell '
        f"praise from complaint, in {len(facts['methods'])} ways. In {facts['seconds']:.0f} seconds.</p></header>"
        f'<section class="figures">{tiles}</section>'
    )


def _training(facts: dict, drawn: dict[str, str]) -> list[str]:
    pre, task = facts["pretraining"], facts["task"]
    return [
        "<h2>Pretraining</h2>",
        f"<p>{pre['parameters']:,} parameters, {pre['tokens']:,} tokens of prose, "
        f"{pre['tokens_per_second']:,.0f} tokens/s. "
        f"Held-out loss {pre['held_out_loss']:.2f} after {pre['seconds']:.0f} s, from {pre['untrained_loss']:.2f}.</p>",
        drawn["pretraining"],
        "<h2>Fine-tuning</h2>",
        f"<p>{task['train']} labeled sentences, judged on {task['test']} others. {gain(facts)}</p>",
        drawn["accuracy"],
        f'<div class="scroll">{_table(COLUMNS, table(facts))}</div>',
        f"<p><small>{escape(conditions(facts))}</small></p>",
    ]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", tagged: bool = False
) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{cell if tagged else escape(cell)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'


def _adapters(facts: dict, out: str) -> list[str]:
    found = facts["switching"]
    names = list(found["tasks"])
    rows = [[escape(s["text"]), *(_tag(*s[name]) for name in names)] for s in found["sentences"]]
    sizes = ", ".join(
        f"{name}: {megabytes(t['bytes'])} MB, {percent(t['accuracy'])} right"
        for name, t in found["tasks"].items()
    )
    return [
        "<h2>One model, two tasks</h2>",
        f"<p>Two LoRA adapters over the same weights ({escape(sizes)}). "
        f"A switch takes {1e3 * found['switch_seconds']:.2f} ms and copies nothing.</p>",
        _table(["", *names], rows, "words", tagged=True),
        f"<pre>python -m pyfast predict --model {escape(out)}/model \\\n"
        f'  --adapter {escape(out)}/sentiment "The soup was cold."</pre>',
    ]


def _tag(label: str, probability: float) -> str:
    kind = "tag negative" if label == "negative" else "tag"
    return f'<span class="{kind}">{escape(label)}</span> <small>{100 * probability:.0f} %</small>'


def _rate(facts: dict, drawn: dict[str, str]) -> list[str]:
    rate = facts["learning_rate"]
    if rate["message"] is None:
        return [
            "<h2>A learning rate too high</h2>",
            f"<p>{rate['rate']:g} was tried, and training coped.</p>",
            drawn["learning_rate"],
        ]
    return [
        "<h2>A learning rate too high</h2>",
        f"<p>Caught at step {rate['step']}. With {rate['good_rate']:g} {percent(rate['good_accuracy'])} are right.</p>",
        f"<blockquote>{escape(rate['message'])}</blockquote>",
        drawn["learning_rate"],
    ]


def _long(facts: dict, drawn: dict[str, str]) -> list[str]:
    deepest, four = facts["depth"][-1], facts["four_bits"]
    same = (
        "the same, to the bit"
        if all(row["same_gradients"] for row in facts["depth"])
        else "not the same"
    )
    times = deepest["reversible_seconds"] / deepest["stored_seconds"]
    rows = [
        (f"{r['rows']} rows", f"{1e3 * r['dense_seconds']:.2f} ms", f"{1e3 * r['seconds']:.2f} ms")
        for r in four["rows"]
    ]
    sizes = ("weight", f"{megabytes(four['dense_bytes'])} MB", f"{megabytes(four['bytes'])} MB")
    return [
        "<h2>Long texts: LSH attention</h2>",
        f"<p>Forward and backward, {facts['heads']} heads. Exact attention grows with the square of the length.</p>",
        drawn["attention_time"],
        drawn["attention_memory"],
        "<h2>Deep models: reversible layers</h2>",
        f"<p>A Reformer of {deepest['layers']} layers, {deepest['tokens']:,} tokens, forward and backward: "
        f"{megabytes(deepest['reversible_bytes'])} MB instead of {megabytes(deepest['stored_bytes'])} MB, "
        f"in {times:.2f} times the time. Gradients are {same}.</p>",
        drawn["depth"],
        "<h2>Large weights: 4 bits</h2>",
        f"<p>A linear layer of {four['width']:,} &times; {four['width']:,}; its output is off by "
        f"{percent(four['error'])}.</p>",
        _table(("", "32 bits", "4 bits (NF4)"), [sizes, *rows]),
    ]
