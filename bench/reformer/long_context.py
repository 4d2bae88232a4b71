"""A training step of whole models against the length, and against the depth: memory and time.

The Reformer runs beside a Transformer of its size (exact attention by torch's fused kernel,
activations stored), until that no longer fits into memory or takes too long. A step is a forward
and a backward, without an optimizer, in a process of its own, whose memory is capped.
`--tokens 1M` runs the Reformer alone, at 6 and at 12 layers. Sizes, heads and the single round of
hashing are those of the Reformer's published half a million tokens.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import options, session
from bench.measure import machine, own_process
from bench.reformer.models import MODELS
from bench.report import files, tables
from bench.report.goals import Goal

LENGTHS, DEPTHS = (1 << 12, 1 << 14, 1 << 16, 1 << 18), (2, 6, 12, 24)
MILLION = 1 << 20
USUAL_DEPTH = 6  # layers, where the length varies
SIZES = {"width": 256, "heads": 2, "head_dim": 64, "hidden": 512, "n_hashes": 1}
MAX_GB, MAX_GROWTH = 16, 1.05  # for a million tokens, and what the depth may add
EXACT = {"auto": "auto", "true": True, "int32": "int32", "false": False}
GIVE_UP_FACTOR = 4  # a step is given up after so many times the patience


@dataclass
class Step:
    """One training step, or why there is none."""

    model: str
    tokens: int
    depth: int
    seconds: float | None = None
    samples: list[float] = field(default_factory=list)  # the seconds are their median
    peak_bytes: int | None = None  # beside the model and its gradients
    before_bytes: int | None = None  # with Python and torch
    loss: float | None = None
    parameters: int | None = None
    note: str = ""

    @property
    def resident_bytes(self) -> int | None:
        """Peak memory of the whole process."""
        return self.peak_bytes and self.peak_bytes + self.before_bytes


def even_numbers(text: str) -> list[int]:
    """Parse numbers of layers, which come in pairs."""
    depths = options.numbers(text)
    if odd := [depth for depth in depths if depth % 2]:
        raise argparse.ArgumentTypeError(f"{odd[0]}: layers come in pairs, local and LSH")
    return depths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bench's options."""
    options.add_compare(parser)
    parser.add_argument(
        "--tokens",
        type=options.numbers,
        help="lengths, such as 16K,1M; from 1M on only the Reformer runs",
    )
    parser.add_argument("--depth", type=even_numbers, help="numbers of layers, such as 6,12")
    for name, value in SIZES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=value, help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument(
        "--exact",
        choices=EXACT,
        default="auto",
        help="exactness of reversible streams; default: %(default)s",
    )
    parser.add_argument(
        "--limit", type=float, default=MAX_GB, help="GB a process may have; default: %(default)s"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=60,
        help="seconds; a step that takes longer is the last of its model; default: %(default)s",
    )


def run(args: argparse.Namespace) -> pathlib.Path:
    """Measure the steps that the options ask for; return the path of the result."""
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    lengths = args.tokens or LENGTHS[: 2 if args.quick else None]
    if (shortest := min(lengths)) >= MILLION:
        depths = args.depth or (USUAL_DEPTH, 12)
        steps = [Step("Reformer", n, depth) for n in lengths for depth in depths]
        return _measure_all(f"long_context-{shortest}", steps, args, patience=None)
    steps = crossed_steps(lengths, args.depth or DEPTHS[: 2 if args.quick else None])
    return _measure_all("long_context", steps, args, args.patience)


