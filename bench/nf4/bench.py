"""NF4 weights: quantize, dequantize, and the linear layer forward, backward to x, and both.

The shape is that of the weight, out x in; M are rows of x.
"""

import itertools
import math

from bench.measure.case import STEPS
from bench.nf4 import peers
from bench.nf4.problem import Dequantize, Linear, Quantize
from bench.report.goals import At, Figure, Growth, Speed, bandwidth

PEERS = peers.PEERS
BUDGET = {"quick": 90, "full": 1200}  # seconds
SQUARE, WIDE = "4096x4096", "14336x4096"
SHAPES = {
    SQUARE: "Llama-3-8B q/o",
    WIDE: "Llama-3-8B gate/up",
    "4096x14336": "Llama-3-8B down",
    "8192x8192": "Llama-3-70B q/o",
    "28672x8192": "Llama-3-70B gate/up",
    "18944x3584": "Qwen2.5-7B gate/up",
    "768x768": "BERT-base q/k/v/o",
}
SIZES = {
    "cpu quick": {"shapes": [SQUARE], "m": [1, 16, 64, 512]},
    "cpu full": {"shapes": SHAPES, "m": [1, 4, 16, 64, 128, 512, 2048]},
    "cuda quick": {"shapes": [SQUARE, WIDE], "m": [1, 16, 64, 512, 2048, 4096, 8192]},
    "cuda full": {"shapes": SHAPES, "m": [2**i for i in range(14)]},
}


def cases(args):
    """Weight by weight, so that one is in memory; M ascending, so that times can be foretold."""
    for where in itertools.product(args.shapes, args.dtype, [args.device]):
        yield from (Quantize(*where), Dequantize(*where))
        yield from (Linear(*where, m, step) for m, step in itertools.product(args.m, STEPS))


def on_gpu(shape):
    one, of_bnb = At("linear", shape, 1), "equal to bitsandbytes, bit for bit: {:.0f}"
    large = math.prod(map(int, shape.split("x"))) >= 14336 * 4096
    rates = [(512, 0.75), (2048, 0.9), (4096, 0.93), (8192, 0.96)]
    return [
        *([bandwidth(one, 80)] if large else []),
        *(
            Growth(At("linear", shape, m), "<=", 1.15, one, "{:.2f}x the time of M=1")
            for m in (2, 4, 8, 16)
        ),
        *(Speed(one, ">=", 1.3, impl) for impl in ("bnb-train", "unsloth")),
        *(Speed(At("linear", shape, m), ">=", 1, "dequantize+torch") for m in (64, 128, 256, 512)),
        *(Speed(At("linear", shape, m), ">=", share, "torch") for m, share in rates),
        *(Speed(At("linear dX", shape, m), ">=", share, "torch") for m, share in rates[1:]),
        Figure(
            At("dequantize", shape), ">=", 1, of_bnb, lambda row: row.same_bits, impl="bnb-train"
        ),
    ]


GOALS = {
    "cpu": [
        Speed(At("linear", SQUARE, 1), ">=", 4, "torch"),
        Speed(At("linear", SQUARE, 1), ">=", 30, "bnb-train"),
        Speed(At("linear", SQUARE, 1), ">=", 2, "bnb-eval"),
        Speed(At("linear", SQUARE, 64), "<=", 1.2, "torch"),
        Speed(At("linear", SQUARE, 512), "<=", 1.15, "torch"),
        Speed(At("quantize", SQUARE), ">=", 10, "bnb-train"),
    ],
    "cuda": [*itertools.chain(*map(on_gpu, SHAPES)), bandwidth(At("dequantize", WIDE), 88)],
}
