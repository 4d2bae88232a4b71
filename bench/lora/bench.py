"""LoRA and DoRA over dense and NF4 weights: forward, backward to x, A and B, and both; q, k, v;
several adapters.

`frozen` is the dense layer without an adapter, whose backward gives dX only: what the rest comes on
top of. The rate counts its FLOPs, for all. `pyfast-plain` is LoRA where the case is DoRA, three
calls where q, k and v share one, and one adapter for all rows where there are several. The forward
is that of inference; what a backward needs is `saved MB`.
"""

import functools
import itertools

from bench.lora import peers
from bench.lora.problem import LoRA
from bench.measure import machine
from bench.measure.case import BOTH, STEPS
from bench.report.goals import At, Figure, Speed

PEERS = peers.PEERS
BUDGET = {"quick": 150, "full": 2400}
SHAPE, RANK, DROPOUT = "4096x4096", 16, 0.05
SHAPES = {SHAPE: "Llama-3-8B q/o", "3584x3584": "Qwen2.5-7B q/o", "768x768": "BERT-base q/k/v/o"}
# Without bf16 instructions plain torch takes seconds for a call: 64 rows, and half steps, are not
# for a quick run.
FEW, PARTS = ([1, 64, 512], STEPS) if machine.fast_bf16() else ([1, 512], [BOTH])
SIZES = {
    "cpu quick": {"shapes": [SHAPE], "m": FEW, "r": [RANK]},
    "cpu full": {"shapes": SHAPES, "m": [1, 64, 512, 4096], "r": [8, RANK, 64]},
    "cuda quick": {"shapes": [SHAPE], "m": [1, 64, 512, 8192], "r": [RANK]},
    "cuda full": {"shapes": SHAPES, "m": [1, 64, 512, 4096, 8192], "r": [8, RANK, 64]},
}
EXTRA = {
    "cpu": [512],
    "cuda": [512, 8192],
}  # rows of DoRA, q/k/v and several adapters; of dropout in a quick run


def cases(args):
    """M ascending, so that times can be foretold."""
    extra = {m for m in args.m if m in EXTRA[args.device]} or set(args.m)
    parts = PARTS if args.quick and args.device == "cpu" else STEPS
    for shape, dtype, m, base in itertools.product(
        args.shapes, args.dtype, args.m, ("dense", "nf4")
    ):
        case = functools.partial(LoRA, shape, dtype, args.device, m, base=base)
        rates = [0.0] if args.quick and m not in extra else [0.0, DROPOUT]
        yield from (
            case(step, rank=r, dropout=p) for r, p, step in itertools.product(args.r, rates, parts)
        )
        if m in extra:
            kinds = {"dora": True}, {"projections": 3}, {"adapters": 8}
            rank, steps = RANK if RANK in args.r else args.r[0], [BOTH] if args.quick else STEPS
            yield from (
                case(step, rank=rank, **kind) for kind, step in itertools.product(kinds, steps)
            )


def saved(row):
    """Over x, S (and the seed of the dropout)."""
    x, s, seed = (
        2 * row.m * int(row.shape.split("x")[1]),
        4 * row.m * RANK,
        8 * ("dropout" in row.variant),
    )
    return row.saved_mb and 1e6 * row.saved_mb / (x + s + seed)


def goals(device, shape, m, base):
    plain, dropped = f"r={RANK}", f"r={RANK}, dropout {DROPOUT}"
    dora, eight = (At(f"{kind} {base} fwd+bwd", shape, m, plain) for kind in ("dora", "8 adapters"))
    yield Speed(dora, "<=", 1.3 if device == "cpu" else 1.15, "pyfast-plain", ": LoRA")
    if device == "cpu":
        yield Speed(eight, "<=", 1.25, "pyfast-plain", ": one adapter")
    yield Figure(
        At(f"lora {base} fwd+bwd", shape, m, dropped),
        "<=",
        1,
        "{:.3f}x the bytes of x and S saved",
        saved,
    )


GOALS = {
    "cpu": [
        Speed(At("lora dense fwd+bwd", SHAPE, 512, f"r={RANK}"), "<=", 1.15, "frozen"),
        Speed(At("lora nf4 fwd+bwd", SHAPE, 512, f"r={RANK}"), "<=", 1.35, "frozen"),
        *itertools.chain(*(goals("cpu", SHAPE, 512, base) for base in ("dense", "nf4"))),
    ],
    "cuda": [
        Speed(
            At("lora nf4 fwd+bwd", SHAPE, 8192, f"r={RANK}, dropout {DROPOUT}"),
            "<=",
            1.13,
            "frozen",
        ),
        *itertools.chain(
            *(goals("cuda", SHAPE, m, base) for m in EXTRA["cuda"] for base in ("dense", "nf4"))
        ),
    ],
}
