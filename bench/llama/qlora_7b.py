"""QLoRA of a 7B-shaped Llama in less than 8 GB, beside PEFT with bitsandbytes.

On a GPU, 70B fits in less than 48 GB. Weights are random, made and quantized layer by layer. A
step is forward, backward and AdamW on LoRA of r = 16 of all linear layers, with gradients
checkpointed by layer. Each method runs in a process of its own. Losses are first compared, on two
layers, with the same model in float32. Peak memory is that of the whole process; on a GPU that of
its tensors.
"""

import argparse
import pathlib

from bench.llama import run as whole_models
from bench.llama import shapes
from bench.llama.run import Run, faster_goals, make_goals
from bench.measure.spread import Spread
from bench.report.goals import Goal

METHODS = ("pyfast-nf4", "peft-bnb", "peft-bnb+patch")
MAX_GB = {"7b": 8, "8b": 8, "70b": 48}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the bench's options."""
    sizes = {"shape": "7b", "layers": None, "batch": 1, "seq": None}
    whole_models.add_arguments(parser, METHODS[:2], **sizes, steps=None, rounds=1)


def run(args: argparse.Namespace) -> pathlib.Path:
    """Measure the methods; return the path of the result."""
    args.checkpointing = True
    args.seq = args.seq or (512 if args.device == "cuda" else 128 if args.quick else 256)
    args.steps = args.steps or (8 if args.device == "cuda" else 2 if args.quick else 3)

    def goals_of(runs: list[Run]) -> list[Goal]:
        """Return the goals of the speed at any depth, and of the peak of the whole model."""
        target = 1.5 if args.device == "cuda" else 1.0
        goals = faster_goals(runs, *METHODS[:2], target=target)
        depth = shapes.make_config(args.shape).num_hidden_layers
        if args.shape not in MAX_GB or args.layers != depth:
            return goals
        text = f"QLoRA of {args.shape}, {args.seq} tokens: peak {{:.2f}} GB"
        limit = MAX_GB[args.shape]
        return make_goals(runs, text, "<=", limit, _peak_gigabytes, METHODS[0]) + goals

    name = "qlora_7b" if args.shape == "7b" else f"qlora_7b-{args.shape}"
    return whole_models.run(name, args, goals_of)


def _peak_gigabytes(run: Run) -> Spread:
    return Spread(run.peak_bytes / 1e9)
