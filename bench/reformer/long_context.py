"""A training step of whole models against the length, and against the depth: memory and time.

The Reformer beside a Transformer of its size (exact attention by torch's fused kernel, activations
stored), until that no longer fits in memory or takes too long. A step is a forward and a backward,
without an optimizer, in a process of its own, whose memory is capped. `--tokens 1M` is the Reformer
alone, at 6 and at 12 layers. Widths, heads and the single round of hashing are those of the
Reformer's published half a million tokens.
"""

import argparse
import pathlib

from bench import options
from bench.reformer import long_context_runs
from bench.reformer.long_context_runs import USUAL, Step
from bench.report.goals import Goal

LENGTHS, DEPTHS = (1 << 12, 1 << 14, 1 << 16, 1 << 18), (2, 6, 12, 24)
MILLION = 1 << 20
SIZES = {"width": 256, "heads": 2, "head_dim": 64, "hidden": 512, "n_hashes": 1}
LIMIT, FLAT = 16, 1.05  # GB for a million tokens, and what the depth may add
EXACT = {"auto": "auto", "true": True, "int32": "int32", "false": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_compare(parser)
    parser.add_argument(
        "--tokens", type=options.numbers, help="such as 16K,1M; from 1M on, of the Reformer alone"
    )
    parser.add_argument("--depth", type=long_context_runs.pairs, help="layers, such as 6,12")
    for name, value in SIZES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s"
        )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument(
        "--exact", choices=EXACT, default="auto", help="of reversible streams; default: %(default)s"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="GB; default: %(default)s")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds; a longer step is the last of its model"
    )


def run(args: argparse.Namespace) -> pathlib.Path:
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    setup = {name: getattr(args, name) for name in (*SIZES, "dtype", "device")} | {
        "exact": EXACT[args.exact]
    }
    lengths = args.tokens or LENGTHS[: 2 if args.quick else None]
    shortest = min(lengths)
    if shortest >= MILLION:
        steps = [Step("Reformer", n, depth) for n in lengths for depth in args.depth or (USUAL, 12)]
        return long_context_runs.run(f"long_context-{shortest}", steps, setup, args, None, goals)
    steps = long_context_runs.crossed(lengths, args.depth or DEPTHS[: 2 if args.quick else None])
    return long_context_runs.run("long_context", steps, setup, args, args.patience, goals)


def goals(steps: list[Step]) -> list[Goal]:
    """A million tokens fit; memory stays as it is, whatever the depth."""
    found, mine = (
        [],
        {(step.tokens, step.depth): step for step in steps if step.model == "Reformer"},
    )
    for (n, depth), step in mine.items():
        if n >= MILLION:
            text = f"{n} tokens, {depth} layers: {{:.1f}} GB"
            found.append(Goal(text, "<=", LIMIT, step.resident and step.resident / 1e9, step.note))
        shallow = mine.get((n, USUAL))
        if depth > USUAL and shallow:
            text = f"{n} tokens: peak of {depth} layers {{:.3f}} of that of {USUAL}"
            ratio = (
                step.peak_bytes / shallow.peak_bytes
                if step.peak_bytes and shallow.peak_bytes
                else None
            )
            found.append(Goal(text, "<=", FLAT, ratio, step.note or shallow.note))
    return found
