"""Reversible blocks: a training step over depth, its time and memory, and what recovering the
inputs gets wrong.

The shape is width x tokens, M the number of blocks: pre-norm transformer blocks, causal attention
and feed-forward, one example. A step is a forward and a backward into gradients that are there, and
zeroed first; memory is what it takes beside these and the parameters. `torch` stores activations,
`checkpoint` keeps the streams between blocks, `lucidrains` is reformer-pytorch's
ReversibleSequence; of pyfast's `exact` the other settings than the default of the dtype are
variants.
"""

import itertools

from bench import session
from bench.measure import machine
from bench.report import tables
from bench.report.goals import At, Growth, Speed
from bench.reversible import drift, peers
from bench.reversible.problem import Brief, Reversible

PEERS = peers.PEERS
BUDGET = {"quick": 150, "full": 1500}  # seconds
# A CPU without bf16 instructions takes ten times as long for bf16 as for fp32, whose opponent it is
# not.
DTYPE = {"cpu": ["fp32", "bf16"] if machine.fast_bf16() else ["fp32"], "cuda": ["fp32", "bf16"]}
SHAPES = {"384x512": "MiniLM", "768x512": "BERT-base", "1024x4096": "BERT-large"}  # widths
SMALL, LARGE, DRIFT = "384x512", "1024x4096", "256x128"
SHALLOW, TIMED, DEEP = 6, 12, 48  # blocks: times are compared at 12, memory from 6 to 48
SIZES = {
    "cpu quick": {"shapes": [SMALL], "m": [SHALLOW, TIMED, DEEP]},
    "cpu full": {"shapes": [SMALL, "768x512"], "m": [2, SHALLOW, TIMED, 24, DEEP]},
    "cuda quick": {"shapes": [LARGE], "m": [SHALLOW, TIMED, DEEP]},
    "cuda full": {"shapes": [LARGE], "m": [2, SHALLOW, TIMED, 24, DEEP]},
}


def cases(args):
    """Quickly: all peers only where times are compared."""
    brief = args.quick and TIMED in args.m
    for *where, m in itertools.product(args.shapes, args.dtype, [args.device], args.m):
        yield (Brief if brief and m != TIMED else Reversible)(*where, m)


def goals(shape, dtype):
    """The time of four forwards for that of three, whatever the depth the memory of one block."""
    at = {depth: At(Reversible.op, shape, depth, dtype=dtype) for depth in (SHALLOW, TIMED, DEEP)}
    yield Speed(at[TIMED], "<=", 1.33, "torch")
    yield Growth(
        at[DEEP], "<=", 1.05, at[SHALLOW], f"{{:.3f}}x the memory of {SHALLOW} blocks", "added_mb"
    )


GOALS = {
    device: [*itertools.chain(*(goals(shape, dtype) for dtype in DTYPE[device]))]
    for device, shape in (("cpu", SMALL), ("cuda", LARGE))
}


def memory_table(rows):
    """MB beside parameters and gradients, a line for each implementation."""
    lines = {}
    for row in rows:
        if row.peak_mb:
            line = lines.setdefault((row.shape, row.dtype, row.impl), {})
            line |= {
                "shape": row.shape,
                "dtype": row.dtype,
                "impl": row.impl,
                f"{row.m} blocks": row.added_mb,
            }
    columns = list(dict.fromkeys(itertools.chain(*lines.values())))
    return "MB of a step, beside parameters and gradients\n" + tables.table(
        list(lines.values()), columns
    )


def after(args, rows, stem):
    """Memory and drift over depth."""
    shape = DRIFT if args.shapes[0] in SHAPES else args.shapes[0]
    found = drift.measure(
        shape, args.dtype, args.device, args.m, [p for p in args.present if p.recovers]
    )
    path = stem.with_name(f"{stem.name}-drift.json")
    tables.write_json(path, {"inputs": f"{shape}, against stored activations", "rows": found})
    session.plot(path)
    return "\n\n".join([memory_table(rows), drift.table(found)])
