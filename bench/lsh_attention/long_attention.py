"""One forward and backward of LSH attention over a million tokens: its time and its memory.

Checked at a length whose definition can be had, then timed at its own.
"""

import math
import pathlib
from dataclasses import asdict

from bench import options
from bench.lsh_attention.peers import PEERS
from bench.lsh_attention.problem import LSHAttention
from bench.measure import harness, machine
from bench.measure.case import BOTH
from bench.measure.machine import DTYPES
from bench.report import tables

CHECKED = 2**14  # tokens
CALLS = 3


def add_arguments(parser):
    parser.add_argument(
        "--tokens", type=options.number, default=2**20, metavar="N", help="such as 64K; default: 1M"
    )
    parser.add_argument(
        "--shapes", default="1x64", metavar="HEADSxDIM", help="default: %(default)s"
    )
    parser.add_argument(
        "--r", type=int, default=4, metavar="N", help="rounds of hashing; default: %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on a GPU bf16")


def run(args):
    args.dtype = args.dtype or {"cpu": "fp32", "cuda": "bf16"}[args.device]
    case = LSHAttention(args.shapes, args.dtype, args.device, args.tokens, BOTH, args.r)
    checked, peer = case.but(m=min(args.tokens, CHECKED)), PEERS["pyfast"]
    rows = harness.run_case(checked, [peer], args.device, 1, math.inf, harness.Forecast())
    (call, *_) = case.build(peer).calls
    rss = peak_rss(call)
    seconds = sorted(harness.timed_call(call, args.device)[1] for _ in range(CALLS))
    peak = harness.peak_bytes(call, args.device) / 1e6
    print(tables.tables(rows))
    print(f"\n{case.title}")
    print(
        f"  {seconds[1]:.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f}), {peak:.0f} MB allocated at most"
    )
    if rss:
        print(f"  resident memory: {rss[0]:.0f} MB at most, {rss[1]:.0f} MB before the call")
    found = {
        "bench": "long_attention",
        "machine": machine.describe(args.device),
        "flags": args.flags,
    }
    found |= {
        "tokens": args.tokens,
        "shape": args.shapes,
        "r": args.r,
        "seconds": seconds,
        "peak_mb": peak,
    }
    found |= {"rss_mb": rss, "checked": [asdict(row) for row in rows]}
    tables.write_json(args.out / "long_attention.json", found)
    print(f"written: {args.out / 'long_attention.json'}")


def peak_rss(call):
    """The most memory that the process has had during a call, and what it had before it, in MB; on Linux."""
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
