"""The table of measurements in README.md, made from committed results.

`python -m bench readme` writes it between two markers; `--check` only tells whether it is there.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report.files import write_atomically
from bench.report.labels import format_number
from bench.report.markdown import link, table
from bench.report.parser import Parser
from bench.report.record import ROOT, Damaged, read

README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"
BEGIN, END = "<!-- bench:begin -->\n", "<!-- bench:end -->"
CPU, GPU = "cpu-amd-epyc-2c-avx512-avx512-bf16", "cuda-nvidia-h200"
SQUARE = {"shape": "4096x4096", "dtype": "bf16"}
LORA = SQUARE | {"m": 512, "variant": "r=16"}
LSH = {"op": "lsh_attention fwd+bwd", "shape": "4x64", "dtype": "fp32", "m": 16384}
BLOCKS = {"op": "reversible fwd+bwd", "shape": "384x512", "dtype": "fp32", "m": 12}
STEP_8B = {"shape": "8b", "layers": 32, "seq": 512}
MILLION = {"tokens": 1 << 20, "depth": 12}
TIME, SPEED = (("ms_p50", "ms"),), (("tokens_per_s", "tokens/s"),)
SUMS = {"added_mb": ("peak_mb", "held_mb"), "resident_gb": ("peak_bytes", "before_bytes")}
HIGHER_IS_BETTER = {"tokens_per_s"}


@dataclass(frozen=True)
class Entry:
    """A row of the table: which lines of which result it compares, by which figures."""

    label: str
    folder: str
    file: str
    case: Mapping[str, Any]  # what all lines of the entry have in common
    impls: Mapping[str, str]  # from names in the file to names in the table; pyfast's is first
    figures: Sequence[tuple[str, str]] = TIME  # keys and units
    impl_key: str = "impl"


ENTRIES = [
    Entry(
        "CPU: 4-bit (NF4) layer of 4096 x 4096, forward, 1 row",
        *(CPU, "nf4.json", SQUARE | {"op": "linear", "m": 1}),
        {"pyfast": "pyfast", "bnb-train": "bitsandbytes", "torch": "torch, 16 bits"},
    ),
    Entry(
        "CPU: LoRA on a dense layer, forward and backward, 512 rows",
        *(CPU, "lora.json", LORA | {"op": "lora dense fwd+bwd"}),
        {"pyfast": "pyfast", "peft": "PEFT", "peft-16bit": "PEFT with bf16 adapters"},
    ),
    Entry(
        "CPU: DoRA on an NF4 layer, forward and backward, 512 rows",
        *(CPU, "lora.json", LORA | {"op": "dora nf4 fwd+bwd"}),
        {"pyfast": "pyfast", "peft-bnb": "PEFT", "peft-bnb-16bit": "PEFT with bf16 adapters"},
    ),
    Entry(
        "CPU: LSH attention, 16,384 tokens, 4 rounds, forward and backward",
        *(CPU, "lsh_attention.json", LSH | {"variant": "r=4"}),
        {"pyfast": "pyfast", "hf": "transformers", "sdpa": "exact attention in torch"},
    ),
    Entry(
        "CPU: training step of 12 reversible blocks: memory of activations, time",
        *(CPU, "reversible.json", BLOCKS),
        {"pyfast": "pyfast", "torch": "stored activations", "checkpoint": "checkpointing"},
        (("added_mb", "MB"), ("ms_p50", "ms")),
    ),
    Entry(
        "CPU: training step of a 12-layer Reformer on 1,048,576 tokens: memory of the process",
        *(CPU, "long_context-1048576.json", MILLION),
        {"Reformer": "pyfast"},
        (("resident_gb", "GB"),),
        "model",
    ),
    Entry(
        "H200: 4-bit (NF4) layer of 14336 x 4096, forward, 16 rows",
        *(GPU, "nf4.json", SQUARE | {"shape": "14336x4096", "op": "linear", "m": 16}),
        {"pyfast": "pyfast", "bnb-train": "bitsandbytes", "torch": "torch, 16 bits"},
    ),
    Entry(
        "H200: whole training step of Llama 3 8B with LoRA, 512 tokens",
        *(GPU, "training_step.json", STEP_8B),
        {"pyfast": "pyfast", "peft": "PEFT"},
        SPEED,
        "way",
    ),
]


def make_table(entries: Sequence[Entry] = ENTRIES, results: pathlib.Path = RESULTS) -> str:
    """Return the Markdown table; the best figures of a row are bold, unmeasured ones "-"."""
    head = ("measured", "pyfast", "others", "record")
    return table(head, [_cells(entry, results) for entry in entries])


def _cells(entry: Entry, results: pathlib.Path) -> list[str]:
    path = results / entry.folder / entry.file
    texts = dict.fromkeys(entry.impls.values(), "")
    is_slower = False
    for key, unit in entry.figures:
        values = [_read_figure(path, entry, impl, key) for impl in entry.impls]
        best = _best(values, key)
        if best is not None and len(entry.figures) == 1:
            is_slower = best == values[1] != values[0]
        for name, value in zip(texts, values):
            figure = "-" if value is None else f"{format_number(value)} {unit}"
            figure = f"**{figure}**" if best is not None and value == best else figure
            texts[name] += f", {figure}" if texts[name] else figure
    pyfast, *peers = texts.items()
    beside = "; ".join(f"{name} {text}" for name, text in peers)
    pyfast_text = pyfast[1] + (": slower" if is_slower else "")
    return [entry.label, pyfast_text, beside or "-", link("record", path, results.parents[1])]


def _best(values: Sequence[float | None], key: str) -> float | None:
    """Return the best of the measured values, or None unless there are two to compare."""
    measured = [value for value in values if value is not None]
    if len(measured) < 2:
        return None
    return max(measured) if key in HIGHER_IS_BETTER else min(measured)


def _read_figure(path: pathlib.Path, entry: Entry, impl: str, key: str) -> float | None:
    """Return a figure of one row of the file, or None where the row has null for it."""
    expected = {**entry.case, entry.impl_key: impl}
    lines = [
        line
        for line in read(path).lines
        if all(line.get(name) == value for name, value in expected.items())
    ]
    if len(lines) != 1:
        raise Damaged(f"{path}: {len(lines)} rows with {expected}, where one is wanted")
    (line,) = lines
    parts = SUMS.get(key, (key,))
    try:
        if any(line[part] is None for part in parts):
            return None
        if key == "added_mb":
            return line["peak_mb"] - line["held_mb"]
        if key == "resident_gb":
            return (line["peak_bytes"] + line["before_bytes"]) / 1e9
        return float(line[key])
    except (KeyError, TypeError):
        raise Damaged(f"{path}: the row with {expected} has no {key}") from None


def rewrite(text: str, content: str) -> str:
    """Return the README's text with the content between its markers."""
    if text.count(BEGIN) > 1 or text.count(END) > 1:
        raise Damaged(f"README.md: {BEGIN.strip()} and {END} may be there only once")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Damaged(f"README.md: there is no {BEGIN.strip()} that {END} follows")
    return f"{before}{begin}{content}\n{end}{after}"


def main(words: Sequence[str] | None = None) -> int:
    """Run `python -m bench readme`; with --check return 1 where the README differs."""
    parser = Parser("python -m bench readme", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if README.md would change"
    )
    args = parser.parse_args(words)
    try:
        before = README.read_text()
        after = rewrite(before, make_table())
    except Damaged as error:
        print(f"bench readme: {error}", file=sys.stderr)
        return 2
    if args.check:
        return int(before != after)
    write_atomically(README, lambda draft: draft.write_text(after))
    print(f"written: {README}")
    return 0
