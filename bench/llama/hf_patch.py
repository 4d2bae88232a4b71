"""PEFT's models before and after `pyfast.hf.patch`: Llama, dense and on bitsandbytes, and GPT-2;
LoRA and DoRA.

The shape is width x layers, M are tokens. A step is the forward and the backward of their loss to
adapters of r = 16 on every linear layer but the head; loss, logits and gradients are first compared
with the same model in float64. `pyfast` is the patched model, `peft` the one as it was; fp32
adapters are PEFT's default. The rate counts the products with frozen weights, for both.
"""

import itertools

from bench.llama import hf_patch_problem
from bench.llama.hf_patch_problem import KINDS, Step
from bench.report.goals import At, Speed

PEERS = hf_patch_problem.PEERS
BUDGET = {"quick": 180, "full": 900}  # seconds
SHAPES = {"2048x2": "TinyLlama", "4096x2": "Llama-2-7B"}  # widths
SIZES = {
    "cpu quick": {"shapes": ["2048x2"], "m": [256]},
    "cuda quick": {"shapes": ["4096x2"], "m": [512]},
    "full": {"shapes": SHAPES, "m": [256, 1024]},
}


def cases(args):
    found = []
    for shape, dtype, m, kind, dora in itertools.product(
        args.shapes, args.dtype, args.m, KINDS, (False, True)
    ):
        for adapters in dict.fromkeys(["fp32", dtype]):
            found.append(
                Step(shape, dtype, args.device, m, kind=kind, adapters=adapters, dora=dora)
            )
    return found


def goals(rows):
    """Patched is faster, whatever the model."""
    at = dict.fromkeys(At(r.op, r.shape, r.m, r.variant, r.dtype) for r in rows if r.m)
    return [Speed(each, ">=", 1, "peft") for each in at]


GOALS = {"cpu": goals, "cuda": goals}
