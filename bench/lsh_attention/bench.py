"""LSH attention: forward, and forward and backward, over lengths and rounds of hashing.

All attentions are causal, of one example, in chunks of 64. The shape is heads x width of a head, M
is the number of tokens. `sdpa` is exact and has keys of its own. `hf` and `lucidrains` are the
attentions of transformers and of reformer-pytorch, `flex` is FlexAttention on sorted tokens. These
three share queries and keys as pyfast does, and hash too.
"""

import itertools

from bench.lsh_attention import accuracy, peers
from bench.lsh_attention.problem import LSHAttention
from bench.measure import machine
from bench.measure.case import BOTH, FORWARD
from bench.report.goals import CaseName, Crossover, Figure, Speed, find_crossover

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
GOAL_SIZES = {"cpu": (SMALL, 2**14), "cuda": (LARGE, 2**16)}  # with 4 rounds


def cases(args):
    """Yield the cases, then those of goals in another dtype or size.

    Lengths ascend, so that times can be forecast.
    """
    # Without bf16 instructions a call of the peers takes up to half a minute.
    is_slow = args.device == "cpu" and not machine.has_fast_bf16()
    steps = (BOTH,) if is_slow and args.quick else (FORWARD, BOTH)
    for *base, rounds in itertools.product(args.shapes, args.dtype, [args.device], args.m, args.r):
        yield from (LSHAttention(*base, step, rounds) for step in steps)
    shape, n = GOAL_SIZES[args.device]
    if shape in args.shapes and n in args.m and 4 in args.r:
        if "bf16" not in args.dtype:
            yield LSHAttention(shape, "bf16", args.device, n, BOTH, 4, only_pyfast=is_slow)
        if args.device == "cuda":
            yield LSHAttention(HUGE, "bf16", "cuda", 2**20, BOTH, 4, only_pyfast=True)


def case_name(shape, m, rounds, dtype):
    return CaseName("lsh_attention fwd+bwd", shape, m, f"r={rounds}", dtype)


def saved_kilobytes(row):
    """Return the KB saved for a token and head."""
    return row.saved_mb and 1e3 * row.saved_mb / (row.m * int(row.shape.split("x")[0]))


FP32_16K, BF16_16K = (case_name(SMALL, 2**14, 4, dtype) for dtype in ("fp32", "bf16"))
BF16_64K, BF16_1M = case_name(LARGE, 2**16, 4, "bf16"), case_name(HUGE, 2**20, 4, "bf16")
OTHERS = "hf lucidrains flex"
GOALS = {
    "cpu": [
        Speed(FP32_16K, ">=", 10, "hf"),
        Speed(FP32_16K, ">=", 10, "lucidrains"),
        Speed(case_name(SMALL, 2**10, 1, "fp32"), ">=", 1, "sdpa"),
        Speed(case_name(SMALL, 2**11, 4, "fp32"), ">=", 1, "sdpa"),
        Figure(BF16_16K, "<=", 0.45, "{:.3f} KB saved a token and head", saved_kilobytes),
    ],
    "cuda": [
        Speed(BF16_64K, ">=", 8, "sdpa"),
        Speed(BF16_64K, ">=", 8, OTHERS, " (the best other LSH attention)"),
        Crossover(BF16_64K, "<=", 2**13, "sdpa"),
        Figure(BF16_64K, ">=", 40, "{:.0f} % of the floor", lambda row: row.percent),
        Figure(BF16_1M, "<=", 100, "{:.1f} ms", lambda row: row.ms_p50),
        Figure(BF16_1M, "<=", 20, "peak {:.1f} GB", lambda row: row.peak_mb, 1e-3),
    ],
}


def after(args, rows, stem):
    """Return the crossovers with exact attention, and the price of accuracy."""
    groups = {}
    for row in rows:
        if row.m:
            groups.setdefault((row.op, row.shape, row.dtype, row.variant), []).append(row)
    lines = ["faster than SDPA"]
    for name, group in groups.items():
        lines.append(f"  {' '.join(name)}: {find_crossover(group, 'sdpa')[1]} tokens")
    return "\n".join([*lines, "", accuracy.measure(args, stem)])
