"""The Reformer paper's task, copy w in 0w0w: trained with exact or LSH attention, read with the same or another."""

import math
import time
from dataclasses import asdict, dataclass, replace

from bench import options, session
from bench.measure import machine
from bench.reformer.duplication import Setup, Training
from bench.report import tables

TRAIN, READ = ["full", "lsh-4", "lsh-2", "lsh-1"], ["full", "lsh-8", "lsh-4", "lsh-2", "lsh-1"]
PAPER = {  # table 2, accuracies in %, by training and reading
    "full": (100, 94.8, 92.5, 76.9, 52.5),
    "lsh-4": (0.8, 100, 99.9, 99.4, 91.9),
    "lsh-2": (0.8, 100, 99.9, 98.1, 86.8),
    "lsh-1": (0.8, 99.9, 99.6, 94.8, 77.9),
}
OPTIONS = ("length", "symbols", "width", "batch", "steps", "seed")  # of a Setup
SMALL = Setup(length=256, symbols=31, width=128, heads=4, chunk=16, batch=16, steps=1000)
FULL = Setup(length=1024, symbols=127, width=256, heads=4, chunk=64, batch=32, steps=6000)


@dataclass
class Score:
    """One training, read in one way."""

    train: str
    read: str
    loss: float
    accuracy: float  # %
    paper: float
    steps: int
    seconds: float  # of training


def add_arguments(parser):
    options.add_budget(parser)
    parser.add_argument(
        "--train", default=",".join(TRAIN), help="attentions to train with; default: %(default)s"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    for name in OPTIONS:
        parser.add_argument(f"--{name}", type=int, help="instead of this size's")


def run(args):
    """The paper's size on a GPU, unless in a hurry."""
    default = SMALL if args.quick or args.device == "cpu" else FULL
    setup = replace(
        default,
        **{name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None},
    )
    trained, scores, curves = args.train.split(","), [], {}
    if unknown := set(trained) - set(TRAIN):
        raise SystemExit(f"--train {', '.join(sorted(unknown))}: there are {', '.join(TRAIN)}")
    print(setup, flush=True)
    path, end = args.out / "duplication.json", time.monotonic() + (args.budget or math.inf)
    found = {"bench": "duplication", "machine": machine.describe(args.device), "flags": args.flags}
    for left, name in zip(range(len(trained), 0, -1), trained):
        training = Training(setup, name, args.device, args.out / f"duplication-{name}.pt")
        if args.resume:
            training.resume()
        try:
            training.run(time.monotonic() + (end - time.monotonic()) / left)
        except KeyboardInterrupt:
            print(f"{training.path} is at step {training.steps}; --resume goes on from there")
            raise
        for attention, paper in zip(READ, PAPER[name]):
            scores.append(
                Score(
                    name,
                    attention,
                    *training.read(attention),
                    paper,
                    training.steps,
                    training.seconds,
                )
            )
        curves[name] = training.curve
        tables.write_json(
            path,
            found | {"setup": asdict(setup), "curves": curves, "rows": list(map(asdict, scores))},
        )
        tables.write_csv(path.with_suffix(".csv"), scores, found["machine"])
    print(table(scores))
    if short := {score.train for score in scores if score.steps < setup.steps}:
        print(f"not trained to the end: {', '.join(sorted(short))}; --resume goes on")
    print(f"\nwritten: {', '.join([str(path), '.csv', *session.plot(path)])}, and checkpoints")


def table(scores):
    lines = []
    for train in dict.fromkeys(score.train for score in scores):
        own = [score for score in scores if score.train == train]
        line = {"trained with": train} | {
            f"read {s.read}": f"{s.accuracy:.1f} ({s.paper:g})" for s in own
        }
        lines.append(line | {"steps": own[0].steps, "s": own[0].seconds})
    return "accuracy in % (the paper's, of 1024 tokens after 150000 steps)\n" + tables.table(
        lines, list(lines[0])
    )
