"""Training steps of a Reformer, and of a Transformer of its size, of any length and depth.

Each in a process of its own, whose memory is capped; what would take more than a smaller one that
was too much is not run.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import session
from bench.measure import machine, own_process
from bench.options import numbers
from bench.reformer.models import MODELS
from bench.report import tables
from bench.report.goals import Goal

USUAL = 6  # layers, where not they are varied
LATE = 4  # times the patience: a step is given up


@dataclass
class Step:
    """One training step, or why there is none."""

    model: str
    tokens: int
    depth: int
    seconds: float | None = None
    samples: list[float] = field(default_factory=list)  # that the seconds are the median of
    peak_bytes: int | None = None  # beside the model and its gradients
    before_bytes: int | None = None  # with Python and torch
    loss: float | None = None
    parameters: int | None = None
    note: str = ""

    @property
    def resident(self) -> int | None:
        return self.peak_bytes and self.peak_bytes + self.before_bytes


def pairs(text: str) -> list[int]:
    """Of layers."""
    found = numbers(text)
    if odd := [depth for depth in found if depth % 2]:
        raise argparse.ArgumentTypeError(f"{odd[0]}: layers come in pairs, local and LSH")
    return found


def crossed(lengths: Sequence[int], depths: Sequence[int]) -> list[Step]:
    """Of both models: lengths at the usual depth, then depths at a length that both can do."""
    middle = sorted(lengths)[(len(lengths) - 1) // 2]
    shapes = dict.fromkeys([*((n, USUAL) for n in lengths), *((middle, depth) for depth in depths)])
    return [Step(model, *shape) for model in MODELS for shape in shapes]


def beyond(step: Step, done: Sequence[Step], patience: float) -> str:
    """Why it would be too much: a smaller one was already."""
    smaller = [
        s
        for s in done
        if s.model == step.model and s.tokens <= step.tokens and s.depth <= step.depth
    ]
    slow = any((other.seconds or 0) > patience for other in smaller)
    return next(
        (other.note for other in smaller if other.note), f"over {patience:g} s" if slow else ""
    )


def run(
    name: str,
    steps: Sequence[Step],
    setup: dict[str, Any],
    args: argparse.Namespace,
    patience: float | None,
    goals_of: Callable[[Sequence[Step]], list[Goal]],
) -> pathlib.Path:
    """The result, written after every step; with patience, what takes longer is the last of its model."""
    about, path, done = machine.describe(args.device), args.out / f"{name}.json", []
    print(setup, flush=True)
    for step in steps:
        step.note = beyond(step, done, patience) if patience else ""
        if not step.note:
            _measure(step, setup, args.limit, patience and LATE * patience)
        done.append(step)
        print(line(step), file=sys.stderr, flush=True)
        goals = goals_of(done)
        found = {"bench": "long_context", "machine": about, "flags": args.flags, "setup": setup}
        found |= {
            "rows": [asdict(own) for own in done],
            "goals": [asdict(goal) | {"met": goal.met} for goal in goals],
        }
        tables.write_json(path, found)
        tables.write_csv(path.with_suffix(".csv"), done, about)
    lines = [line(step) for step in done]
    print(tables.table(lines, list(lines[0])) + "\n\n" + tables.goals_block(goals))
    print(f"\nwritten: {', '.join([str(path), '.csv', *session.plot(path)])}")
    return path


def _measure(step: Step, setup: dict[str, Any], limit: float, seconds: float | None) -> None:
    words = {"model": step.model, "tokens": step.tokens, "depth": step.depth, **setup}
    for name, value in own_process.run(
        "bench.reformer.long_context_step", words, setup["device"], limit, seconds
    ).items():
        setattr(step, name, value)


def line(step: Step) -> dict[str, str]:
    def show(value: float | None, form: str, scale: float = 1) -> str:
        return "" if value is None else format(value * scale, form)

    return {
        "model": step.model,
        "tokens": str(step.tokens),
        "layers": str(step.depth),
        "s/step": show(step.seconds, ".1f"),
        "tokens/s": show(step.seconds and step.tokens / step.seconds, ".0f"),
        "peak GB": show(step.peak_bytes, ".2f", 1e-9),
        "all GB": show(step.resident, ".2f", 1e-9),
        "note": step.note,
    }