def crossed_steps(lengths: Sequence[int], depths: Sequence[int]) -> list[Step]:
    """Return steps of both models: all lengths at one depth, then all depths at one length.

    That length is one in the middle, which both models can do.
    """
    middle = sorted(lengths)[(len(lengths) - 1) // 2]
    by_length = [(n, USUAL_DEPTH) for n in lengths]
    by_depth = [(middle, depth) for depth in depths]
    shapes = dict.fromkeys([*by_length, *by_depth])
    return [Step(model, *shape) for model in MODELS for shape in shapes]


def _measure_all(
    name: str, steps: Sequence[Step], args: argparse.Namespace, patience: float | None
) -> pathlib.Path:
    """Measure steps in turn, and write the result after each; return its path."""
    setup = {key: getattr(args, key) for key in (*SIZES, "dtype", "device")}
    setup["exact"] = EXACT[args.exact]
    conditions, path = machine.describe(args.device), args.out / f"{name}.json"
    header = {"bench": "long_context", "machine": conditions, "flags": args.flags, "setup": setup}
    print(setup, flush=True)
    done: list[Step] = []
    for step in steps:
        step.note = reason_to_skip(step, done, patience) if patience else ""
        if not step.note:
            _measure(step, setup, args.limit, patience and GIVE_UP_FACTOR * patience)
        done.append(step)
        print(table_line(step), file=sys.stderr, flush=True)
        goals = judge(done)
        rows = [asdict(one) for one in done]
        content = {"rows": rows, "goals": [asdict(goal) | {"met": goal.met} for goal in goals]}
        files.write_json(path, header | content)
        files.write_csv(path.with_suffix(".csv"), rows, conditions)
    lines = [table_line(step) for step in done]
    print(tables.table(lines, list(lines[0])) + "\n\n" + tables.goals_table(goals))
    print(f"\n{session.describe_written(path)}")
    return path


def reason_to_skip(step: Step, done: Sequence[Step], patience: float) -> str:
    """Return why a step would be too much, as a smaller one was; empty if none was."""
    smaller = [
        other
        for other in done
        if other.model == step.model and other.tokens <= step.tokens and other.depth <= step.depth
    ]
    if notes := [other.note for other in smaller if other.note]:
        return notes[0]
    is_slow = any((other.seconds or 0) > patience for other in smaller)
    return f"over {patience:g} s" if is_slow else ""


def _measure(step: Step, setup: dict[str, Any], limit: float, seconds: float | None) -> None:
    arguments = {"model": step.model, "tokens": step.tokens, "depth": step.depth, **setup}
    module = "bench.reformer.long_context_step"
    result = own_process.run(module, arguments, setup["device"], limit, seconds)
    for name, value in result.items():
        setattr(step, name, value)


def table_line(step: Step) -> dict[str, str]:
    """Return the cells of a step, by column."""

    def show(value: float | None, form: str, scale: float = 1) -> str:
        return "" if value is None else format(value * scale, form)

    return {
        "model": step.model,
        "tokens": str(step.tokens),
        "layers": str(step.depth),
        "s/step": show(step.seconds, ".1f"),
        "tokens/s": show(step.seconds and step.tokens / step.seconds, ".0f"),
        "peak GB": show(step.peak_bytes, ".2f", 1e-9),
        "all GB": show(step.resident_bytes, ".2f", 1e-9),
        "note": step.note,
    }


def judge(steps: Sequence[Step]) -> list[Goal]:
    """Return the goals: a million tokens fit, and the depth adds no memory."""
    goals, reformers = [], {}
    for step in steps:
        if step.model == "Reformer":
            reformers[step.tokens, step.depth] = step
    for (n, depth), step in reformers.items():
        if n >= MILLION:
            gigabytes = step.resident_bytes and step.resident_bytes / 1e9
            text = f"{n} tokens, {depth} layers: {{:.1f}} GB"
            goals.append(Goal(text, "<=", MAX_GB, gigabytes, step.note))
        shallow = reformers.get((n, USUAL_DEPTH))
        if depth > USUAL_DEPTH and shallow:
            text = f"{n} tokens: peak of {depth} layers {{:.3f}} of that of {USUAL_DEPTH}"
            is_known = step.peak_bytes and shallow.peak_bytes
            ratio = step.peak_bytes / shallow.peak_bytes if is_known else None
            goals.append(Goal(text, "<=", MAX_GROWTH, ratio, step.note or shallow.note))
    return goals
