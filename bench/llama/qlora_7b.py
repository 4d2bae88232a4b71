"""QLoRA of a 7B-shaped Llama in less than 8 GB, beside PEFT with bitsandbytes; 70B in less than 48
on a GPU.

Random weights, made and quantized layer by layer. A step is forward, backward and AdamW on LoRA's r
= 16 of all linear layers, gradients checkpointed a layer; each way runs in a process of its own.
Losses are first compared, on two layers, with the same model in float32. Peak memory is that of the
whole process; on a GPU of its tensors.
"""

import argparse
import pathlib

from bench.llama import run as whole_models
from bench.llama import shapes
from bench.llama.run import Run, faster, goal
from bench.measure.spread import Spread
from bench.report.goals import Goal

WAYS = ("pyfast-nf4", "peft-bnb", "peft-bnb+patch")
GB = {"7b": 8, "8b": 8, "70b": 48}  # it is to take less


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole_models.add_arguments(
        parser, WAYS[:2], shape="7b", layers=None, batch=1, seq=None, steps=None, rounds=1
    )


def run(args: argparse.Namespace) -> pathlib.Path:
    args.checkpointing = True
    args.seq = args.seq or (512 if args.device == "cuda" else 128 if args.quick else 256)
    args.steps = args.steps or (8 if args.device == "cuda" else 2 if args.quick else 3)

    def goals(runs: list[Run]) -> list[Goal]:
        """Peaks of the whole model; the speed at any depth."""
        whole = args.shape in GB and args.layers == shapes.config(args.shape).num_hidden_layers
        found = faster(runs, *WAYS[:2], target=1.5 if args.device == "cuda" else 1.0)
        if not whole:
            return found
        text = f"QLoRA of {args.shape}, {args.seq} tokens: peak {{:.2f}} GB"
        return (
            goal(
                runs, text, "<=", GB[args.shape], lambda own: Spread(own.peak_bytes / 1e9), WAYS[0]
            )
            + found
        )

    name = "qlora_7b" if args.shape == "7b" else f"qlora_7b-{args.shape}"
    return whole_models.run(name, args, goals)
