"""A training step of a Llama, end to end: full fine-tuning, LoRA and QLoRA, of PEFT, unsloth and
pyfast.

A step is forward, backward and AdamW; adapters are of r = 16 on all linear layers, weights random.
Each way runs in a process of its own, in turns. Losses are first compared, on two layers, with the
same model in float32. On a CPU four layers of a TinyLlama's width, on a GPU all of Llama 3 8B. `x
pyfast` is against pyfast's way of the same weights.
"""

import argparse
import pathlib

from bench.llama import run as whole_models
from bench.llama.run import Run, faster, smaller
from bench.report.goals import Goal

WAYS = ("full", "peft", "pyfast", "peft-bnb", "peft-bnb+patch", "unsloth", "pyfast-nf4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"shape": None, "layers": None, "batch": 1, "seq": 512}
    whole_models.add_arguments(parser, WAYS, **sizes, steps=None, rounds=None)
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute the activations of a layer again"
    )


def run(args: argparse.Namespace) -> pathlib.Path:
    args.layers = args.layers or (4 if args.device == "cpu" and not args.shape else None)
    args.shape = args.shape or ("8b" if args.device == "cuda" else "1b")
    args.steps = args.steps or 4
    args.rounds = args.rounds or (1 if args.quick else 3)

    def goals(runs: list[Run]) -> list[Goal]:
        pairs = (("pyfast", "peft"), ("pyfast-nf4", "peft-bnb"), ("peft-bnb+patch", "peft-bnb"))
        return [found for pair in pairs for found in faster(runs, *pair) + smaller(runs, *pair)]

    return whole_models.run("training_step", args, goals)
