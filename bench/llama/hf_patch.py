"""PEFT's models before and after `pyfast.hf.patch`: Llama, dense and on bitsandbytes, and GPT-2.

Adapters are LoRA's and DoRA's. The shape is width x layers, M is the number of tokens. A step is
the forward and the backward of the loss to adapters of r = 16 on every linear layer but the head.
Loss, logits and gradients are first compared with the same model in float64. `pyfast` is the
patched model, `peft` the model before. fp32 adapters are PEFT's default. The rate counts the
products with frozen weights, for both.
"""

import itertools

from bench.llama import hf_patch_problem
from bench.llama.hf_patch_problem import ARCHITECTURES, Step
from bench.report.goals import CaseName, Speed

PEERS = hf_patch_problem.PEERS
BUDGET = {"quick": 180, "full": 900}  # seconds
SHAPES = {"2048x2": "TinyLlama", "4096x2": "Llama-2-7B"}  # by width
SIZES = {
    "cpu quick": {"shapes": ["2048x2"], "m": [256]},
    "cuda quick": {"shapes": ["4096x2"], "m": [512]},
    "full": {"shapes": SHAPES, "m": [256, 1024]},
}


def cases(args):
    """Yield the cases, of each model with LoRA and DoRA, and with adapters of both dtypes."""
    for shape, dtype, m, architecture, dora in itertools.product(
        args.shapes, args.dtype, args.m, ARCHITECTURES, (False, True)
    ):
        fields = {"architecture": architecture, "dora": dora}
        for adapters in dict.fromkeys(["fp32", dtype]):
            yield Step(shape, dtype, args.device, m, adapters=adapters, **fields)


def goals(rows):
    """Return the goals: the patched model is faster, whatever the model is."""
    names = dict.fromkeys(CaseName.of_row(row) for row in rows if row.m)
    return [Speed(name, ">=", 1, "peft") for name in names]


GOALS = {"cpu": goals, "cuda": goals}
