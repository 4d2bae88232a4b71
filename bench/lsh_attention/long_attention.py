"""One forward and backward of LSH attention over a million tokens: its time and its memory.

It is checked at a length whose definition can be computed, then timed at its own.
"""

import math
import pathlib
from dataclasses import asdict

from bench import options
from bench.lsh_attention.peers import PEERS
from bench.lsh_attention.problem import LSHAttention
from bench.measure import harness, machine, timing
from bench.measure.case import BOTH
from bench.measure.machine import DTYPES
from bench.report import files, tables
from pyfast._support.measure import peak_bytes

CHECKED_TOKENS = 2**14
CALLS = 3


def add_arguments(parser):
    """Add the bench's options."""
    parser.add_argument(
        "--tokens",
        type=options.number,
        default=2**20,
        metavar="N",
        help="length, such as 64K; default: 1M",
    )
    parser.add_argument(
        "--shapes",
        default="1x64",
        metavar="HEADSxDIM",
        help="heads and their width; default: %(default)s",
    )
    parser.add_argument(
        "--r", type=int, default=4, metavar="N", help="rounds of hashing; default: %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")


def run(args):
    """Check, measure, print and write the result."""
    args.dtype = args.dtype or {"cpu": "fp32", "cuda": "bf16"}[args.device]
    case = LSHAttention(args.shapes, args.dtype, args.device, args.tokens, BOTH, args.r)
    peer, forecast = PEERS["pyfast"], harness.Forecast()
    checked = case.copy_with(m=min(args.tokens, CHECKED_TOKENS))
    rows = harness.measure_case(checked, [peer], args.device, 1, math.inf, forecast)
    (call, *_) = case.build(peer).calls
    resident = measure_resident(call)
    seconds = sorted(timing.time_call(call, args.device)[1] for _ in range(CALLS))
    peak = peak_bytes(call, args.device) / 1e6
    print(tables.tables(rows))
    print(f"\n{case.title}")
    spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
    print(f"  {seconds[1]:.2f} s ({spread}), {peak:.0f} MB allocated at most")
    if resident:
        print(f"  resident memory: {resident[0]:.0f} MB at most, {resident[1]:.0f} MB before")
    content = {
        "bench": "long_attention",
        "machine": machine.describe(args.device),
        "flags": args.flags,
        "tokens": args.tokens,
        "shape": args.shapes,
        "r": args.r,
        "seconds": seconds,
        "peak_mb": peak,
        "rss_mb": resident,
        "checked": [asdict(row) for row in rows],
    }
    files.write_json(args.out / "long_attention.json", content)
    print(f"written: {args.out / 'long_attention.json'}")


def measure_resident(call) -> tuple[float, float] | None:
    """Return the most memory of the process during a call, and its memory before, in MB.

    Only Linux tells; elsewhere the result is None.
    """
    status = pathlib.Path("/proc/self/status")
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None

    def read(key):
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024 / 1e6

    before = read("VmRSS")
    call()
    return read("VmHWM"), before
