"""LoRA and DoRA over dense and NF4 weights: forward, backward to x, A and B, and both.

There are also cases of q, k, v that share x, and of several adapters in a batch. `frozen` is the
dense layer without an adapter, whose backward gives dX only: the rest comes on top of it. The rate
counts its FLOPs, for all. `pyfast-plain` computes LoRA where the case is DoRA, three calls where
q, k and v share one, and one adapter for all rows where there are several. The forward is that of
inference; what a backward needs is `saved MB`.
"""

import functools
import itertools

from bench.lora import peers
from bench.lora.problem import LoRA
from bench.measure import machine
from bench.measure.case import BOTH, STEPS
from bench.report.goals import CaseName, Figure, Speed

PEERS = peers.PEERS
BUDGET = {"quick": 150, "full": 2400}  # seconds
SHAPE, RANK, DROPOUT = "4096x4096", 16, 0.05
PLAIN, DROPPED = f"r={RANK}", f"r={RANK}, dropout {DROPOUT}"  # variants, as the rows name them
SHAPES = {SHAPE: "Llama-3-8B q/o", "3584x3584": "Qwen2.5-7B q/o", "768x768": "BERT-base q/k/v/o"}
# Without bf16 instructions plain torch takes seconds for a call. A quick run then leaves out 64
# rows, and forward and backward alone.
if machine.has_fast_bf16():
    QUICK_ROWS, QUICK_STEPS = [1, 64, 512], STEPS
else:
    QUICK_ROWS, QUICK_STEPS = [1, 512], [BOTH]
SIZES = {
    "cpu quick": {"shapes": [SHAPE], "m": QUICK_ROWS, "r": [RANK]},
    "cpu full": {"shapes": SHAPES, "m": [1, 64, 512, 4096], "r": [8, RANK, 64]},
    "cuda quick": {"shapes": [SHAPE], "m": [1, 64, 512, 8192], "r": [RANK]},
    "cuda full": {"shapes": SHAPES, "m": [1, 64, 512, 4096, 8192], "r": [8, RANK, 64]},
}
# Rows of DoRA, of q, k, v and of several adapters; in a quick run, of dropout too.
EXTRA_ROWS = {"cpu": [512], "cuda": [512, 8192]}
EXTRA_FIELDS = {"dora": True}, {"projections": 3}, {"adapters": 8}


def cases(args):
    """Yield the cases; M ascends, so that times can be forecast."""
    extra_rows = {m for m in args.m if m in EXTRA_ROWS[args.device]} or set(args.m)
    steps = QUICK_STEPS if args.quick and args.device == "cpu" else STEPS
    extra_steps = [BOTH] if args.quick else STEPS
    extra_rank = RANK if RANK in args.r else args.r[0]
    for shape, dtype, m, base in itertools.product(
        args.shapes, args.dtype, args.m, ("dense", "nf4")
    ):
        case = functools.partial(LoRA, shape, dtype, args.device, m, base=base)
        rates = [0.0] if args.quick and m not in extra_rows else [0.0, DROPOUT]
        for rank, rate, step in itertools.product(args.r, rates, steps):
            yield case(step, rank=rank, dropout=rate)
        if m in extra_rows:
            for fields, step in itertools.product(EXTRA_FIELDS, extra_steps):
                yield case(step, rank=extra_rank, **fields)


def saved_ratio(row):
    """Return the bytes saved, over those of x, S and the seed of the dropout."""
    x = 2 * row.m * int(row.shape.split("x")[1])
    s = 4 * row.m * RANK
    seed = 8 * ("dropout" in row.variant)
    return row.saved_mb and 1e6 * row.saved_mb / (x + s + seed)


def goals(device, shape, m, base):
    """Yield the goals of one size."""
    dora = CaseName(f"dora {base} fwd+bwd", shape, m, PLAIN)
    yield Speed(dora, "<=", 1.3 if device == "cpu" else 1.15, "pyfast-plain", ": LoRA")
    if device == "cpu":
        eight = CaseName(f"8 adapters {base} fwd+bwd", shape, m, PLAIN)
        yield Speed(eight, "<=", 1.25, "pyfast-plain", ": one adapter")
    lora = CaseName(f"lora {base} fwd+bwd", shape, m, DROPPED)
    yield Figure(lora, "<=", 1, "{:.3f}x the bytes of x and S saved", saved_ratio)


def all_goals(device):
    """Return the goals of all sizes of DoRA, several adapters and saved bytes."""
    sizes = itertools.product(EXTRA_ROWS[device], ("dense", "nf4"))
    return [goal for m, base in sizes for goal in goals(device, SHAPE, m, base)]


GOALS = {
    "cpu": [
        Speed(CaseName("lora dense fwd+bwd", SHAPE, 512, PLAIN), "<=", 1.15, "frozen"),
        Speed(CaseName("lora nf4 fwd+bwd", SHAPE, 512, PLAIN), "<=", 1.35, "frozen"),
        *all_goals("cpu"),
    ],
    "cuda": [
        Speed(CaseName("lora nf4 fwd+bwd", SHAPE, 8192, DROPPED), "<=", 1.13, "frozen"),
        *all_goals("cuda"),
    ],
}
