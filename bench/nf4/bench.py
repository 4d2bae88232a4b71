"""NF4 weights: quantize, dequantize, and the linear layer forward, backward to x, and both.

The shape is that of the weight, out_features x in_features; M is the number of rows of x.
"""

import itertools
import math

from bench.measure.case import STEPS
from bench.nf4 import peers
from bench.nf4.problem import Dequantize, Linear, Quantize
from bench.report.goals import CaseName, Figure, Growth, Speed, bandwidth_goal

PEERS = peers.PEERS
BUDGET = {"quick": 90, "full": 1200}  # seconds
SQUARE, GATE = "4096x4096", "14336x4096"
SHAPES = {
    SQUARE: "Llama-3-8B q/o",
    GATE: "Llama-3-8B gate/up",
    "4096x14336": "Llama-3-8B down",
    "8192x8192": "Llama-3-70B q/o",
    "28672x8192": "Llama-3-70B gate/up",
    "18944x3584": "Qwen2.5-7B gate/up",
    "768x768": "BERT-base q/k/v/o",
}
SIZES = {
    "cpu quick": {"shapes": [SQUARE], "m": [1, 16, 64, 512]},
    "cpu full": {"shapes": SHAPES, "m": [1, 4, 16, 64, 128, 512, 2048]},
    "cuda quick": {"shapes": [SQUARE, GATE], "m": [1, 16, 64, 512, 2048, 4096, 8192]},
    "cuda full": {"shapes": SHAPES, "m": [2**i for i in range(14)]},
}


def cases(args):
    """Yield the cases weight by weight, so that one is in memory at a time.

    M ascends, so that times can be forecast.
    """
    for base in itertools.product(args.shapes, args.dtype, [args.device]):
        yield from (Quantize(*base), Dequantize(*base))
        yield from (Linear(*base, m, step) for m, step in itertools.product(args.m, STEPS))


def gpu_goals(shape):
    """Return the goals of one weight's shape on a GPU."""
    one_row = CaseName("linear", shape, 1)
    is_large = math.prod(map(int, shape.split("x"))) >= 14336 * 4096
    shares = [(512, 0.75), (2048, 0.9), (4096, 0.93), (8192, 0.96)]  # M, share of torch's speed
    goals = [bandwidth_goal(one_row, 80)] if is_large else []
    for m in (2, 4, 8, 16):
        case = CaseName("linear", shape, m)
        goals.append(Growth(case, "<=", 1.15, one_row, "{:.2f}x the time of M=1"))
    goals += [Speed(one_row, ">=", 1.3, impl) for impl in ("bnb-train", "unsloth")]
    for m in (64, 128, 256, 512):
        goals.append(Speed(CaseName("linear", shape, m), ">=", 1, "dequantize+torch"))
    goals += [Speed(CaseName("linear", shape, m), ">=", share, "torch") for m, share in shares]
    for m, share in shares[1:]:
        goals.append(Speed(CaseName("linear dX", shape, m), ">=", share, "torch"))
    text = "equal to bitsandbytes, bit for bit: {:.0f}"
    case = CaseName("dequantize", shape)
    goals.append(Figure(case, ">=", 1, text, lambda row: row.same_bits, impl="bnb-train"))
    return goals


GOALS = {
    "cpu": [
        Speed(CaseName("linear", SQUARE, 1), ">=", 4, "torch"),
        Speed(CaseName("linear", SQUARE, 1), ">=", 30, "bnb-train"),
        Speed(CaseName("linear", SQUARE, 1), ">=", 2, "bnb-eval"),
        Speed(CaseName("linear", SQUARE, 64), "<=", 1.2, "torch"),
        Speed(CaseName("linear", SQUARE, 512), "<=", 1.15, "torch"),
        Speed(CaseName("quantize", SQUARE), ">=", 10, "bnb-train"),
    ],
    "cuda": [
        *itertools.chain(*map(gpu_goals, SHAPES)),
        bandwidth_goal(CaseName("dequantize", GATE), 88),
    ],
}
