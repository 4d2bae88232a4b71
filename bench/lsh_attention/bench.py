"""LSH attention: forward, and forward and backward, over lengths and rounds of hashing, beside
exact attention.

All are causal, one example, chunks of 64. The shape is heads x width of a head, M is the number of
tokens. `sdpa` is exact and has keys of its own; `hf` and `lucidrains` are the attentions of
transformers and of reformer-pytorch, `flex` is FlexAttention on sorted tokens: these share queries
and keys as pyfast does, and hash too.
"""

import itertools

from bench.lsh_attention import accuracy, peers
from bench.lsh_attention.problem import LSHAttention
from bench.measure import machine
from bench.measure.case import BOTH, FORWARD
from bench.report.goals import At, Crossover, Figure, Speed, crossover

PEERS = peers.PEERS
BUDGET = {"quick": 200, "full": 3600}  # seconds: exact attention of 16K tokens takes some
DTYPE = {"cpu": ["fp32"], "cuda": ["bf16"]}
SMALL, LARGE, HUGE = "4x64", "8x64", "8x128"
SHAPES = {HUGE: "Llama-3 k/v heads", "32x128": "Llama-3-8B heads", "12x64": "BERT-base heads"}
SIZES = {
    "cpu quick": {"shapes": [SMALL], "m": [2**10, 2**11, 2**14], "r": [1, 4]},
    "cpu full": {
        "shapes": [SMALL, "12x64"],
        "m": [2**10, 2**11, 2**12, 2**14, 2**16],
        "r": [1, 2, 4, 8],
    },
    "cuda quick": {"shapes": [LARGE], "m": [2**12, 2**13, 2**14, 2**16], "r": [1, 4]},
    "cuda full": {
        "shapes": [LARGE, "32x128"],
        "m": [2**i for i in (10, 11, 12, 13, 14, 16, 18, 20)],
        "r": [1, 2, 4, 8],
    },
}
MAIN = {"cpu": (SMALL, 2**14), "cuda": (LARGE, 2**16)}  # of the goals, with 4 rounds


def cases(args):
    """Lengths ascending, so that times can be foretold; then those of goals in another dtype or size."""
    slow = (
        args.device == "cpu" and not machine.fast_bf16()
    )  # a call of the others takes up to half a minute
    each = itertools.product(args.shapes, args.dtype, [args.device], args.m, args.r)
    steps = (BOTH,) if slow and args.quick else (FORWARD, BOTH)
    yield from (LSHAttention(*where, step, r) for *where, r in each for step in steps)
    shape, n = MAIN[args.device]
    if shape in args.shapes and n in args.m and 4 in args.r:
        if "bf16" not in args.dtype:
            yield LSHAttention(shape, "bf16", args.device, n, BOTH, 4, alone=slow)
        if args.device == "cuda":
            yield LSHAttention(HUGE, "bf16", "cuda", 2**20, BOTH, 4, alone=True)


def at(shape, m, r, dtype):
    return At("lsh_attention fwd+bwd", shape, m, f"r={r}", dtype)


def kilobytes(row):
    """Saved for a token and head."""
    return row.saved_mb and 1e3 * row.saved_mb / (row.m * int(row.shape.split("x")[0]))


GOALS = {
    "cpu": [
        *(Speed(at(SMALL, 2**14, 4, "fp32"), ">=", 10, impl) for impl in ("hf", "lucidrains")),
        *(Speed(at(SMALL, n, r, "fp32"), ">=", 1, "sdpa") for n, r in ((2**10, 1), (2**11, 4))),
        Figure(
            at(SMALL, 2**14, 4, "bf16"), "<=", 0.45, "{:.3f} KB saved a token and head", kilobytes
        ),
    ],
    "cuda": [
        Speed(at(LARGE, 2**16, 4, "bf16"), ">=", 8, "sdpa"),
        Speed(
            at(LARGE, 2**16, 4, "bf16"),
            ">=",
            8,
            "hf lucidrains flex",
            " (the best other LSH attention)",
        ),
        Crossover(at(LARGE, 2**16, 4, "bf16"), "<=", 2**13, "sdpa"),
        Figure(
            at(LARGE, 2**16, 4, "bf16"), ">=", 40, "{:.0f} % of the floor", lambda row: row.percent
        ),
        Figure(at(HUGE, 2**20, 4, "bf16"), "<=", 100, "{:.1f} ms", lambda row: row.ms_p50),
        Figure(
            at(HUGE, 2**20, 4, "bf16"), "<=", 20, "peak {:.1f} GB", lambda row: row.peak_mb, 1e-3
        ),
    ],
}


def after(args, rows, stem):
    """Crossovers, and the price of accuracy."""
    kinds = dict.fromkeys((row.op, row.shape, row.dtype, row.variant) for row in rows if row.m)
    found = {
        kind: [row for row in rows if (row.op, row.shape, row.dtype, row.variant) == kind]
        for kind in kinds
    }
    lines = [
        f"  {' '.join(kind)}: {crossover(own, 'sdpa')[1]} tokens" for kind, own in found.items()
    ]
    return "\n".join(["faster than SDPA", *lines, "", accuracy.measure(args, stem)])
