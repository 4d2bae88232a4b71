"""Reversible blocks: time and memory of a training step over depth, and errors of recovered inputs.

The shape is width x tokens, M the number of blocks. They are pre-norm transformer blocks, causal
attention and feed-forward, of one example. A step is a forward and a backward into gradients that
exist already, and are zeroed first. Memory is what a step takes beside these and the parameters.
`torch` stores activations, `checkpoint` keeps the streams between blocks, `lucidrains` is
reformer-pytorch's ReversibleSequence. Other settings of pyfast's `exact` than the default of the
dtype are implementations of their own.
"""

import itertools

from bench import session
from bench.measure import machine
from bench.report import files, tables
from bench.report.goals import CaseName, Growth, Speed
from bench.reversible import drift, peers
from bench.reversible.problem import MemoryOnly, Reversible

PEERS = peers.PEERS
BUDGET = {"quick": 150, "full": 1500}  # seconds
# A CPU without bf16 instructions takes ten times as long for bf16 as for fp32, which is then the
# opponent.
DTYPE = {
    "cpu": ["fp32", "bf16"] if machine.has_fast_bf16() else ["fp32"],
    "cuda": ["fp32", "bf16"],
}
SHAPES = {"384x512": "MiniLM", "768x512": "BERT-base", "1024x4096": "BERT-large"}  # by width
SMALL, LARGE, DRIFT = "384x512", "1024x4096", "256x128"
SHALLOW, TIMED, DEEP = 6, 12, 48  # blocks: times are compared at 12, memory from 6 to 48
SIZES = {
    "cpu quick": {"shapes": [SMALL], "m": [SHALLOW, TIMED, DEEP]},
    "cpu full": {"shapes": [SMALL, "768x512"], "m": [2, SHALLOW, TIMED, 24, DEEP]},
    "cuda quick": {"shapes": [LARGE], "m": [SHALLOW, TIMED, DEEP]},
    "cuda full": {"shapes": [LARGE], "m": [2, SHALLOW, TIMED, 24, DEEP]},
}


def cases(args):
    """Yield the cases; in a quick run all peers only where times are compared."""
    has_memory_cases = args.quick and TIMED in args.m
    for *base, m in itertools.product(args.shapes, args.dtype, [args.device], args.m):
        yield (MemoryOnly if has_memory_cases and m != TIMED else Reversible)(*base, m)


def goals(shape, dtype):
    """Yield the goals: the time of four forwards for that of three, and constant memory.

    The memory is that of one block, whatever the depth.
    """
    at = {m: CaseName(Reversible.op, shape, m, dtype=dtype) for m in (SHALLOW, TIMED, DEEP)}
    yield Speed(at[TIMED], "<=", 1.33, "torch")
    text = f"{{:.3f}}x the memory of {SHALLOW} blocks"
    yield Growth(at[DEEP], "<=", 1.05, at[SHALLOW], text, "added_mb")


GOALS = {
    device: [goal for dtype in DTYPE[device] for goal in goals(shape, dtype)]
    for device, shape in (("cpu", SMALL), ("cuda", LARGE))
}


def memory_table(rows):
    """Return the MB beside parameters and gradients, a line for each implementation."""
    lines = {}
    for row in rows:
        if row.peak_mb:
            names = {"shape": row.shape, "dtype": row.dtype, "impl": row.impl}
            line = lines.setdefault(tuple(names.values()), names)
            line[f"{row.m} blocks"] = row.added_mb
    columns = list(dict.fromkeys(itertools.chain(*lines.values())))
    text = tables.table(list(lines.values()), columns)
    return f"MB of a step, beside parameters and gradients\n{text}"


def after(args, rows, stem):
    """Measure the drift and write it; return the memory and the drift over depth."""
    shape = DRIFT if args.shapes[0] in SHAPES else args.shapes[0]
    recovering = [peer for peer in args.present if peer.recovers_inputs]
    drift_rows = drift.measure(shape, args.dtype, args.device, args.m, recovering)
    path = stem.with_name(f"{stem.name}-drift.json")
    inputs = f"{shape}, against stored activations"
    files.write_json(path, {"inputs": inputs, "rows": drift_rows})
    session.plot(path)
    return "\n\n".join([memory_table(rows), drift.table(drift_rows)])
