"""A training step of whole models against the length, and against the depth: memory and time.

The Reformer beside a Transformer of its size (exact attention by torch's fused kernel, activations stored), until that
no longer fits in memory or takes too long. A step is a forward and a backward, without an optimizer, in a process of
its own, whose memory is capped. `--tokens 1M` is the Reformer alone, at 6 and at 12 layers. Widths, heads and the
single round of hashing are those of the Reformer's published half a million tokens.
"""

import argparse
import sys
from dataclasses import asdict, dataclass

from bench import machine, own_process, report, session
from bench.goals import Goal
from bench.reformer_problem import MODELS

LENGTHS, DEPTHS = (1 << 12, 1 << 14, 1 << 16, 1 << 18), (2, 6, 12, 24)
MILLION = 1 << 20
SIZES = ("width", "heads", "head_dim", "hidden", "n_hashes")
LIMIT, FLAT = 16e9, 1.05
EXACT = {"auto": "auto", "true": True, "int32": "int32", "false": False}
LATE = 4  # times the patience: a step is given up


@dataclass
class Step:
    """One training step, or why there is none."""

    model: str
    tokens: int
    depth: int
    seconds: float | None = None
    peak_bytes: int | None = None  # beside the model and its gradients
    before_bytes: int | None = None  # with Python and torch
    loss: float | None = None
    parameters: int | None = None
    note: str = ""

    @property
    def resident(self) -> int | None:
        return self.peak_bytes and self.peak_bytes + self.before_bytes


def tokens(word: str) -> int:
    """16384, 16K or 1M."""
    factor = {"K": 1 << 10, "M": 1 << 20}.get(word[-1:].upper())
    return int(word[:-1]) * factor if factor else int(word)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", help="lengths, such as 16K,1M; from 1M on, of the Reformer alone")
    parser.add_argument("--depth", help="layers, such as 6,12")
    for name, value in zip(SIZES, (256, 2, 64, 512, 1)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16")
    parser.add_argument("--exact", choices=EXACT, default="auto", help="of reversible streams; default: %(default)s")
    parser.add_argument("--limit", type=float, default=LIMIT / 1e9, help="GB; default: %(default)s")
    parser.add_argument("--patience", type=float, default=60, help="seconds; a longer step is the last of its model")


def run(args: argparse.Namespace) -> None:
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    about = machine.describe(args.device)
    setup = {name: getattr(args, name) for name in (*SIZES, "dtype", "device")} | {"exact": EXACT[args.exact]}
    print(setup, flush=True)
    lengths = [tokens(word) for word in args.tokens.split(",")] if args.tokens else LENGTHS[: 2 if args.quick else None]
    depths = [int(word) for word in args.depth.split(",")] if args.depth else DEPTHS[: 2 if args.quick else None]
    if odd := [depth for depth in depths if depth < 2 or depth % 2]:
        raise SystemExit(f"--depth {odd[0]}: layers come in pairs, local and LSH")
    million = min(lengths) >= MILLION
    kind = f"-{min(lengths)}" if million else ""
    stem = args.out / f"long_context{kind}"
    steps: list[Step] = []
    for step in plan(lengths, depths, args.depth, million):
        if million or not beyond(steps, step, args.patience):
            measure(step, setup, args.limit, None if million else LATE * args.patience)
        steps.append(step)
        print(line(step), file=sys.stderr, flush=True)
        goals = goals_of(steps)
        found = {"bench": "long_context", "machine": about, "setup": setup, "rows": [asdict(step) for step in steps]}
        found["goals"] = [asdict(goal) | {"met": goal.met} for goal in goals]
        report.write_json(stem.with_name(stem.name + ".json"), found)
        report.write_csv(stem.with_name(stem.name + ".csv"), steps, about)
    lines = [line(step) for step in steps]
    print(report.table(lines, list(lines[0])))
    plots = session.plot(stem.with_name(stem.name + ".json"))
    print("\n" + report.goals_block(goals) + f"\n\nwritten: {', '.join([f'{stem}.json', '.csv', *plots])}")


def plan(lengths, depths, given_depths, million: bool) -> list[Step]:
    """Lengths at 6 layers, then depths at a length that both models can do; a million tokens at 6 and 12."""
    if million:
        return [Step("Reformer", n, depth) for n in lengths for depth in (depths if given_depths else (6, 12))]
    middle = sorted(lengths)[(len(lengths) - 1) // 2]
    shapes = dict.fromkeys([*((n, 6) for n in lengths), *((middle, depth) for depth in depths)])
    return [Step(model, *shape) for model in MODELS for shape in shapes]


def beyond(steps: list[Step], step: Step, patience: float) -> bool:
    """Whether a smaller one was too much already."""
    for other in steps:
        smaller = other.model == step.model and other.tokens <= step.tokens and other.depth <= step.depth
        if smaller and other.note:
            step.note = other.note
        elif smaller and (other.seconds or 0) > patience:
            step.note = f"over {patience:g} s"
    return bool(step.note)


def measure(step: Step, setup: dict, limit: float, seconds: float | None) -> None:
    words = {"model": step.model, "tokens": step.tokens, "depth": step.depth, **setup}
    for name, value in own_process.run("bench.long_context_step", words, setup["device"], limit, seconds).items():
        setattr(step, name, value)


def line(step: Step) -> dict[str, str]:
    def show(value, form: str, scale: float = 1) -> str:
        return "" if value is None else form.format(value * scale)

    return {
        "model": step.model,
        "tokens": str(step.tokens),
        "layers": str(step.depth),
        "s/step": show(step.seconds, "{:.1f}"),
        "tokens/s": "" if not step.seconds else f"{step.tokens / step.seconds:.0f}",
        "peak GB": show(step.peak_bytes, "{:.2f}", 1e-9),
        "all GB": show(step.resident, "{:.2f}", 1e-9),
        "note": step.note,
    }


def goals_of(steps: list[Step]) -> list[Goal]:
    found = []
    by_shape = {(s.tokens, s.depth): s for s in steps if s.model == "Reformer"}
    for (n, depth), step in by_shape.items():
        if n >= MILLION:
            name = f"{n} tokens, {depth} layers: {{:.1f}} GB"
            found.append(Goal(name, "<=", LIMIT / 1e9, step.resident and step.resident / 1e9, step.note))
        shallow = by_shape.get((n, 6))
        if depth > 6 and shallow:
            both = shallow.peak_bytes and step.peak_bytes
            text = f"{n} tokens: peak of {depth} layers {{:.3f}} of that of 6"
            value = step.peak_bytes / shallow.peak_bytes if both else None
            found.append(Goal(text, "<=", FLAT, value, step.note or shallow.note))
    return found
