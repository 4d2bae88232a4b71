"""A training step of a Llama, end to end: full, LoRA and QLoRA, of PEFT, unsloth and pyfast.

A step is forward, backward and AdamW; adapters are of r = 16 on all linear layers, weights random.
Each method runs in a process of its own, in turns. Losses are first compared, on two layers, with
the same model in float32. On a CPU the model is four layers of TinyLlama's width, on a GPU all of
Llama 3 8B. `x pyfast` is the time over that of pyfast's method over the same weights.
"""

import argparse
import pathlib

from bench.llama import run as whole_models
from bench.llama.run import Run, faster_goals, smaller_goals
from bench.report.goals import Goal

METHODS = ("full", "peft", "pyfast", "peft-bnb", "peft-bnb+patch", "unsloth", "pyfast-nf4")
COMPARED = (("pyfast", "peft"), ("pyfast-nf4", "peft-bnb"), ("peft-bnb+patch", "peft-bnb"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bench's options."""
    sizes = {"shape": None, "layers": None, "batch": 1, "seq": 512}
    whole_models.add_arguments(parser, METHODS, **sizes, steps=None, rounds=None)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute the activations of each layer"
    )


def run(args: argparse.Namespace) -> pathlib.Path:
    """Measure the methods; return the path of the result."""
    args.layers = args.layers or (4 if args.device == "cpu" and not args.shape else None)
    args.shape = args.shape or ("8b" if args.device == "cuda" else "1b")
    args.steps = args.steps or 4
    args.rounds = args.rounds or (1 if args.quick else 3)
    return whole_models.run("training_step", args, goals_of)


def goals_of(runs: list[Run]) -> list[Goal]:
    """Return the goals of the speed and memory of each pair of methods."""
    goals = []
    for name, other in COMPARED:
        goals += faster_goals(runs, name, other) + smaller_goals(runs, name, other)
    return goals
