"""A small Reformer and a Transformer of its size learn real text: the losses of both, step by step."""

import math
import time
from dataclasses import asdict, replace

from bench import options, session
from bench.measure import machine
from bench.reformer.learning import Setup, learn
from bench.reformer.models import MODELS
from bench.report import tables
from bench.report.goals import Goal

OPTIONS = ("length", "width", "batch", "steps", "n_hashes", "seed")
SHARE = 1.02  # of the Transformer's loss
QUICK = 300  # steps


def add_arguments(parser):
    options.add_budget(parser)
    for name in OPTIONS:
        default = getattr(Setup, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s"
        )


def run(args):
    setup = replace(Setup(), **{name: getattr(args, name) for name in OPTIONS})
    setup = replace(setup, steps=min(setup.steps, QUICK)) if args.quick else setup
    print(setup, flush=True)
    end, curves = time.monotonic() + (args.budget or math.inf), []
    for left, name in zip((2, 1), MODELS):
        curves.append(
            learn(setup, name, args.device, time.monotonic() + (end - time.monotonic()) / left)
        )
    path, goal = args.out / "learning.json", judge(setup, *curves)
    found = {"bench": "learning", "machine": machine.describe(args.device), "flags": args.flags}
    found |= {"setup": asdict(setup), "rows": [asdict(curve) for curve in curves]}
    found["goals"] = [asdict(goal) | {"met": goal.met}]
    tables.write_json(path, found)
    lines = [{k: v for k, v in asdict(curve).items() if k != "points"} for curve in curves]
    print(
        tables.table(
            [line | {"held_out": f"{line['held_out']:.4f}"} for line in lines], list(lines[0])
        )
    )
    print(
        f"\n{tables.goals_block([goal])}\n\nwritten: {', '.join([str(path), *session.plot(path)])}"
    )


def judge(setup, reformer, transformer):
    short = [curve.model for curve in (reformer, transformer) if curve.steps < setup.steps]
    ratio = None if short else reformer.held_out / transformer.held_out
    why = f"not trained to the end: {', '.join(short)}"
    return Goal("held-out loss: {:.3f} of the Transformer's", "<=", SHARE, ratio, why)
